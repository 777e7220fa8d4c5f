"""A calibration made for a model: what the sampler measures, the stable region that `methods.update` needs, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from basinescape import Calibration, Sampler
from basinescape.folder import settings_of
from basinescape.models import located
from basinescape.progress import FORMAT
from basinescape.remembered import Remembered
from torch import Tensor
from tqdm import tqdm

from ..methods import update
from . import figures

ORDINARY = "ordinary.jsonl"  # beside a model whose ordinary prompts are not photographic captions
CAPTIONS = Path(__file__).parents[1] / "captions.jsonl"  # those, about 200


def prompts_for(model: str) -> Path:
    """The prompts that are ordinary on a model: its own list of them where its folder has one, else CAPTIONS."""
    own = Path(located(model)) / ORDINARY
    return own if own.is_file() else CAPTIONS


def calibrate(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    steps: int,
    scale: float,
    settled: bool,
    batch_size: int,
    progress: bool,
) -> Calibration:
    """Write the calibration of the sampler's model to `out`, and its plot beside it, as `.png`.

    settled: also what `Settled` and the method "update-norm" need.

    What is measured is kept in `out` + ".part.jsonl" until all of it is, so that a run that was stopped goes on where it was.

    Raises what `Calibration.measure` does, before any work.
    """
    out = Path(out)
    kept = out.with_name(out.name + ".part.jsonl")
    options: dict[str, Any] = {"settled": settled, "batch_size": batch_size, "progress": progress, "resume": kept}
    found = Calibration.measure(sampler, prompts, seeds, steps, scale, **options)
    if settled and found.ordinary is not None:
        stable = _stable(sampler, prompts, seeds, steps, scale, batch_size, progress, out)
        found = replace(found, ordinary=replace(found.ordinary, stable=stable))
    found.save(out)
    figures.calibration(found, out.with_suffix(".png"))
    for path in (kept, _norms(out)):
        path.unlink(missing_ok=True)
    return found


def _norms(out: Path) -> Path:
    return out.with_name(out.name + ".norms.part.jsonl")


def _stable(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    scale: float,
    size: int,
    progress: bool,
    out: Path,
) -> dict[str, list[list[float]]] | None:
    """Mean and standard deviation of the norms of each plainly guided step; None for a scheduler that they are not known of."""
    try:
        update.alphas(sampler, steps)
    except ValueError:
        return None

    def measured(index: Sequence[int]) -> Tensor:
        texts, own = [prompts[i] for i in index], [seeds[i] for i in index]
        return update.measured(sampler, texts, own, steps, scale).permute(2, 0, 1)

    run = {"prompts": list(prompts), "seeds": list(seeds), "steps": steps, "scale": scale, **settings_of(sampler)}
    run |= {"size": sampler.size(), "options": sampler.options}
    with (
        Remembered(_norms(out), run) as kept,
        tqdm(total=len(prompts), desc="stable region", bar_format=FORMAT, disable=not progress) as bar,
    ):
        norms = kept("norms", len(prompts), size, measured, bar)
    region = torch.stack([norms.mean(dim=0), norms.std(dim=0)], dim=-1)
    return {name: [[round(v, 4) for v in step] for step in of.tolist()] for name, of in zip(update.NORMS, region, strict=True)}
