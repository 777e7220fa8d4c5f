"""ComfyUI's contract with a model's CFG function and with a node, as a stand-in: what its sources promise, in its names."""

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

    def timestep(self, sigma):
        return sigma * 1000

    def calculate_input(self, sigma, x):
        return x

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent


def spread(sigma, like):
    return sigma.view(sigma.shape[:1] + (1,) * (like.ndim - 1))


class Patcher:
    """A model as nodes pass it on."""

    def __init__(self, network, sampling):
        self.model = SimpleNamespace(network=network, model_sampling=sampling)
        self.model_options = {"transformer_options": {}}

    def clone(self):
        made = copy.copy(self)
        made.model_options = copy.deepcopy(self.model_options)
        return made

    def set_model_sampler_cfg_function(self, function, disable_cfg1_optimization=False):
        assert len(inspect.signature(function).parameters) == 1
        self.model_options["sampler_cfg_function"] = function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True


def sample(patcher, sampler, x, sigmas, cond, uncond, cfg, **options):
    """What a sampler node does, with a sampling function of k-diffusion."""
    model_options = {**patcher.model_options, "transformer_options": dict(patcher.model_options["transformer_options"])}
    model_options["transformer_options"]["sample_sigmas"] = sigmas
    model, sampling = patcher.model, patcher.model.model_sampling

    def predicted(x, sigma, prompt):
        output = model.network(sampling.calculate_input(sigma, x), sampling.timestep(sigma), prompt)
        return sampling.calculate_denoised(sigma, output, x)

    def denoised(x, sigma, model_options, seed=None):
        skips = math.isclose(cfg, 1.0) and not model_options.get("disable_cfg1_optimization", False)
        of_cond = predicted(x, sigma, cond)
        of_uncond = torch.zeros_like(x) if skips else predicted(x, sigma, uncond)
        if "sampler_cfg_function" not in model_options:
            return of_uncond + (of_cond - of_uncond) * cfg
        args = {
            "cond": x - of_cond,
            "uncond": x - of_uncond,
            "cond_scale": cfg,
            "timestep": sigma,
            "input": x,
            "sigma": sigma,
            "cond_denoised": of_cond,
            "uncond_denoised": of_uncond,
            "model": model,
            "model_options": model_options,
        }
        return x - model_options["sampler_cfg_function"](args)

    extra = {"model_options": model_options, "seed": 0}
    return sampler(denoised, x, sigmas, extra_args=extra, disable=True, **options)


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
            assert required or not options
            assert set(options) <= known | {"default", "tooltip", "display_name"}
            return SimpleNamespace(kind=kind, id=id, **options)

        return make

    kinds = {kind: SimpleNamespace(Input=recorded(kind, True), Output=recorded(kind, False)) for kind in KINDS}
    return SimpleNamespace(
        **kinds,
        ComfyNode=type("ComfyNode", (), {}),
        Schema=lambda **given: SimpleNamespace(**given),
        NodeOutput=lambda *given: SimpleNamespace(result=given),
    )


KINDS = ("Model", "Int", "Float", "Combo")
