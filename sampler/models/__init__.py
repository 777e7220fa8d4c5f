"""Adapters, one file a family of models: `adapt` turns a diffusers pipeline into the `Model` that the loop runs."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from .autoencoding import Decoded
from .encoded_text import Encoded
from .loading import load, located, shipped
from .model import Model
from .network import PromptedNetwork
from .registry import ADAPTERS
from .sd import PromptedUNet

__all__ = ["ADAPTERS", "Decoded", "Encoded", "Model", "PromptedNetwork", "PromptedUNet", "adapt", "load", "located", "shipped"]

REPLACED = ("__call__", "prepare_latents")  # methods of a pipeline that the loop replaces


def adapt(pipe: DiffusionPipeline, compile: bool = False, lean: bool = False) -> Model:
    """The model of a pipeline. compile, lean: see `Networks`.

    Raises ValueError for a pipeline that is not text-to-image guided by two predictions, and for a subclass that overrides a
    method in REPLACED, because the sampler would not call it.
    """
    own = [cls for cls in type(pipe).__mro__ if cls.__module__.startswith("diffusers.")]
    known = next((cls for cls in own if cls.__name__ in ADAPTERS), None)
    if known is None:
        raise ValueError(f"pipe must be one of {', '.join(ADAPTERS)}, got {type(pipe).__name__}")
    changed = [name for name in REPLACED if getattr(type(pipe), name) is not getattr(known, name)]
    if changed:
        raise ValueError(
            f"pipe is a {type(pipe).__name__}, whose own {' and '.join(changed)} the sampler would not run: to go on without, "
            f"give {known.__name__}(**pipe.components)"
        )
    model = ADAPTERS[known.__name__](pipe, compile, lean)
    model.check()
    return model
