"""What is ordinary on a model: the noise gaps of prompts that it did not memorize, and the thresholds of a guard from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import arguments
from .folder import settings_of, whole
from .guidance import Guidance, Rung
from .sampler import Sampler
from .transitions import At

FILE = "calibration.json"  # beside the model_index.json of the model it belongs to
LADDER = (780.0, 780.0, 780.0, 720.0, 720.0, 720.0, 680.0, 680.0, 640.0)  # delays of the attempts after the plain one


def ladder(scale: float) -> list[Guidance]:
    """The attempts that a guard makes after the plain one, each more careful: guidance held back until lower timesteps."""
    return [Guidance.delayed(scale, until=At(timestep)) for timestep in LADDER]


@dataclass(frozen=True)
class Calibration:
    """What is ordinary on one model, under one scheduler, number of steps and scale.

    settings: what was measured on: the scheduler, dtype, device and versions, and the model's name.
    steps, scale: of the runs. images: how many there were. rate, strict, lost: see `measure`.
    rungs: the attempts of a guard with their usual gaps and thresholds, the plain one first.
    """

    settings: dict[str, Any]
    steps: int
    scale: float
    images: int
    rate: float
    strict: float
    lost: float
    rungs: tuple[Rung, ...]

    @classmethod
    def measure(
        cls,
        sampler: Sampler,
        prompts: Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int = 50,
        scale: float = 7.5,
        rungs: Sequence[Guidance] | None = None,
        rate: float = 0.04,
        strict: float = 0.3,
        lost: float = 0.05,
        batch_size: int = 16,
        progress: bool = True,
    ) -> Calibration:
        """Sample ordinary prompts, plainly and under every rung, and take the thresholds from their noise gaps.

        prompts: that the model has not memorized; a hundred or more, so that the thresholds are known well.
        seeds:   one a prompt, or one for the first prompt, counted up from there.
        rungs:   the attempts after the plain one, delayed or opposite; None: `ladder`.
        rate:    the share of ordinary samples that a guard begins again, a quarter of it by their first gaps.
        strict:  the share of ordinary later attempts that are judged suspect: what was begun again is looked at more closely.
        lost:    the share of ordinary later attempts that are begun again for gaps that are too small.

        Raises ValueError for bad arguments, and for guidance that leaves the first or the last steps without a noise gap.
        """
        prompts = arguments.texts("prompts", prompts)
        for name, given in (("rate", rate), ("strict", strict), ("lost", lost)):
            if not 0 < arguments.share(name, given) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {given!r}")
        size = arguments.at_least_one("batch_size", batch_size)
        tasks = list(zip(prompts, arguments.seeds(seeds, len(prompts)), strict=True))
        attempts = [Guidance.cfg(scale), *(ladder(scale) if rungs is None else rungs)]
        with tqdm(total=len(tasks) * len(set(attempts)), unit="image", desc="calibrating", disable=not progress) as bar:
            measured = {
                guidance: torch.cat(list(_gaps(sampler, tasks, steps, guidance, size, bar)))
                for guidance in dict.fromkeys(attempts)
            }
        levels = tuple(round(level, 3) for level in sampler.solver(steps).levels)
        plain, *later = attempts
        found = [
            _rung(plain, measured[plain], levels, rate, 0.0),
            *(_rung(g, measured[g], levels, strict, lost) for g in later),
        ]
        settings = {"model": Path(str(sampler.pipe.config.get("_name_or_path", ""))).name, **settings_of(sampler)}
        return cls(settings, steps, float(scale), len(tasks), float(rate), float(strict), float(lost), tuple(found))

    def at(self, scale: float, rungs: Sequence[Guidance] | None = None) -> tuple[Rung, ...]:
        """The rungs of a guard at this scale: the plain one, and after it all, or these. Raises ValueError for any other."""
        if scale != self.scale:
            raise ValueError(f"scale is {scale!r}, but the calibration was made at {self.scale:g}: measure another")
        if rungs is None:
            return self.rungs
        known = {rung.guidance: rung for rung in self.rungs[1:]}
        missing = [guidance for guidance in rungs if guidance not in known]
        if missing:
            raise ValueError(f"rungs must be among {list(known)}, which were calibrated; got {missing}")
        return (self.rungs[0], *(known[guidance] for guidance in rungs))

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        rungs = [{**vars(rung), "guidance": rung.guidance.to_dict()} for rung in self.rungs]
        text = json.dumps({**asdict(self), "rungs": rungs}, indent=1)
        with whole(Path(path)) as part:
            part.write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def beside(model: str | Path) -> Path | None:
        """The calibration in a model's folder, if there is one."""
        path = Path(model) / FILE
        return path if path.is_file() else None

    @classmethod
    def load(cls, path_or_name: str | Path) -> Calibration:
        """Read one from a file, or that of a pipeline that ships ("tiny").

        Raises FileNotFoundError for a missing file, ValueError for one that holds something else.
        """
        path = Path(path_or_name)
        if not path.exists() and path.name == str(path_or_name) and not path.suffix:
            path = Sampler.model_path(path.name) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"calibration {str(path_or_name)!r} does not exist")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rungs = [Rung(**{**rung, "guidance": Guidance.from_dict(rung["guidance"])}) for rung in data["rungs"]]
            return cls(**{**data, "rungs": tuple(rungs)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"calibration {str(path)!r} is not one: {arguments.line(error)}") from error


def _gaps(
    sampler: Sampler, tasks: Sequence[tuple[str, int]], steps: int, guidance: Guidance, size: int, bar: tqdm
) -> Iterator[Tensor]:
    """The noise gaps of all tasks, (n, steps) a batch."""
    sample = partial(sampler, steps=steps, guidance=guidance, output="latent", progress=False)
    for start in range(0, len(tasks), size):
        prompts, seeds = zip(*tasks[start : start + size], strict=True)
        yield sample(prompts, list(seeds)).noise_gap
        bar.update(len(prompts))


def _rung(guidance: Guidance, gaps: Tensor, levels: tuple[float, ...], share: float, lost: float) -> Rung:
    """A rung whose thresholds `share` of what these gaps, (n, steps), are a sample of pass, a quarter of it the early one.

    And `lost` of it stay below the least score.
    """
    usual = gaps.nanmedian(dim=0).values.nan_to_num(0.0).tolist()
    usual = tuple(float(f"{gap:.5g}") for gap in usual)
    fifth = max(1, len(usual) // 5)
    # After a transition the first gaps say less, and there is no basin in which they would have collapsed.
    steps, later, power = (fifth, 0, 0.25) if guidance.until else (max(1, fifth // 2), fifth, 1.0)
    rung = Rung(guidance, usual, steps, math.inf, fifth, later, math.inf, power=power, levels=levels)
    score = rung.score(gaps)
    return replace(
        rung,
        early=_quantile(rung.look(gaps), 1 - share / 4),
        verdict=_quantile(score, 1 - share * 3 / 4),
        lost=_quantile(score, lost) if lost else 0.0,
    )


def _quantile(values: Tensor, share: float) -> float:
    """What `share` of ordinary values are below. The logarithms on either side of the median are taken as half of a normal law.

    The tail of a hundred samples is known no better by their extremes, and the two sides differ: some prompts say little.
    """
    logs = values.double().log()
    away = logs - logs.median()
    side = away[away >= 0] if share > 0.5 else away[away <= 0]
    return round(math.exp(logs.median() + NormalDist().inv_cdf(share) * side.square().mean().sqrt()), 4)
