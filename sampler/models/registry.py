"""The adapters, by the name of their pipeline. A new model needs one adapter file and one entry here."""

from __future__ import annotations

from .flux import Flux
from .model import Model
from .pixart import PixArtSigma
from .qwen import QwenImage
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .wan import Wan

# The keys are the names of diffusers' classes, because importing a class imports all that it needs.
ADAPTERS: dict[str, type[Model]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "PixArtSigmaPipeline": PixArtSigma,
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
    "WanPipeline": Wan,
}
