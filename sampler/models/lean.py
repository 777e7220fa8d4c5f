"""A UNet that computes nothing twice under guidance: its two halves start from the same latents, and a run has one text.

The first layers, up to the first that reads the text, run for one half and are repeated; the text's keys and values, the same
in every step, are computed once a run (in float16 8 MB an image for SD 1.5, 51 MB for SDXL). Results are the UNet's own up to
rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

PLAIN = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
KNOWN = (*PLAIN, FusedAttnProcessor2_0)


class Lean:
    """`both` halves' and `one` half's forms of a UNet: copies of its modules that share its parameters.

    They take the UNet's arguments, the text as `text` makes it. On a GPU the products that `fuse` joins are copies, which
    `refresh` makes again. What else changes in the UNet is not seen.
    """

    def __init__(self, unet: UNet2DConditionModel):
        self._projections = [projection for module in _readers(unet) for projection in (module.to_k, module.to_v)]
        self.one = _twin(unet)
        _read_ready(_readers(self.one))
        self._fused = fuse(self.one) if unet.device.type == "cuda" else []
        self.both = _twin(self.one)
        for module in _before_text(self.both):
            module.forward = _repeated(module.forward)

    @staticmethod
    def suits(unet: nn.Module) -> bool:
        """Whether it is diffusers' own UNet, and nothing of somebody else's would miss a call, or see half of a batch."""
        own = type(unet) is UNet2DConditionModel
        return own and not any(map(_watched, unet.modules())) and all(type(p) in KNOWN for p in unet.attn_processors.values())

    def refresh(self) -> None:
        """Copy what `fuse` copied again, into the same memory."""
        for module in self._fused:
            parts = module.to_q, module.to_k, module.to_v
            for name in ("weight", "bias") if module.to_qkv.bias is not None else ("weight",):
                getattr(module.to_qkv, name).data.copy_(torch.cat([getattr(part, name) for part in parts]))

    def text(self, states: Tensor) -> Tensor:
        """The keys and values of all layers, (B, T, all their channels), from the text's states (B, T, D)."""
        return torch.cat([projection(states) for projection in self._projections], dim=-1) if self._projections else states


def _twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())})


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _readers(unet: UNet2DConditionModel) -> list[Attention]:
    """The layers that attend to the text; none where anything but their `to_k` and `to_v` reads it."""
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    readers = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    changed = unet.encoder_hid_proj is not None or unet.config.cross_attention_norm is not None
    others = [module for module in attentions if module.is_cross_attention and module not in readers]
    plain = all(type(module.processor) in PLAIN for module in readers)
    return [] if changed or others or not plain else readers


class _Slice(nn.Module):
    """A layer's keys or values out of those of all layers."""

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, states: Tensor) -> Tensor:
        return states[..., self.start : self.stop]


def _read_ready(readers: list[Attention]) -> None:
    start = 0
    for module in readers:
        for name in ("to_k", "to_v"):
            stop = start + getattr(module, name).out_features
            setattr(module, name, _Slice(start, stop))
            start = stop


def _before_text(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The first layers, which see latents and timestep alone."""
    found = [unet.conv_in]
    if unet.config.addition_embed_type or unet.config.class_embed_type:  # the halves' timestep embeddings differ
        return found
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", None)
        if not attentions:
            found += [*block.resnets, *(block.downsamplers or ())]
            continue
        first = attentions[0]
        if isinstance(first, Transformer2DModel):
            inner = first.transformer_blocks[0]
            found += [block.resnets[0], first.norm, first.proj_in]
            found += [] if inner.only_cross_attention else [inner.norm1, inner.attn1]
        break
    return found


def _repeated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` for the first half of the batch, its result given twice."""

    def once(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        half = len(x) // 2

        def halved(value: Any) -> Any:
            return value[:half] if isinstance(value, Tensor) else value

        result = forward(x[:half], *map(halved, arguments), **{name: halved(value) for name, value in keywords.items()})
        return torch.cat([result, result])

    return once


def fuse(unet: UNet2DConditionModel) -> list[Attention]:
    """One product for the queries, keys and values of each plain self-attention; returns these."""
    fused = []
    for module in unet.modules():
        if not isinstance(module, Attention) or module.is_cross_attention:
            continue
        linear = all(type(part) is nn.Linear for part in (module.to_q, module.to_k, module.to_v))  # no adapter
        if type(module.processor) is AttnProcessor2_0 and linear:
            module.fuse_projections()
            module.set_processor(FusedAttnProcessor2_0())
            fused.append(module)
    return fused
