"""InvokeAI's contract with an extension of its denoising, as a stand-in, in its names: InvokeAI 6.14.2, read in November 2026.

`installed("stand-in")` puts it where `import invokeai...` finds it; `installed("6.14.2")` puts the package's own code of its
backend there: the base of extensions, their manager, the context of a denoising, and the loop. Its node is a stand-in always.
"""

import importlib.util
import logging
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import own_code
import torch

BACKEND, APP = "invokeai.backend.stable_diffusion", "invokeai.app.invocations"
NAMES = ("extension_callback_type", "extensions.base", "diffusion.conditioning_data", "diffusion_backend", "denoise_context")


class ConditioningMode(Enum):
    Both, Negative, Positive = "both", "negative", "positive"


class ExtensionCallbackType(Enum):
    SETUP, PRE_DENOISE_LOOP, POST_DENOISE_LOOP = "setup", "pre_denoise_loop", "post_denoise_loop"
    PRE_STEP, POST_STEP, PRE_UNET, POST_UNET = "pre_step", "post_step", "pre_unet", "post_unet"
    POST_COMBINE_NOISE_PREDS = "post_combine_noise_preds"


def callback(callback_type, order=0):
    def decorated(function):
        function.told = callback_type, order
        return function

    return decorated


class ExtensionBase:
    def get_callbacks(self):
        return [(*one.told, one) for one in (getattr(self, name) for name in dir(self)) if hasattr(one, "told")]


class ExtensionsManager:
    def __init__(self, is_canceled=None):
        self._is_canceled, self._callbacks = is_canceled, []

    def add_extension(self, extension):
        self._callbacks += extension.get_callbacks()

    def run_callback(self, callback_type, ctx):
        if self._is_canceled and self._is_canceled():
            raise CanceledException
        for _, _, function in sorted((one for one in self._callbacks if one[0] is callback_type), key=lambda one: one[1]):
            function(ctx)


class CanceledException(Exception):
    pass


@dataclass
class DenoiseInputs:
    orig_latents: torch.Tensor
    scheduler_step_kwargs: dict
    conditioning_data: Any
    noise: Any
    seed: int
    timesteps: torch.Tensor
    init_timestep: torch.Tensor
    attention_processor_cls: Any


@dataclass
class DenoiseContext:
    inputs: DenoiseInputs
    scheduler: Any
    unet: Any = None
    extra: dict = field(default_factory=dict)


class UNetKwargs(SimpleNamespace):
    pass


class StableDiffusionBackend:
    def __init__(self, unet, scheduler):
        self.unet, self.scheduler = unet, scheduler

    def latents_from_embeddings(self, ctx, ext_manager):
        if not len(ctx.inputs.timesteps):
            return ctx.inputs.orig_latents
        ctx.latents = ctx.inputs.orig_latents.clone()
        if ctx.inputs.noise is not None:
            level = ctx.inputs.init_timestep.expand(len(ctx.latents))
            ctx.latents = ctx.scheduler.add_noise(ctx.latents, ctx.inputs.noise, level)
        ext_manager.run_callback(ExtensionCallbackType.PRE_DENOISE_LOOP, ctx)
        for ctx.step_index, ctx.timestep in enumerate(ctx.inputs.timesteps):  # noqa: B020
            ext_manager.run_callback(ExtensionCallbackType.PRE_STEP, ctx)
            ctx.latent_model_input = ctx.scheduler.scale_model_input(ctx.latents, ctx.timestep)
            both = self.run_unet(ctx, ext_manager, ConditioningMode.Both)
            ctx.negative_noise_pred, ctx.positive_noise_pred = both.chunk(2)
            scale = ctx.inputs.conditioning_data.guidance_scale
            scale = scale[ctx.step_index] if isinstance(scale, list) else scale
            ctx.noise_pred = ctx.negative_noise_pred + scale * (ctx.positive_noise_pred - ctx.negative_noise_pred)
            ext_manager.run_callback(ExtensionCallbackType.POST_COMBINE_NOISE_PREDS, ctx)
            ctx.latents = ctx.scheduler.step(ctx.noise_pred, ctx.timestep, ctx.latents).prev_sample
        ext_manager.run_callback(ExtensionCallbackType.POST_DENOISE_LOOP, ctx)
        return ctx.latents

    def run_unet(self, ctx, ext_manager, conditioning_mode):
        sample = torch.cat([ctx.latent_model_input] * 2)
        ctx.unet_kwargs = UNetKwargs(sample=sample, timestep=ctx.timestep)
        ctx.inputs.conditioning_data.to_unet_kwargs(ctx.unet_kwargs, conditioning_mode)
        ext_manager.run_callback(ExtensionCallbackType.PRE_UNET, ctx)
        return self.unet(**vars(ctx.unet_kwargs)).sample


class Conditioning:
    """`TextConditioningData`: the prompts' embeddings (B, n), and the CFG scale."""

    def __init__(self, uncond, cond, guidance_scale):
        self.uncond, self.cond, self.guidance_scale = uncond, cond, guidance_scale

    def to_unet_kwargs(self, unet_kwargs, conditioning_mode):
        assert conditioning_mode.value == "both"
        unet_kwargs.encoder_hidden_states = torch.cat([self.uncond, self.cond])


