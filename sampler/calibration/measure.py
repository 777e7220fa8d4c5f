"""Measuring a calibration: ordinary prompts are sampled, and their noise gaps and basin scores are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import checks
from ..guidance.guidance import Guidance
from ..models.fingerprint import fingerprint
from ..runs.measurement_cache import MeasurementCache
from ..runs.progress import moving
from ..sampler import Sampler
from . import figure
from .baseline import Baseline, unguided
from .calibration import FEW, LOOKED, Calibration
from .cost_bar import PlainRuns
from .interpolation import five_digits

log = logging.getLogger(__name__)


def calibrate(
    sampler: Sampler, prompts: Sequence[str], seeds: int | Sequence[int], out: str | Path, overwrite: bool = False, **how: Any
) -> Calibration:
    """Measure the calibration of the sampler's model, and write it to the file `out` and a plot to a `.png` file beside it.

    how: the other arguments of `Calibration.measure`. Each measured batch is kept in `out` + ".part.jsonl", so that a stopped
    run can continue.

    Raises FileExistsError, before any work, if `out` exists, unless `overwrite`; and what `Calibration.measure` raises.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"out {str(out)!r} exists: give another file, or --force to replace it (overwrite=True)")
    kept = out.with_name(out.name + ".part.jsonl")
    try:
        found = Calibration.measure(sampler, prompts, seeds, resume=kept, **how)
    except KeyboardInterrupt:
        log.warning("stopped; what was measured is in %s, and the same command goes on from there", kept)
        raise
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
    """`Calibration.measure`, whose arguments it takes."""
    prompts = checks.texts("prompts", prompts)
    if len(prompts) < 2:
        raise ValueError(f"prompts must be two at least, and {FEW} for a guard; got {prompts}")
    if len(prompts) < FEW:
        log.warning("%d pictures are few: a guard's default thresholds need %d", len(prompts), FEW)
    size = checks.at_least_one("batch_size", batch_size)
    tasks = list(zip(prompts, checks.seeds(seeds, len(prompts)), strict=True))
    solver = sampler.solver(steps)
    runs = [Guidance.cfg(scale), *([unguided(solver.steps)] if settled else [])]
    if scale in (0, 1):
        raise ValueError(f"scale is {scale:g}, at which one prediction alone is made, so there are no noise gaps to measure")
    settings = {"model": Path(sampler.source).name, **sampler.provenance}
    settings |= {"size": list(sampler.size())} | ({"options": dict(sampler.options)} if sampler.options else {})
    model = fingerprint(sampler.pipe)
    every = prompts * len(runs)
    plain = PlainRuns(sampler, solver.steps, scale, size, progress)
    with (
        MeasurementCache(resume, {"tasks": tasks, "steps": steps, "model": model, **settings}) as kept,
        plain.bar("calibrating", "pictures", len(every), 0, every[len(kept) :]) as bar,
    ):
        sampled = partial(_sampled, sampler, tasks, steps, bar)
        measures = [partial(sampler.model.finite, partial(sampled, one)) for one in runs]
        found = [kept(repr(one), len(tasks), size, measure, bar) for one, measure in zip(runs, measures, strict=True)]
    return _calibration(found, tasks, steps, scale, solver.levels, settings, model)


def _sampled(
    sampler: Sampler, tasks: Sequence[tuple[str, int]], steps: int, bar: tqdm, guidance: Guidance, index: Sequence[int]
) -> Tensor:
    """Return scores and gaps, (n, 1 + steps), of the tasks, (prompt, seed), at `index`. `bar` advances with each step."""
    prompts, seeds = [tasks[i][0] for i in index], [tasks[i][1] for i in index]
    how: dict[str, Any] = {"output": "latent", "batch_size": len(index), "progress": moving(bar, len(index))}
    out = sampler(prompts, seeds, steps, guidance, stop_after=steps, **how)  # stop_after: no warning of a missing transition
    score = sampler.judge(out.latents, prompts, seeds, batch_size=len(index)).score
    return torch.cat([score[:, None], out.noise_gap], dim=1)


def _calibration(
    found: Sequence[Tensor],
    tasks: Sequence[tuple[str, int]],
    steps: int,
    scale: float,
    levels: Sequence[float],
    settings: dict[str, Any],
    model: dict[str, Any],
) -> Calibration:
    """The calibration from scores and gaps, (n, 1 + steps), with plain guidance and, if measured, without any."""
    good = torch.stack([values.isfinite().all(dim=1) for values in found]).all(dim=0)
    for (prompt, seed), fine in zip(tasks, good.tolist(), strict=True):
        if not fine:
            log.warning("left out, since its sample is not finite: %r, seed %d", prompt, seed)
    if good.sum() < 2:
        raise ValueError(f"{int(good.sum())} of {len(tasks)} samples are finite: a calibration needs two at least")
    scores, gaps = found[0][good, 0], found[0][good, 1:]
    free = found[1][good, 1:] if len(found) > 1 else None
    usual, timesteps = five_digits(gaps.median(dim=0).values.tolist()), tuple(round(level, 3) for level in levels)
    first = (gaps / torch.tensor(usual))[:, :LOOKED]
    known = all(map(math.isfinite, timesteps)) and min(usual) > 0
    return Calibration(
        settings=settings,
        steps=steps,
        scale=float(scale),
        timesteps=timesteps if known else (),
        gap=usual if known else (),
        scores=five_digits(scores.tolist()),
        first_gaps=tuple(map(five_digits, first.tolist())) if known else ((),) * len(scores),
        model=model,
        baseline=Baseline.of(gaps, free, timesteps) if known else None,
    )
