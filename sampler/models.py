"""What differs from pipeline to pipeline: loading, prompt encoding, the network call, decoding.

Each is done by the diffusers pipeline itself where it has a method for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from packaging.version import Version
from torch import Tensor

from .lean import Lean
from .loop import Branch

SUPPORTED = (StableDiffusionPipeline, StableDiffusionXLPipeline)
ATTENTION = ("sdpa", "xformers")


def load(path_or_id: str | Path, dtype: torch.dtype, allow_pickle: bool) -> DiffusionPipeline:
    """A pipeline from a folder in diffusers' format or a hub id. Weights come from safetensors unless pickle is allowed.

    Raises FileNotFoundError for a missing folder, ValueError for one that holds no pipeline or only pickled weights.
    """
    path = Path(path_or_id)
    looks_like_path = isinstance(path_or_id, Path) or path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", "..")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"model {str(path)!r} is no diffusers pipeline: it has no model_index.json")
        pickled = sorted(path.glob("*/*.bin"))
        if pickled and not allow_pickle and not all(any(file.parent.glob("*.safetensors")) for file in pickled):
            raise ValueError(
                f"model {str(path)!r} has pickled weights only ({pickled[0].name}), and pickle can run code when it is loaded: "
                "allow it explicitly (allow_pickle) if you trust the source"
            )
    elif looks_like_path:
        raise FileNotFoundError(
            f"model {str(path_or_id)!r} does not exist: give a folder in diffusers' format or a hub id such as 'owner/name'"
        )
    named = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    return DiffusionPipeline.from_pretrained(path_or_id, **{named: dtype}, use_safetensors=None if allow_pickle else True)


def check(pipe: DiffusionPipeline) -> None:
    """Raises ValueError for a pipeline that is not text-to-image guided by two predictions."""
    if not isinstance(pipe, SUPPORTED):
        names = ", ".join(cls.__name__ for cls in SUPPORTED)
        raise ValueError(f"pipe must be one of {names}, got {type(pipe).__name__}")
    config = pipe.unet.config
    if config.time_cond_proj_dim is not None:
        raise ValueError(
            "pipe is distilled: its network takes the guidance scale as an input, so there are no two predictions to merge"
        )
    if config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"pipe's network takes {config.in_channels} channels and its latents have "
            f"{pipe.vae.config.latent_channels}: it is not text-to-image"
        )


def set_attention(pipe: DiffusionPipeline, attention: str) -> None:
    """Choose the attention backend through diffusers' own switch.

    Raises ValueError for an unknown name, ImportError where xformers is missing, ValueError where it cannot run.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    if attention == "xformers":
        if pipe.device.type != "cuda":
            raise ValueError(f"attention 'xformers' runs on CUDA only, and the pipeline is on {pipe.device}; use 'sdpa'")
        try:
            pipe.enable_xformers_memory_efficient_attention()
        except ModuleNotFoundError as error:
            raise ImportError("attention 'xformers' needs the package xformers: pip install 'basinescape[xformers]'") from error


# On a CPU: weights packed for the kernels of each compiled shape, which takes memory for each, and kernels called from C++.
PACKED = {"freezing": True, "cpp_wrapper": True}
SHAPES = 64  # compiled before the compiler gives up; its own limit of 8 is that of a few batch sizes


def compiled(unet: torch.nn.Module) -> Callable[..., Any]:
    """The UNet compiled for one shape after another, its convolutions channels-last; without graphs of the compiler's own."""
    cpu = unet.device.type == "cpu"
    fast = torch.compile(unet.to(memory_format=torch.channels_last), dynamic=False, options=PACKED if cpu else None)
    return traced(fast, packed=cpu)


def traced(compiled: Callable[..., Any], packed: bool) -> Callable[..., Any]:
    """A compiled function, with what the tracer must know in each call: that weights are constants, for PACKED, and SHAPES."""
    from torch._dynamo import config as tracer
    from torch._inductor import config as compiler

    def call(*arguments: Any, **keywords: Any) -> Any:
        with tracer.patch(recompile_limit=SHAPES), compiler.patch(freezing=packed):
            return compiled(*arguments, **keywords)

    return call