def node_of(backend):
    """`denoise_latents`: a node whose fields are attributes; context: what its connections are."""
    module = ModuleType(f"{APP}.denoise_latents")

    class DenoiseLatentsInvocation:
        cfg_rescale_multiplier, ip_adapter, denoising_end = 0.0, None, 1.0

        def __init__(self, **given):
            vars(self).update(given)

        def _new_invoke(self, context):
            manager = module.ExtensionsManager(context.is_canceled)
            conditioning = Conditioning(context.uncond, context.cond, self.cfg_scale)
            inputs = backend.DenoiseInputs(
                orig_latents=context.latents,
                scheduler_step_kwargs={},
                conditioning_data=conditioning,
                noise=context.noise,
                seed=context.seed,
                timesteps=context.scheduler.timesteps[context.first :],
                init_timestep=context.scheduler.timesteps[context.first : context.first + 1],
                attention_processor_cls=None,
            )
            ctx = backend.DenoiseContext(inputs=inputs, scheduler=context.scheduler, unet=context.unet)
            loop = backend.StableDiffusionBackend(context.unet, context.scheduler)
            made = loop.latents_from_embeddings(ctx, manager)
            return SimpleNamespace(latents=made, width=made.shape[-1] * 8, height=made.shape[-2] * 8)

    module.ExtensionsManager, module.DenoiseLatentsInvocation = backend.ExtensionsManager, DenoiseLatentsInvocation
    return module


@contextmanager
def installed(code, monkeypatch):
    """`basinescape.hosts.invokeai`, with the stand-in or the package's own code under it."""
    if code == "stand-in":
        backend = sys.modules[__name__]
        found = {f"{BACKEND}.{name}": backend for name in NAMES}
    else:
        found, backend = own_backend(monkeypatch)
    told = lambda *given, **named: lambda made: made  # noqa: E731
    found[f"{APP}.denoise_latents"] = node_of(backend)
    beside = {
        "baseinvocation": {"invocation": told, "invocation_output": told},
        "primitives": {"LatentsOutput": SimpleNamespace},
    }
    beside["fields"] = {"InputField": lambda default, **_: default, "OutputField": lambda **_: None}
    for name, given in beside.items():
        found[f"{APP}.{name}"] = ModuleType(name)
        vars(found[f"{APP}.{name}"]).update(given)
    for name in list(found):
        for i in range(1, name.count(".") + 1):
            found.setdefault(".".join(name.split(".")[:i]), ModuleType(name)).__path__ = []
    found[APP].denoise_latents = found[f"{APP}.denoise_latents"]
    for name, made in found.items():
        monkeypatch.setitem(sys.modules, name, made)
    ours = [f"basinescape.hosts.invokeai.{name}" for name in ("basin_escape", "extension", "node")]
    for name in ours:
        sys.modules.pop(name, None)
    try:
        yield importlib.import_module(ours[0]).BasinEscapeInvocation
    finally:
        for name in ours:
            sys.modules.pop(name, None)


def load_nodes(code, folder, monkeypatch):
    """Load the packs of `nodes` as InvokeAI does; code: "stand-in", or its own `load_custom_nodes`."""
    if code != "stand-in":
        path = own_code.find("invokeai", "app/invocations/load_custom_nodes.py")
        monkeypatch.setattr("shutil.copy", lambda *given: None)  # of its README
        return own_code.module(path, "load_custom_nodes").load_custom_nodes(folder, logging.getLogger(__name__))
    for pack in folder.iterdir():
        spec = importlib.util.spec_from_file_location(pack.name, pack / "__init__.py")
        sys.modules[pack.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def own_backend(monkeypatch):
    root = own_code.find("invokeai", "backend/stable_diffusion/diffusion_backend.py").parent
    found = {}
    for name in ("extension_callback_type", "extensions.base", "denoise_context"):
        full, path = f"{BACKEND}.{name}", root / (name.replace(".", "/") + ".py")
        monkeypatch.setitem(sys.modules, full, ModuleType(full))  # known by name while its dataclasses are made
        found[full] = own_code.module(path, full)
    known = {name: value for made in found.values() for name, value in vars(made).items() if not name.startswith("__")}
    conditioning = own_code.parts(root / "diffusion/conditioning_data.py", ["ConditioningMode"], {"Enum": Enum})
    stubs = {"get_config": lambda: SimpleNamespace(sequential_guidance=False), "tqdm": lambda steps, desc: steps}
    stubs |= {"TorchDevice": SimpleNamespace(get_session_device_label=str), "torch": torch, **vars(conditioning)}
    stubs |= {"CanceledException": CanceledException, "ExitStack": None, "contextmanager": contextmanager}
    loop = own_code.parts(root / "diffusion_backend.py", ["StableDiffusionBackend"], known | stubs)
    manager = own_code.parts(root / "extensions_manager.py", ["ExtensionsManager"], known | stubs)
    found |= {f"{BACKEND}.diffusion.conditioning_data": conditioning, f"{BACKEND}.diffusion_backend": loop}
    backend = {"StableDiffusionBackend": loop.StableDiffusionBackend, "ExtensionsManager": manager.ExtensionsManager}
    return found, SimpleNamespace(**known, **backend)
