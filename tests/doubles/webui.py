"""The webuis' contract with a script, as a stand-in, in their names: AUTOMATIC1111 of February 2025, Forge of June 2025.

A network is a function (x, t, prompt (B, n)) -> noise. `job("a1111" | "forge" | "forge's own", ...)` is what a script is given;
"forge's own" takes `sampling_function_inner` and the predictor of Forge's own code.
"""

import copy
import inspect
import math
import sys
from types import ModuleType, SimpleNamespace

import own_code
import torch

FORGE = "stable-diffusion-webui-forge"


class Predictor:
    """Forge's `backend/modules/k_prediction.Prediction` for a network that predicts noise."""

    sigma_data, num_timesteps, prediction_type = 1.0, None, "epsilon"

    def __init__(self, prediction_type="epsilon"):
        alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        self.sigmas = ((1 - alphas) / alphas).sqrt()

    def timestep(self, sigma):
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0).view(sigma.shape)

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output * sigma.view(-1, *[1] * (model_output.ndim - 1))

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * sigma + latent_image


class Unet:
    """Forge's model patcher."""

    def __init__(self, predictor):
        self.model, self.model_options = SimpleNamespace(predictor=predictor), {}

    def clone(self):
        made = copy.copy(self)
        made.model_options = copy.deepcopy(self.model_options)
        return made

    def set_model_sampler_cfg_function(self, function, disable_cfg1_optimization=False):
        assert len(inspect.signature(function).parameters) == 1
        self.model_options["sampler_cfg_function"] = function
        self.model_options["disable_cfg1_optimization"] = disable_cfg1_optimization

    def set_model_sampler_pre_cfg_function(self, function):
        self.model_options.setdefault("sampler_pre_cfg_function", []).append(function)


def sampling_function_inner(model, x, timestep, uncond, cond, cond_scale, model_options, seed=None, return_full=False):
    strength = sum(part.get("strength", 1.0) for part in cond)
    for function in model_options.get("sampler_pre_cfg_function", []):
        model, cond, uncond, x, timestep, model_options = function(model, cond, uncond, x, timestep, model_options)
    of_cond, of_uncond = calc_cond_uncond_batch(model, cond, uncond, x, timestep, model_options)
    if "sampler_cfg_function" in model_options:
        args = {"input": x, "sigma": timestep, "cond_scale": cond_scale, "model": model, "model_options": model_options}
        args |= {"cond_denoised": of_cond, "uncond_denoised": of_uncond}
        denoised = x - model_options["sampler_cfg_function"](args)
    else:
        denoised = of_uncond + (of_cond - of_uncond) * cond_scale * strength
    return denoised, of_cond, of_uncond


def calc_cond_uncond_batch(model, cond, uncond, x, timestep, model_options):
    """Denoised for both; the parts of a prompt weigh as their strengths say."""
    total = sum(part.get("strength", 1.0) for part in cond)
    made = sum(part.get("strength", 1.0) / total * model.denoised(x, timestep, part["prompt"]) for part in cond)
    return made, torch.zeros_like(x) if uncond is None else model.denoised(x, timestep, uncond[0]["prompt"])


class CFGDenoiser(torch.nn.Module):
    """`modules/sd_samplers_cfg_denoiser.py`: of Forge where the model has a `unet`, else of AUTOMATIC1111."""

    def __init__(self, inner_model, p, inner):
        super().__init__()
        self.__dict__ |= {"inner_model": inner_model, "p": p, "inner": inner}

    def combine_denoised(self, x_out, conds_list, uncond, cond_scale):
        without = x_out[-len(uncond) :]
        made = without.clone()
        for i, conds in enumerate(conds_list):
            for row, weight in conds:
                made[i] += (x_out[row] - without[i]) * (weight * cond_scale)
        return made

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        """cond: [(prompt (B, n), weight)] of a prompt's parts."""
        if hasattr(self.p.sd_model, "forge_objects"):
            unet = self.p.sd_model.forge_objects.unet
            parts = [{"prompt": prompt, "strength": weight} for prompt, weight in cond]
            given = (unet.model, x, sigma, [{"prompt": uncond}], parts, cond_scale, unet.model_options)
            return self.inner(*given, None, return_full=True)[0]
        made = [self.inner_model(x, sigma, cond=prompt) for prompt in (*(prompt for prompt, _ in cond), uncond)]
        rows = [[(k * len(x) + i, weight) for k, (_, weight) in enumerate(cond)] for i in range(len(x))]
        return self.combine_denoised(torch.cat(made), rows, uncond, cond_scale)


