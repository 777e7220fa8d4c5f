"""ComfyUI's contract with a node and with what it sets on a model, as a stand-in, in ComfyUI's names.

Tried with the core itself: 0.8.0 (January 2026), on a CPU in November 2026: 10 kinds of model, all of its 44 samplers.
"""

import asyncio
import copy
import importlib.util
import inspect
import math
import sys
from types import ModuleType, SimpleNamespace

import torch


class EPS:
    """Model sampling of a network that predicts noise; sigmas are ratios of noise to data."""

    sigma_data, num_timesteps = 1.0, 1000

    def __init__(self):
        alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        self.log_sigmas = ((1 - alphas) / alphas).sqrt().log()
        self.sigma_max = self.log_sigmas[-1].exp()

    def timestep(self, sigma):
        return (sigma.log() - self.log_sigmas[:, None]).abs().argmin(dim=0).view(sigma.shape)

    def calculate_input(self, sigma, x):
        return x / (spread(sigma, x) ** 2 + self.sigma_data**2).sqrt()

    def calculate_denoised(self, sigma, output, x):
        return x - output * spread(sigma, output)

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return noise * sigma + latent


class V(EPS):
    def calculate_denoised(self, sigma, output, x):
        total = spread(sigma, output) ** 2 + self.sigma_data**2
        return x * self.sigma_data**2 / total - output * spread(sigma, output) * self.sigma_data / total.sqrt()


class CONST(EPS):
    """Flow matching: sigma is the share of noise."""

    def __init__(self):
        self.sigma_max = torch.ones(())

    def timestep(self, sigma):
        return sigma * 1000

    def calculate_input(self, sigma, x):
        return x

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent


def spread(sigma, like):
    return sigma.view(sigma.shape[:1] + (1,) * (like.ndim - 1))


class Patcher:
    """A model as nodes pass it on. A clone has deep copies of the options, and the same wrappers."""

    def __init__(self, network, sampling):
        self.model = SimpleNamespace(network=network, model_sampling=sampling)
        self.model_options = {"transformer_options": {}}
        self.wrappers, self.object_patches = {}, {}

    def clone(self):
        made = copy.copy(self)
        made.model_options, made.object_patches = copy.deepcopy(self.model_options), dict(self.object_patches)
        made.wrappers = {kind: {key: list(known) for key, known in keys.items()} for kind, keys in self.wrappers.items()}
        return made

    def add_object_patch(self, name, made):
        self.object_patches[name] = made

    def get_model_object(self, name):
        return self.object_patches.get(name, getattr(self.model, name))

    def loaded(self):
        """The model as it is while a sampler runs: with its patches, which ComfyUI takes away again."""
        return SimpleNamespace(**vars(self.model) | self.object_patches) if self.object_patches else self.model

    def set_model_sampler_cfg_function(self, function, disable_cfg1_optimization=False):
        assert len(inspect.signature(function).parameters) == 1
        self.model_options["sampler_cfg_function"] = function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True

    def set_model_sampler_calc_cond_batch_function(self, function):
        self.model_options["sampler_calc_cond_batch_function"] = function

    def set_model_sampler_post_cfg_function(self, function):
        self.model_options["sampler_post_cfg_function"] = [*self.model_options.get("sampler_post_cfg_function", []), function]

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)


class Executor:
    """What a wrapper is given: the next one, or the function itself, and the object whose method that is."""

    def __init__(self, function, class_obj, wrappers):
        self.function, self.class_obj, self.wrappers = function, class_obj, wrappers

    def __call__(self, *args, **named):
        if not self.wrappers:
            return self.function(*args, **named)
        return self.wrappers[0](Executor(self.function, self.class_obj, self.wrappers[1:]), *args, **named)


class CFGGuider:
    """Samples with a positive and a negative conditioning, here numbers or tensors that the network takes as its third."""

    def __init__(self, patcher, cfg, **conds):
        self.model_patcher, self.model_options, self.cfg, self.conds = patcher, patcher.model_options, cfg, conds

    def predict_noise(self, x, sigma, model_options):
        """What ComfyUI calls `sampling_function`: denoised."""
        model = self.model_patcher.loaded()
        skips = math.isclose(self.cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False)
        cond, uncond = self.conds["positive"], None if skips else self.conds.get("negative")
        make = model_options.get("sampler_calc_cond_batch_function")
        args = {"conds": [cond, uncond], "input": x, "sigma": sigma, "model": model, "model_options": model_options}
        made = make(args) if make else calc_cond_batch(model, [cond, uncond], x, sigma, model_options)
        return cfg_function(model, *made, self.cfg, x, sigma, model_options, cond, uncond)

    def sample(self, sampler, x, sigmas, noise=None, **options):
        """From the noisy latents x, by a sampling function of k-diffusion. noise: what was added to them; None: x."""
        self.model_options = copy_nested(self.model_patcher.model_options)
        wrappers = [one for known in self.model_patcher.wrappers.get("outer_sample", {}).values() for one in known]
        executor = Executor(self.outer_sample, self, wrappers)
        named = SimpleNamespace(sampler_function=sampler, extra_options=options)
        return executor(x if noise is None else noise, x, named, sigmas, None, None, True, seed=0)

    def outer_sample(self, noise, latents, sampler, sigmas, mask=None, callback=None, disable_pbar=False, seed=None):
        model_options = copy_nested(self.model_options)
        model_options["transformer_options"]["sample_sigmas"] = sigmas
        extra = {"model_options": model_options, "seed": seed}
        model = lambda x, sigma, model_options, seed=None: self.predict_noise(x, sigma, model_options)  # noqa: E731
        return sampler.sampler_function(model, latents, sigmas, extra_args=extra, disable=disable_pbar, **sampler.extra_options)