class Networks:
    """The networks of one pipeline for one batch of encoded prompts after another.

    compile, lean: have the UNet compiled, and as `Lean` has it (not where its call is somebody's own).
    """

    def __init__(self, unet: torch.nn.Module, compile: bool, lean: bool):
        prepare = compiled if compile else lambda unet: unet
        self._plain = prepare(unet)
        self._lean = Lean(unet) if lean and "forward" not in vars(unet) else None
        if self._lean is not None:
            self._one, self._both = prepare(self._lean.one), prepare(self._lean.both)

    def plain(self, inputs: dict[str, Any]) -> GuidedUNet:
        """A network whose inputs are as `encode` gives them."""
        return GuidedUNet(self._plain, inputs)

    def fast(self, inputs: dict[str, Any]) -> GuidedUNet:
        """The fastest network there is."""
        if self._lean is None:
            return self.plain(inputs)
        text = self._lean.text(inputs["encoder_hidden_states"])
        return GuidedUNet(self._one, {**inputs, "encoder_hidden_states": text}, self._both)


def memory_format(unet: torch.nn.Module) -> torch.memory_format:
    """That of the UNet's convolutions, in which it also returns its prediction."""
    weight = unet.conv_in.weight
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


class GuidedUNet:
    """A UNet and the encoded prompts of one batch, as the `Network` of the loop.

    unet:   the pipeline's, or the same compiled.
    inputs: its keyword arguments, from `encode`.
    both:   what is called for both halves at once; None for `unet`.
    """

    def __init__(self, unet: Callable[..., Any], inputs: dict[str, Any], both: Callable[..., Any] | None = None):
        self.unet, self.both = unet, unet if both is None else both
        batch = len(inputs["encoder_hidden_states"]) // 2
        halves = {"uncond": slice(0, batch), "cond": slice(batch, None), "both": slice(None)}
        self.inputs = {branch: _rows(inputs, rows) for branch, rows in halves.items()}

    def select(self, index: Tensor) -> GuidedUNet:
        """The same for some samples of the batch, `index` (N,) int64."""
        batch = len(self.inputs["cond"]["encoder_hidden_states"])
        return GuidedUNet(self.unet, _rows(self.inputs["both"], torch.cat([index, index + batch])), self.both)

    def load(self, inputs: dict[str, Any]) -> None:
        """Put other prompts in the place of those given at first, in the same memory."""
        for old, new in zip(_tensors(self.inputs["both"]), _tensors(inputs), strict=True):
            old.copy_(new)

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
        unet = self.both if branch == "both" else self.unet
        return unet(latents, timesteps, **self.inputs[branch], return_dict=False)[0]


def _rows(inputs: dict[str, Any], rows: slice | Tensor) -> dict[str, Any]:
    return {name: _rows(value, rows) if isinstance(value, dict) else value[rows] for name, value in inputs.items()}


def _tensors(inputs: dict[str, Any]) -> Iterator[Tensor]:
    for value in inputs.values():
        yield from _tensors(value) if isinstance(value, dict) else (value,)


def encode(pipe: DiffusionPipeline, prompts: list[str], negative: list[str] | None, height: int, width: int) -> dict[str, Any]:
    """The UNet's keyword arguments for the unconditional half followed by the conditional one."""
    encoded = pipe.encode_prompt(
        prompt=prompts,
        device=pipe.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negative,
    )
    cond, uncond = encoded[:2]
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.cat([uncond, cond])}
    if isinstance(pipe, StableDiffusionXLPipeline):
        pooled, negative_pooled = encoded[2:]
        size = (height, width)
        ids = pipe._get_add_time_ids(size, (0, 0), size, cond.dtype, pipe.text_encoder_2.config.projection_dim)
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.cat([negative_pooled, pooled]),
            "time_ids": ids.to(pipe.device).repeat(2 * len(prompts), 1),
        }
    return inputs


def decode(pipe: DiffusionPipeline, latents: Tensor, output: str) -> Any:
    """Images from latents as the pipeline itself makes them, its safety checker and watermark included."""
    vae = pipe.vae
    # SDXL's autoencoder overflows in float16
    upcast = isinstance(pipe, StableDiffusionXLPipeline) and vae.dtype == torch.float16 and vae.config.force_upcast
    try:
        if upcast:
            vae.to(torch.float32)
        images = vae.decode(_unscaled(vae.config, latents).to(vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    flagged = None
    if getattr(pipe, "safety_checker", None) is not None:
        images, flagged = pipe.run_safety_checker(images, pipe.device, latents.dtype)
    if getattr(pipe, "watermark", None) is not None:
        images = pipe.watermark.apply_watermark(images)
    denormalize = None if flagged is None else [not flag for flag in flagged]
    return pipe.image_processor.postprocess(images, output_type=output, do_denormalize=denormalize)


def _unscaled(config: Any, latents: Tensor) -> Tensor:
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return latents / config.scaling_factor
    mean, std = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
    return latents * std / config.scaling_factor + mean