class KDiffusionSampler:
    """`modules/sd_samplers_kdiffusion.py`."""

    def __init__(self, kd, funcname, p, inner_model, sigmas, inner):
        self.funcname, self.func = funcname, getattr(kd[0], funcname)
        self.model_wrap_cfg, self._sigmas = CFGDenoiser(inner_model, p, inner), sigmas

    def get_sigmas(self, p, steps):
        return self._sigmas

    def sample(self, p, x, cond, uncond, skipped=0):
        """skipped: steps that image to image leaves out."""
        sigmas = self.get_sigmas(p, len(self._sigmas) - 1)[skipped:]
        extra = {"cond": cond, "uncond": uncond, "cond_scale": p.cfg_scale, "s_min_uncond": p.s_min_uncond, "image_cond": None}
        given = {"n": len(sigmas) - 1, "sigma_min": sigmas[-2], "sigma_max": sigmas[0]}
        given = {name: given[name] for name in given if name in inspect.signature(self.func).parameters} or {"sigmas": sigmas}
        return self.func(self.model_wrap_cfg, sigmas[0] * x, extra_args=extra, disable=True, **given)


def job(kind, kd, network, funcname, sigmas, cfg_scale=4.0, batch=2, batches=1):
    """A job as `process_before_every_sampling` is given it."""
    p = SimpleNamespace(cfg_scale=cfg_scale, s_min_uncond=0.0, batch_size=batch, n_iter=batches, iteration=0, is_hr_pass=False)
    p.extra_generation_params, p.sd_model = {}, SimpleNamespace()
    predictor, inner = Predictor(), sampling_function_inner
    if kind == "forge's own":
        root = own_code.find(FORGE, "backend/sampling/sampling_function.py").parent.parent
        known = {"math": math, "torch": torch, "calc_cond_uncond_batch": calc_cond_uncond_batch}
        inner = own_code.parts(root / "sampling/sampling_function.py", ["sampling_function_inner"], known)
        inner = inner.sampling_function_inner
        made = own_code.module(root / "modules/k_prediction.py", "k_prediction")
        predictor = made.Prediction(prediction_type="epsilon")

    class Wrapped(kd[1].CompVisDenoiser):
        """Forge keeps no alphas: here for the levels."""

    net = torch.nn.Module()
    net.alphas_cumprod = 1 / (1 + Predictor().sigmas ** 2)
    net.apply_model = lambda x, t, cond: network(x, t, cond)
    wrapped = Wrapped(net, quantize=True)
    if kind != "a1111":
        unet = Unet(predictor)
        unet.model.denoised = lambda x, sigma, prompt: wrapped(x, sigma, cond=prompt)
        p.sd_model.forge_objects = SimpleNamespace(unet=unet)
    p.sampler = KDiffusionSampler(kd, funcname, p, wrapped, sigmas, inner)
    return p


def script(monkeypatch, path):
    """The file of a script as a webui loads it, with what it imports; the options are `shared.opts`."""

    class Component(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

    gradio, modules = ModuleType("gradio"), ModuleType("modules")
    for kind in ("Checkbox", "Slider", "Dropdown", "Accordion"):
        setattr(gradio, kind, lambda *given, kind=kind, **named: Component(kind=kind, **named))
    modules.scripts = SimpleNamespace(Script=object, AlwaysVisible=object())
    modules.shared = SimpleNamespace(opts=SimpleNamespace(skip_early_cond=0.0))
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setitem(sys.modules, "modules", modules)
    return own_code.module(path, "webui_script"), modules.shared.opts
