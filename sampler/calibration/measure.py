"""Measuring what is ordinary on a model: pictures of ordinary prompts, their noise gaps and their basin scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import checks
from ..guidance.guidance import Guidance
from ..runs.cache import MeasurementCache
from ..runs.progress import FORMAT, moving
from ..sampler import Sampler
from . import figure
from .calibration import FEW, LOOKED, Calibration
from .fingerprint import fingerprint
from .ordinary import Ordinary, short, unguided

log = logging.getLogger(__name__)


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

    What is measured is kept in `out` + ".part.jsonl" until all of it is, so that a run that was stopped goes on where it was.

    Raises what `Calibration.measure` does, before any work.
    """
    out = Path(out)
    kept = out.with_name(out.name + ".part.jsonl")
    found = measure(sampler, prompts, seeds, steps, scale, settled, batch_size, progress, resume=kept)
    found.save(out)
    figure.draw(found, out.with_suffix(".png"))
    kept.unlink(missing_ok=True)
    return found


def measure(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: int | Sequence[int],
    steps: int,
    scale: float,
    settled: bool,
    batch_size: int,
    progress: bool,
    resume: str | Path | None,
) -> Calibration:
    """As `Calibration.measure`."""
    prompts = checks.texts("prompts", prompts)
    if len(prompts) < 2:
        raise ValueError(f"prompts must be two at least, and {FEW} for a guard; got {prompts}")
    if len(prompts) < FEW:
        log.warning("%d pictures are few: a guard's default thresholds need %d", len(prompts), FEW)
    size = checks.at_least_one("batch_size", batch_size)
    tasks = list(zip(prompts, checks.seeds(seeds, len(prompts)), strict=True))
    solver = sampler.solver(steps)
    runs = [Guidance.cfg(scale), *([unguided(solver.steps)] if settled else [])]
    settings = {"model": Path(str(sampler.pipe.config.get("_name_or_path", ""))).name, **sampler.provenance}
    settings |= {"size": list(sampler.size())} | ({"options": dict(sampler.options)} if sampler.options else {})
    model = fingerprint(sampler.pipe)
    total = len(tasks) * len(runs)
    with (
        MeasurementCache(resume, {"tasks": tasks, "steps": steps, "model": model, **settings}) as kept,
        tqdm(total=total, unit="image", desc="calibrating", bar_format=FORMAT, disable=not progress) as bar,
    ):
        found = [_measured(sampler, tasks, steps, guidance, size, bar, kept) for guidance in runs]
    good = torch.stack([values.isfinite().all(dim=1) for values in found]).all(dim=0)
    for (prompt, seed), fine in zip(tasks, good.tolist(), strict=True):
        if not fine:
            log.warning("left out, since its sample is not finite: %r, seed %d", prompt, seed)
    if good.sum() < 2:
        raise ValueError(f"{int(good.sum())} of {len(tasks)} samples are finite: nothing can be said of what is ordinary")
    scores, gaps = found[0][good, 0], found[0][good, 1:]
    free = found[1][good, 1:] if settled else None
    usual, timesteps = short(gaps.median(dim=0).values.tolist()), tuple(round(level, 3) for level in solver.levels)
    looks = (gaps / torch.tensor(usual))[:, :LOOKED]
    known = all(map(math.isfinite, timesteps)) and min(usual) > 0
    return Calibration(
        settings=settings,
        steps=steps,
        scale=float(scale),
        timesteps=timesteps if known else (),
        gap=usual if known else (),
        scores=short(scores.tolist()),
        looks=tuple(map(short, looks.tolist())) if known else ((),) * len(scores),
        model=model,
        ordinary=Ordinary.of(gaps, free, timesteps) if known else None,
    )


def _measured(
    sampler: Sampler,
    tasks: Sequence[tuple[str, int]],
    steps: int,
    guidance: Guidance,
    size: int,
    bar: tqdm,
    kept: MeasurementCache,
) -> Tensor:
    """The basin score and the noise gaps of every task, (n, 1 + steps)."""

    def made(index: Sequence[int], shown: Any) -> Tensor:
        prompts, seeds = map(list, zip(*(tasks[i] for i in index), strict=True))
        out = sampler(prompts, seeds, steps, guidance, output="latent", batch_size=size, progress=shown)
        score = sampler.judge(out.latents, prompts, seeds, batch_size=size).score
        return torch.cat([score[:, None], out.noise_gap], dim=1)

    def sampled(index: Sequence[int]) -> Tensor:
        values = made(index, moving(bar, len(index)))
        again = (~values.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if again and sampler.model.half:
            with sampler.in_float32():
                values[again] = made([index[i] for i in again], False)
        return values

    return kept(repr(guidance), len(tasks), size, sampled, bar)
