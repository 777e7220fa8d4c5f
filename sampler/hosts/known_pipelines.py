"""The pipelines of diffusers that are known: how each asks its network for two predictions, and what it does with them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

OFF = 1.0  # the largest weight at which a pipeline asks for one prediction


@dataclass(frozen=True)
class KnownPipeline:
    """What is known of pipelines that are guided alike.

    networks:   the components that make the predictions, those that the pipeline has.
    pair:       the network is called once for each prediction; False: once for both, on a doubled batch.
    cond_first: the conditional prediction comes first.
    scale:      the argument that switches guidance on.
    shift:      how much larger the weight is than that: c + s (c - u) is u + (s + 1) (c - u).
    negated:    the pipeline needs a negative prompt for that.
    merge:      the dtype that it combines the predictions in; None: that of the predictions.
    variance:   half of the network's channels may be a learned variance, which is not guided.
    per_token:  the guided prediction gets the conditional one's norm in each token (the last dimension): whether, or the
                argument that says so.
    capped:     an argument that limits the guided prediction's norm to so many times the conditional one's.
    fixed:      arguments of the call that can be followed at one value alone, with that value.
    """

    networks: tuple[str, ...] = ("transformer",)
    pair: bool = False
    cond_first: bool = False
    scale: str = "guidance_scale"
    shift: float = 0.0
    negated: bool = False
    merge: torch.dtype | None = None
    variance: bool = False
    per_token: bool | str = False
    capped: str | None = None
    fixed: tuple[tuple[str, Any], ...] = ()

    def weight(self, scale: float) -> float:
        """The weight that the pipeline guides with at this scale: 1, the conditional prediction alone, where it is off."""
        return max(scale + self.shift, OFF)


_UNET = KnownPipeline(networks=("unet",))
_DOUBLED = KnownPipeline()
_WIDE = replace(_DOUBLED, merge=torch.float32)
_PAIR = KnownPipeline(pair=True, cond_first=True)
_TRUE_CFG = replace(_PAIR, scale="true_cfg_scale", negated=True)
_WAN = replace(_PAIR, networks=("transformer", "transformer_2"), fixed=(("guidance_scale_2", None),))

PIPELINES: Mapping[str, KnownPipeline] = {
    **dict.fromkeys(
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
        ),
        _UNET,
    ),
    "KandinskyV22Pipeline": replace(_UNET, variance=True),
    "StableDiffusion3Pipeline": replace(_DOUBLED, fixed=(("skip_guidance_layers", None),)),
    "PixArtAlphaPipeline": replace(_DOUBLED, variance=True),
    "PixArtSigmaPipeline": replace(_DOUBLED, variance=True),
    "AuraFlowPipeline": _DOUBLED,
    "SanaPipeline": replace(_WIDE, variance=True),
    "LTXPipeline": _WIDE,
    "CogVideoXPipeline": replace(_WIDE, fixed=(("use_dynamic_cfg", False),)),
    "ZImagePipeline": replace(_WIDE, cond_first=True, shift=1.0, capped="cfg_normalization", fixed=(("cfg_truncation", 1.0),)),
    "FluxPipeline": _TRUE_CFG,
    "Flux2KleinPipeline": replace(_PAIR, fixed=(("image", None),)),
    "QwenImagePipeline": replace(_TRUE_CFG, per_token=True),
    "Lumina2Pipeline": replace(_PAIR, per_token="cfg_normalization", fixed=(("cfg_trunc_ratio", 1.0),)),
    "WanPipeline": _WAN,
    "ChromaPipeline": _PAIR,
    "HunyuanVideoPipeline": _TRUE_CFG,
}


def known_pipeline(pipe: Any) -> KnownPipeline:
    """Return what is known of a pipeline, by its class or one of its base classes.

    Raises ValueError for a pipeline of no known class, for one whose `__call__` does not name the scale, and for a distilled
    network, which makes one prediction.
    """
    names = [made.__name__ for made in type(pipe).__mro__]
    name = next((name for name in names if name in PIPELINES), None)
    if name is None:
        guided = "give it a guider, basinescape.hosts.modular.BasinEscapeGuidance" if hasattr(pipe, "guider") else ""
        raise ValueError(
            f"pipe is a {names[0]}, which is not among those whose two predictions are known ({', '.join(PIPELINES)}): "
            f"{guided or 'guide in a loop of your own with Escape'}"
        )
    known = PIPELINES[name]
    if known.scale not in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(
            f"pipe's {names[0]}.__call__ does not name {known.scale}, so its arguments cannot be followed: give it those of "
            f"{name}, or take a {name}"
        )
    network = network_of(pipe, known)
    if getattr(network.config, "time_cond_proj_dim", None) is not None or pipe.config.get("is_distilled", False):
        raise ValueError(f"pipe's {type(network).__name__} is distilled: it makes one prediction, guidance needs two")
    return known


def network_of(pipe: Any, known: KnownPipeline) -> Any:
    """The first of a pipeline's networks, a module of diffusers."""
    return next(getattr(pipe, name) for name in known.networks if getattr(pipe, name, None) is not None)
