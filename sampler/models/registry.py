"""The adapters by the pipelines they are for. A new model is one adapter file and one entry here."""

from __future__ import annotations

from .flux import Flux
from .model import Model
from .pixart import PixArtSigma
from .qwen import QwenImage
from .sd import StableDiffusion
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .wan import Wan

# By the name of diffusers' class. To look a class up would import it, and all that it needs.
ADAPTERS: dict[str, type[Model]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "PixArtSigmaPipeline": PixArtSigma,
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
    "WanPipeline": Wan,
}
