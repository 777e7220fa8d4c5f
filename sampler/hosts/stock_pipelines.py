"""What is known of diffusers' pipelines: how each asks its network for the two predictions, and what it does with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class StockPipeline:
    """Pipelines that are guided alike.

    networks:   the components that make the predictions, those that the pipeline has.
    pair:       the network is called once for each prediction; False: once for both, on a doubled batch.
    cond_first: the conditional prediction comes first.
    scale:      the argument that switches guidance on.
    negated:    the pipeline needs a negative prompt for that.
    merge:      the dtype that it combines the predictions in; None: that of the predictions.
    variance:   half of the network's channels may be a learned variance, which is not guided.
    per_token:  the guided prediction gets the conditional one's norm in each token (the last dimension): whether, or the
                argument that says so.
    capped:     an argument that limits the guided prediction's norm to so many times the conditional one's.
    only:       arguments of the call whose other values cannot be followed, with the one that can.
    """

    networks: tuple[str, ...] = ("transformer",)
    pair: bool = False
    cond_first: bool = False
    scale: str = "guidance_scale"
    negated: bool = False
    merge: torch.dtype | None = None
    variance: bool = False
    per_token: bool | str = False
    capped: str | None = None
    only: tuple[tuple[str, Any], ...] = ()


_UNET = StockPipeline(networks=("unet",))
_DOUBLED = StockPipeline()
_WIDE = replace(_DOUBLED, merge=torch.float32)
_PAIR = StockPipeline(pair=True, cond_first=True)
_TRUE_CFG = replace(_PAIR, scale="true_cfg_scale", negated=True)
_WAN = replace(_PAIR, networks=("transformer", "transformer_2"), only=(("guidance_scale_2", None),))

STOCK_PIPELINES: Mapping[str, StockPipeline] = {
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
    "StableDiffusion3Pipeline": replace(_DOUBLED, only=(("skip_guidance_layers", None),)),
    "PixArtAlphaPipeline": replace(_DOUBLED, variance=True),
    "PixArtSigmaPipeline": replace(_DOUBLED, variance=True),
    "AuraFlowPipeline": _DOUBLED,
    "SanaPipeline": replace(_WIDE, variance=True),
    "LTXPipeline": _WIDE,
    "CogVideoXPipeline": replace(_WIDE, only=(("use_dynamic_cfg", False),)),
    "ZImagePipeline": replace(_WIDE, cond_first=True, capped="cfg_normalization", only=(("cfg_truncation", 1.0),)),
    "FluxPipeline": _TRUE_CFG,
    "Flux2KleinPipeline": replace(_PAIR, only=(("image", None),)),
    "QwenImagePipeline": replace(_TRUE_CFG, per_token=True),
    "Lumina2Pipeline": replace(_PAIR, per_token="cfg_normalization", only=(("cfg_trunc_ratio", 1.0),)),
    "WanPipeline": _WAN,
    "ChromaPipeline": _PAIR,
    "HunyuanVideoPipeline": _TRUE_CFG,
}


def stock_pipeline_of(pipe: Any) -> StockPipeline:
    """What is known of a pipeline, by its class or the class that this one was made from.

    Raises ValueError for a pipeline that is of none, and for a network that knows no guidance by two predictions.
    """
    names = [made.__name__ for made in type(pipe).__mro__]
    stock = next((STOCK_PIPELINES[name] for name in names if name in STOCK_PIPELINES), None)
    if stock is None:
        guided = "give it a guider, basinescape.hosts.modular.BasinEscapeGuidance" if hasattr(pipe, "guider") else ""
        raise ValueError(
            f"pipe is a {names[0]}, which is not among those whose two predictions are known ({', '.join(STOCK_PIPELINES)}): "
            f"{guided or 'guide in a loop of your own with Escape'}"
        )
    network = network_of(pipe, stock)
    distilled = getattr(network.config, "time_cond_proj_dim", None) is not None or pipe.config.get("is_distilled", False)
    if distilled:
        raise ValueError(f"pipe's {type(network).__name__} is distilled: it makes one prediction, guidance needs two")
    return stock


def network_of(pipe: Any, stock: StockPipeline) -> Any:
    """The first of a pipeline's networks, a module of diffusers."""
    return next(getattr(pipe, name) for name in stock.networks if getattr(pipe, name, None) is not None)
