"""What differs from model to model, one file a family: `adapt` makes of a diffusers pipeline the `Model` that the loop runs."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from .base import Decoded, Encoded, Model
from .families import FAMILIES
from .loading import load, located, shipped
from .network import Guided
from .unet import GuidedUNet

__all__ = ["FAMILIES", "Decoded", "Encoded", "Guided", "GuidedUNet", "Model", "adapt", "load", "located", "shipped"]

REPLACED = ("__call__", "prepare_latents")  # what the loop does in a pipeline's place


def adapt(pipe: DiffusionPipeline, compile: bool = False, lean: bool = False) -> Model:
    """The model of a pipeline. compile, lean: as for `Networks`.

    Raises ValueError for a pipeline that is not text-to-image guided by two predictions, and for a subclass with a loop of its
    own, which would not be run.
    """
    own = [cls for cls in type(pipe).__mro__ if cls.__module__.startswith("diffusers.")]
    family = next((cls for cls in own if cls.__name__ in FAMILIES), None)
    if family is None:
        raise ValueError(f"pipe must be one of {', '.join(FAMILIES)}, got {type(pipe).__name__}")
    changed = [name for name in REPLACED if getattr(type(pipe), name) is not getattr(family, name)]
    if changed:
        raise ValueError(
            f"pipe is a {type(pipe).__name__}, whose own {' and '.join(changed)} the sampler would not run: to go on without, "
            f"give {family.__name__}(**pipe.components)"
        )
    model = FAMILIES[family.__name__](pipe, compile, lean)
    model.check()
    return model
