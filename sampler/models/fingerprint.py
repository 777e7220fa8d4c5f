"""A fingerprint that identifies the model of a measurement. It is cheap to compute from any loaded pipeline.

It has three fields for each part that decides predictions: the denoiser and the text encoders.

    form:   SHA-256 of the names and shapes of its tensors, and of the settings in its configuration that differ from the
            defaults of its class. (A newer diffusers adds settings, with defaults.)
    sample: the middle number of each of up to SAMPLED tensors, spread evenly over the part.
    dtype:  of the tensors. Samples of one dtype must be equal; those of two, equal to the precision of the coarser one.

A fine-tuned model differs from its base model, and a model with a LoRA differs from the model without it. A copy under another
name, on another device or in another dtype counts as the same model.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
SAMPLED = 48


def fingerprint(pipe: DiffusionPipeline) -> dict[str, dict[str, Any]]:
    """The fingerprint of a pipeline as it is now, by part; plain data that json can write."""
    return {name: _part(part) for name in PARTS if isinstance(part := getattr(pipe, name, None), nn.Module)}


def digest(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the SHA-256 of a fingerprint in hexadecimal. It changes with the dtype."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def differing(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The parts in which two fingerprints differ; none for the same model."""
    return [name for name in PARTS if not _same(one.get(name), other.get(name))]


def another_model(measured: Mapping[str, Mapping[str, Any]], pipe: DiffusionPipeline) -> str | None:
    """Return the warning for a calibration that was measured on another model than `pipe`; None for the same model."""
    if not measured or not (other := differing(measured, fingerprint(pipe))):
        return None
    reason = f"the calibration was made on another model (its {', '.join(other)} differ)"
    return f"{reason}: what is ordinary here may be something else; calibrate this one"


def another_size(measured: Sequence[int] | None, size: Sequence[int]) -> str | None:
    """Return the warning for a calibration that was measured on pictures of another (height, width); None for the same."""
    if measured is None or measured == size:
        return None
    reason = f"made for pictures of {measured[0]} x {measured[1]} pixels, and these have {size[0]} x {size[1]}"
    return f"the calibration was {reason}: calibrate for those (--option height={size[0]} --option width={size[1]})"


def mismatches(
    model: Mapping[str, Mapping[str, Any]], pipe: DiffusionPipeline, of: Sequence[int] | None, size: Sequence[int]
) -> set[tuple[str, str]]:
    """Return a (digest of the calibration's `model`, warning) for its model, and for its size `of`, where they differ."""
    return {(digest(model), text) for text in (another_model(model, pipe), another_size(of, size)) if text}


def _part(part: nn.Module) -> dict[str, Any]:
    # Prefixes of the same weights: "text_model." under another version of transformers, "_orig_mod." when compiled.
    tensors = {name.removeprefix("_orig_mod.").removeprefix("text_model."): x for name, x in part.named_parameters()}
    form = json.dumps(
        [_chosen(part), {name: list(x.shape) for name, x in sorted(tensors.items())}], sort_keys=True, default=str
    )
    names = sorted(tensors)
    picked = [tensors[names[i * len(names) // SAMPLED]] for i in range(SAMPLED)] if len(names) > SAMPLED else tensors.values()
    return {
        "form": hashlib.sha256(form.encode()).hexdigest(),
        "sample": [float(x.detach().reshape(-1)[x.numel() // 2]) for x in picked if not x.is_meta],  # meta: offloaded to disk
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    }


def _chosen(part: nn.Module) -> dict[str, Any]:
    """The settings of a diffusers model that are not defaults; nothing for a part of transformers."""
    known = inspect.signature(type(part).__init__).parameters
    config = part.config if isinstance(part.config, Mapping) else {}
    return {name: value for name, value in config.items() if name in known and value != known[name].default}


def _same(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    if one["form"] != other["form"] or len(one["sample"]) != len(other["sample"]):
        return one["form"] == other["form"]  # of tensors that are offloaded to disk the form alone is known
    mine, others = (torch.tensor(part["sample"], dtype=torch.float64) for part in (one, other))
    if one["dtype"] == other["dtype"]:
        return torch.equal(mine, others)
    kinds = [torch.finfo(getattr(torch, part["dtype"])) for part in (one, other)]
    coarsest, least = max(kind.eps for kind in kinds), max(kind.smallest_normal * kind.eps for kind in kinds)
    return torch.allclose(mine, others, rtol=coarsest, atol=least)