class PerpNegGuider(CFGGuider):
    """One that combines three predictions, without the model's CFG function."""

    def predict_noise(self, x, sigma, model_options):
        conds = [self.conds[name] for name in ("positive", "negative", "empty_negative_prompt")]
        cond, uncond, empty = calc_cond_batch(self.model_patcher.loaded(), conds, x, sigma, model_options)
        return empty + self.cfg * ((cond - empty) - (uncond - empty))


class DualCFGGuider(CFGGuider):
    """One that has the CFG function for two of its three predictions."""

    def predict_noise(self, x, sigma, model_options):
        model, names = self.model_patcher.loaded(), ("negative", "middle", "positive")
        uncond, middle, cond = calc_cond_batch(model, [self.conds[name] for name in names], x, sigma, model_options)
        given = (middle, uncond, self.cfg, x, sigma, model_options, self.conds["middle"], self.conds["negative"])
        return cfg_function(model, *given) + (cond - middle) * self.cfg


def calc_cond_batch(model, conds, x, sigma, model_options):
    """Denoised for each conditioning; zeros for one that is None."""
    sampling, made = model.model_sampling, []
    for cond in conds:
        if cond is None:
            made.append(torch.zeros_like(x))
        else:
            output = model.network(sampling.calculate_input(sigma, x), sampling.timestep(sigma), cond)
            made.append(sampling.calculate_denoised(sigma, output, x))
    return made


def cfg_function(model, of_cond, of_uncond, cfg, x, sigma, model_options, cond, uncond):
    """Denoised, by the model's own CFG function where it has one, and then by all that follow it."""
    shared = {"cond_scale": cfg, "input": x, "sigma": sigma, "model": model, "model_options": model_options}
    shared |= {"cond_denoised": of_cond, "uncond_denoised": of_uncond}
    denoised = of_uncond + (of_cond - of_uncond) * cfg
    if "sampler_cfg_function" in model_options:
        own = {"cond": x - of_cond, "uncond": x - of_uncond, "timestep": sigma, "input_cond": cond, "input_uncond": uncond}
        denoised = x - model_options["sampler_cfg_function"](shared | own)
    for function in model_options.get("sampler_post_cfg_function", []):
        denoised = function(shared | {"denoised": denoised, "cond": cond, "uncond": uncond})
    return denoised


def copy_nested(options):
    return {key: copy_nested(value) if isinstance(value, dict) else value for key, value in options.items()}


# `from comfy.samplers import calc_cond_batch` finds the one here.
sys.modules["comfy.samplers"] = ModuleType("comfy.samplers")
sys.modules["comfy.samplers"].calc_cond_batch = calc_cond_batch


class KSampler:
    """`comfy.samplers.KSAMPLER`: a sampling function with options."""

    def __init__(self, sampler_function, extra_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}


class CoreGuider(CFGGuider):
    """`comfy.samplers.CFGGuider` as nodes make it: it noises the latents by itself."""

    def __init__(self, model_patcher):
        super().__init__(model_patcher, 1.0)

    def set_conds(self, positive, negative):
        self.conds = {"positive": positive, "negative": negative}

    def set_cfg(self, cfg):
        self.cfg = cfg

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None):
        assert not self.model_patcher.wrappers.get("outer_sample"), "another node's run around this one"
        self.model_options = copy_nested(self.model_patcher.model_options)
        x = self.model_patcher.loaded().model_sampling.noise_scaling(sigmas[0], noise, latent_image)
        return self.outer_sample(noise, x, sampler, sigmas, seed=seed)


sys.modules["comfy.samplers"].KSAMPLER, sys.modules["comfy.samplers"].CFGGuider = KSampler, CoreGuider


def load(folder, name, monkeypatch, schema):
    """Load a folder of `custom_nodes` as ComfyUI does. schema: whether this is a version that knows V3. The nodes, by id."""
    if schema:
        api, latest = ModuleType("comfy_api"), ModuleType("comfy_api.latest")
        latest.ComfyExtension, latest.io = type("ComfyExtension", (), {}), io()
        monkeypatch.setitem(sys.modules, "comfy_api", api)
        monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    if getattr(module, "NODE_CLASS_MAPPINGS", None) is not None:
        return module.NODE_CLASS_MAPPINGS
    extension = asyncio.run(module.comfy_entrypoint())
    assert isinstance(extension, latest.ComfyExtension)
    nodes = asyncio.run(extension.get_node_list())
    return {node.define_schema().node_id: node for node in nodes}


def io():
    """The part of `comfy_api.latest.io` that nodes with such widgets use."""

    def recorded(kind, required):
        def make(id=None, **options):
            known = {"Int": {"min", "max"}, "Float": {"min", "max", "step"}, "Combo": {"options"}}.get(kind, set())
            known |= {"default", "tooltip", "display_name"} if required else {"display_name", "is_output_list"}
            assert set(options) <= known and (id is not None) == required
            return SimpleNamespace(kind=kind, id=id, **options)

        return make

    kinds = {kind: SimpleNamespace(Input=recorded(kind, True), Output=recorded(kind, False)) for kind in KINDS}
    return SimpleNamespace(
        **kinds,
        ComfyNode=type("ComfyNode", (), {}),
        Schema=lambda **given: SimpleNamespace(**given),
        NodeOutput=lambda *given: SimpleNamespace(result=given),
    )


KINDS = ("Model", "Latent", "Conditioning", "Int", "Float", "Boolean", "String", "Combo")
