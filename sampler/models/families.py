"""Which adapter a pipeline has."""

from __future__ import annotations

from .family import Family
from .flux import Flux
from .pixart import PixArtSigma
from .qwen import QwenImage
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .wan import Wan

# By the name of diffusers' class: to look a class itself up imports it, and all that it needs.
FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "PixArtSigmaPipeline": PixArtSigma,
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
    "WanPipeline": Wan,
}
