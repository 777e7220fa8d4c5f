"""Networks that skip redundant work under classifier-free guidance.

Both halves of a batch have the same latents, so the layers before the first one that reads the text run for one half only. The
text is the same in every step, so its keys and values are computed once a run (in float16 they take 8 MB an image for SD 1.5,
51 MB for SDXL). The results equal the network's up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
KNOWN = (*PLAIN, "FusedAttnProcessor2_0")


class Lean:
    """Two lean copies of a network, `one` for one half of a batch and `both` for both halves. They share its parameters.

    They take the network's arguments, but the text as `text` returns it. On a GPU the weights that `fuse` joins are copied;
    `refresh` copies them again. Apart from the shared parameters, no other change of the network reaches them.

    network:    the name of diffusers' class.
    processors: the names of the attention processors that are known to work.
    """

    network: str
    processors: tuple[str, ...]

    def __init__(self, net: Any):
        self._projections: list[Any] = [projection for module in self.readers(net) for projection in (module.to_k, module.to_v)]
        self._embed: Any = self.embed(net) if self._projections else None
        self.one = _twin(net)
        if self._projections:
            self.read_ready(self.one)
        self._fused = fuse(self.one) if net.device.type == "cuda" else []
        self.both = _twin(self.one)
        for module in self.before_text(self.both):
            module.forward = _repeated(module.forward)

    @classmethod
    def suits(cls, net: Any) -> bool:
        """Whether it is diffusers' own network, without hooks or processors, which could miss calls or see half of a batch."""
        known = _is(net, cls.network) and all(_is(p, *cls.processors) for p in net.attn_processors.values())
        return known and not any(map(_watched, net.modules()))

    @staticmethod
    def readers(net: Any) -> list[nn.Module]:
        """The layers that attend to the text; [] where anything but their `to_k` and `to_v` reads it."""
        raise NotImplementedError

    @staticmethod
    def before_text(net: Any) -> list[nn.Module]:
        """The first layers, which see only latents and timestep."""
        raise NotImplementedError

    @staticmethod
    def embed(net: Any) -> nn.Module | None:
        """The layer that the text goes through before it is read; None for none."""
        return None

    def read_ready(self, net: Any) -> None:
        """Make the readers take the text in the form that `text` makes."""
        start = 0
        for module in self.readers(net):
            for name in ("to_k", "to_v"):
                stop = start + getattr(module, name).out_features
                setattr(module, name, _Slice(start, stop))
                start = stop

    def refresh(self) -> None:
        """Copy the network's weights again into those that `fuse` joined, in the same memory."""
        for module in self._fused:
            parts = module.to_q, module.to_k, module.to_v
            for name in ("weight", "bias") if module.to_qkv.bias is not None else ("weight",):
                getattr(module.to_qkv, name).data.copy_(torch.cat([getattr(part, name) for part in parts]))

    def text(self, states: Tensor) -> Tensor:
        """The keys and values of all layers, (B, T, all their channels), from the text's states (B, T, D)."""
        if not self._projections:
            return states
        states = states if self._embed is None else self._embed(states)
        return torch.cat([projection(states) for projection in self._projections], dim=-1)


class LeanUNet(Lean):
    """Lean copies of a UNet2DConditionModel."""

    network, processors = "UNet2DConditionModel", KNOWN

    @staticmethod
    def readers(net: Any) -> list[nn.Module]:
        attentions = [module for module in net.modules() if isinstance(module, Attention)]
        readers = [module for name, module in net.named_modules() if name.endswith(".attn2")]
        changed = net.encoder_hid_proj is not None or net.config.cross_attention_norm is not None
        others = [module for module in attentions if module.is_cross_attention and module not in readers]
        plain = all(_is(module.processor, *PLAIN) for module in readers)
        return [] if changed or others or not plain else readers

    @staticmethod
    def before_text(net: Any) -> list[nn.Module]:
        found = [net.conv_in]
        if net.config.addition_embed_type or net.config.class_embed_type:  # the halves' timestep embeddings differ
            return found
        for block in net.down_blocks:
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


class LeanPixArt(Lean):
    """Lean copies of a PixArtTransformer2DModel."""

    network, processors = "PixArtTransformer2DModel", KNOWN

    @staticmethod
    def readers(net: Any) -> list[nn.Module]:
        found = [block.attn2 for block in net.transformer_blocks]
        return found if all(_is(module.processor, *PLAIN) for module in found) else []

    @staticmethod
    def before_text(net: Any) -> list[nn.Module]:
        first = net.transformer_blocks[0]
        return [net.pos_embed, first.norm1, first.attn1]

    @staticmethod
    def embed(net: Any) -> nn.Module | None:
        return net.caption_projection

    def read_ready(self, net: Any) -> None:
        super().read_ready(net)
        net.caption_projection = None


class LeanWan(Lean):
    """Lean copies of a WanTransformer3DModel. One that also reads images has no readers here, so its text stays as it is."""

    network, processors = "WanTransformer3DModel", ("WanAttnProcessor",)

    @staticmethod
    def readers(net: Any) -> list[nn.Module]:
        found = [block.attn2 for block in net.blocks]
        plain = all(module.add_k_proj is None and not getattr(module, "fused_projections", False) for module in found)
        return found if plain else []

    @staticmethod
    def before_text(net: Any) -> list[nn.Module]:
        return [net.patch_embedding, net.blocks[0].norm1, net.blocks[0].attn1]

    @staticmethod
    def embed(net: Any) -> nn.Module | None:
        return net.condition_embedder.text_embedder

    def read_ready(self, net: Any) -> None:
        super().read_ready(net)
        net.condition_embedder.text_embedder = nn.Identity()


def _is(thing: object, *names: str) -> bool:
    """Whether `thing` is of one of these diffusers classes. They are given by name, because a look-up would import them."""
    return type(thing).__name__ in names and type(thing).__module__.startswith("diffusers.")


def _twin(net: Any) -> Any:
    return copy.deepcopy(net, {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())})


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _Slice(nn.Module):
    """Takes a layer's keys or values from those of all layers."""

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, states: Tensor) -> Tensor:
        return states[..., self.start : self.stop]


def _repeated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward that runs for the first half of the batch and returns its result twice."""

    def once(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        half = len(x) // 2

        def halved(value: Any) -> Any:
            return value[:half] if isinstance(value, Tensor) else value

        result = forward(x[:half], *map(halved, arguments), **{name: halved(value) for name, value in keywords.items()})
        return torch.cat([result, result])

    return once


def fuse(net: Any) -> list[Any]:
    """Fuse the query, key and value projections of each plain self-attention into one. Returns the fused attentions."""
    fused: list[Any] = []
    for module in net.modules():
        if not isinstance(module, Attention) or module.is_cross_attention:
            continue
        linear = all(type(part) is nn.Linear for part in (module.to_q, module.to_k, module.to_v))  # no adapter
        if type(module.processor) is AttnProcessor2_0 and linear:
            module.fuse_projections()
            module.set_processor(FusedAttnProcessor2_0())
            fused.append(module)
    return fused
