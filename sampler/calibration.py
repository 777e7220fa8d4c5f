"""What is ordinary on a model: the noise gaps of prompts that it did not memorize, and the thresholds of a guard from them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

from torch import Tensor
from tqdm import tqdm

from . import arguments
from .fingerprint import differing, fingerprint
from .folder import settings_of, whole
from .guidance import Guidance, Rung
from .interpolation import curve, interpolated, sound
from .models import located
from .ordinary import Ordinary, unguided
from .progress import FORMAT, moving
from .remembered import Remembered
from .sampler import Sampler
from .transitions import At, Settled

log = logging.getLogger(__name__)
FEW = 50  # prompts that thresholds cannot rest on
FILE = "calibration.json"  # beside the model_index.json of the model it belongs to
LADDER = (720.0,) * 5 + (680.0, 680.0, 640.0)  # delays of the attempts after the plain one


def ladder(scale: float) -> list[Guidance]:
    """The attempts that a guard makes after the plain one, each more careful: guidance held back until lower timesteps."""
    return [Guidance.delayed(scale, until=At(timestep)) for timestep in LADDER]


@dataclass(frozen=True)
class Calibration:
    """What is ordinary on one model, under one scheduler, number of steps and scale.

    settings: what was measured on: the scheduler, dtype, device and versions, and the model's name.
    steps, scale: of the runs. images: how many there were. rate, strict, lost: see `measure`.
    rungs: the attempts of a guard with their usual gaps and thresholds, the plain one first.
    model: the model's `fingerprint`. ordinary: what else is ordinary. Neither is there in a calibration made by hand.
    """

    settings: dict[str, Any]
    steps: int
    scale: float
    images: int
    rate: float
    strict: float
    lost: float
    rungs: tuple[Rung, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    ordinary: Ordinary | None = None

    @classmethod
    def measure(
        cls,
        sampler: Sampler,
        prompts: Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int = 50,
        scale: float = 7.5,
        rungs: Sequence[Guidance] | None = None,
        rate: float = 0.03,
        strict: float = 0.4,
        lost: float = 0.15,
        batch_size: int = 16,
        progress: bool = True,
        resume: str | Path | None = None,
    ) -> Calibration:
        """Sample ordinary prompts, plainly, unguided and under every rung, and take what is usual from their noise gaps.

        prompts: that the model has not memorized; a hundred or more, so that the thresholds are known well.
        seeds:   one a prompt, or one for the first prompt, counted up from there.
        rungs:   the attempts after the plain one, delayed or opposite; None: `ladder`.
        rate:    the share of ordinary samples that a guard begins again, a quarter of it by their first gaps, at the end a
                 quarter by their peak and half by their score.
        strict:  the share of ordinary attempts after the plain one that are judged suspect: what was begun again is looked at
                 more closely. It falls evenly to half of it at the last, which is the least likely to be a copy.
        lost:    the share of ordinary later attempts that are begun again for gaps that are too small.
        resume:  a file that keeps every sample's gaps when they are known, and from which a run that was stopped goes on.

        Raises ValueError for bad arguments, and for guidance that leaves the first or the last steps without a noise gap.
        """
        prompts = arguments.texts("prompts", prompts)
        if len(prompts) < 2:
            raise ValueError(f"prompts must be two at least, and a hundred for thresholds that are known well; got {prompts}")
        if len(prompts) < FEW:
            log.warning(
                "%d prompts are few: the thresholds are guesses, and a hundred prompts make them known well", len(prompts)
            )
        for name, given in (("rate", rate), ("strict", strict), ("lost", lost)):
            if not 0 < arguments.share(name, given) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {given!r}")
        size = arguments.at_least_one("batch_size", batch_size)
        tasks = list(zip(prompts, arguments.seeds(seeds, len(prompts)), strict=True))
        attempts = [Guidance.cfg(scale), *(ladder(scale) if rungs is None else rungs)]
        free = unguided(sampler.solver(steps).steps)
        settings = {"model": Path(str(sampler.pipe.config.get("_name_or_path", ""))).name, **settings_of(sampler)}
        settings |= {"size": list(sampler.size())} | ({"options": dict(sampler.options)} if sampler.options else {})
        model = fingerprint(sampler.pipe)
        runs = list(dict.fromkeys([attempts[0], free, *attempts[1:]]))
        with (
            Remembered(resume, {"tasks": tasks, "steps": steps, "model": model, **settings}) as kept,
            tqdm(
                total=len(tasks) * len(runs), unit="image", desc="calibrating", bar_format=FORMAT, disable=not progress
            ) as bar,
        ):
            measured = {guidance: _gaps(sampler, tasks, steps, guidance, size, bar, kept) for guidance in runs}
        levels = tuple(round(level, 3) for level in sampler.solver(steps).levels)
        plain, *later = attempts
        found = [
            _rung(plain, measured[plain], levels, rate, 0.0),
            *(_rung(g, measured[g], levels, strict * (1 - i / (2 * len(later))), lost) for i, g in enumerate(later)),
        ]
        ordinary = Ordinary.of(measured[plain], measured[free], levels)
        shares = float(rate), float(strict), float(lost)
        return cls(settings, steps, float(scale), len(tasks), *shares, tuple(found), model, ordinary)

    def at(self, scale: float, rungs: Sequence[Guidance] | None = None) -> tuple[Rung, ...]:
        """The rungs of a guard at this scale: the plain one, and after it all, or these. Raises ValueError for any other."""
        if scale != self.scale:
            raise ValueError(f"scale is {scale!r}, but the calibration was made at {self.scale:g}: measure another")
        if rungs is None:
            return self.rungs
        known = {rung.guidance: rung for rung in reversed(self.rungs[1:])}  # the strictest of each
        missing = [guidance for guidance in rungs if guidance not in known]
        if missing:
            raise ValueError(f"rungs must be among {list(known)}, which were calibrated; got {missing}")
        return (self.rungs[0], *(known[guidance] for guidance in rungs))

    def fitted(self, sampler: Sampler, steps: int) -> Calibration:
        """The same over the steps of this sampler: itself where they are those that were measured, else interpolated.

        Logs a warning where the sampler's model is not the one that was measured. Raises ValueError where the steps are too far
        from those that were measured.
        """
        other = differing(self.model, fingerprint(sampler.pipe)) if self.model else []
        if other:
            log.warning(
                "the calibration was made on another model (its %s differ): what is ordinary here may be something else; "
                "calibrate this one",
                ", ".join(other),
            )
        size = self.settings.get("size", list(sampler.size()))
        if size != list(sampler.size()):
            log.warning(
                "the calibration was made for pictures of %d x %d pixels, and these have %d x %d: calibrate for those "
                "(--option height=%d --option width=%d)",
                *size,
                *sampler.size(),
                *sampler.size(),
            )
        levels, known = tuple(round(level, 3) for level in sampler.solver(steps).levels), self.rungs[0].levels
        if not known or (len(known) == len(levels) and all(abs(a - b) <= 1 for a, b in zip(known, levels, strict=True))):
            return self
        if not sound(known, levels):
            raise ValueError(
                f"thresholds are calibrated for {len(known)} steps at timesteps {known[0]:g} to {known[-1]:g}, too far from "
                f"the sampler's {len(levels)} at {levels[0]:g} to {levels[-1]:g} to interpolate: calibrate for those (--steps "
                f"{steps} and this scheduler), or choose other guidance"
            )
        rungs = tuple(interpolated(rung, levels) for rung in self.rungs)
        ordinary = self.ordinary
        if ordinary is not None:
            low, high, free = (curve(known, gap, levels) for gap in (ordinary.low, ordinary.high, ordinary.unguided))
            ordinary = replace(ordinary, low=low, high=high, unguided=free, stable=None)  # a norm is of its own steps alone
        return replace(self, steps=len(levels), rungs=rungs, ordinary=ordinary)

    def settled(self, **given: float) -> Settled:
        """The rule `Settled.over` what is usual without guidance on this model.

        Raises ValueError for a calibration that did not measure unguided gaps.
        """
        if self.ordinary is None:
            raise ValueError("the calibration has no unguided gaps, which 'settled' needs: calibrate again")
        return Settled.over(self.ordinary.unguided, **given)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        rungs = [{**vars(rung), "guidance": rung.guidance.to_dict()} for rung in self.rungs]
        text = json.dumps({**asdict(self), "rungs": rungs}, indent=1)
        with whole(Path(path)) as part:
            part.write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def beside(model: str | Path) -> Path | None:
        """The calibration in the folder of a model, or of one that ships, by its name; None without one."""
        path = Path(located(model)) / FILE
        return path if path.is_file() else None

    @classmethod
    def load(cls, path_or_name: str | Path) -> Calibration:
        """Read one from a file, or that of a pipeline that ships, by its name.

        Raises FileNotFoundError for a missing file, ValueError for one that holds something else.
        """
        path = Path(path_or_name)
        if not path.exists() and path.name == str(path_or_name) and not path.suffix:
            path = Path(located(path.name)) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"calibration {str(path_or_name)!r} does not exist")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rungs = [Rung(**{**rung, "guidance": Guidance.from_dict(rung["guidance"])}) for rung in data["rungs"]]
            ordinary = data.get("ordinary") and Ordinary(**{name: _tuples(value) for name, value in data["ordinary"].items()})
            return cls(**{**data, "rungs": tuple(rungs), "ordinary": ordinary})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"calibration {str(path)!r} is not one: {arguments.line(error)}") from error


def _tuples(value: Any) -> Any:
    """Lists that json read as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _gaps(
    sampler: Sampler,
    tasks: Sequence[tuple[str, int]],
    steps: int,
    guidance: Guidance,
    size: int,
    bar: tqdm,
    kept: Remembered,
) -> Tensor:
    """The noise gaps of all tasks, (n, steps)."""

    def sampled(index: Sequence[int]) -> Tensor:
        prompts, seeds = zip(*(tasks[i] for i in index), strict=True)
        options = {"output": "latent", "batch_size": size, "progress": moving(bar, len(index))}
        return sampler(prompts, list(seeds), steps, guidance, **options).noise_gap

    return kept(repr(guidance), len(tasks), size, sampled, bar)


def _rung(guidance: Guidance, gaps: Tensor, levels: tuple[float, ...], share: float, lost: float) -> Rung:
    """A rung whose thresholds `share` of what these gaps, (n, steps), are a sample of pass, a quarter of it the early one.

    Of the plain one another quarter passes its peak. And `lost` of it stay below the least score.
    """
    usual = gaps.nanmedian(dim=0).values.nan_to_num(0.0).tolist()
    usual = tuple(float(f"{gap:.5g}") for gap in usual)
    fifth = max(1, len(usual) // 5)
    # After a transition the first gaps say less, and there is no basin in which they would have collapsed.
    steps, later, power = (fifth, 0, 0.25) if guidance.until else (max(1, fifth // 2), fifth, 1.0)
    rung = Rung(guidance, usual, steps, math.inf, fifth, later, math.inf, power=power, levels=levels)
    score, quarter = rung.score(gaps), 0.0 if guidance.until else share / 4
    return replace(
        rung,
        early=_quantile(rung.look(gaps), 1 - share / 4),
        verdict=_quantile(score, 1 - share * 3 / 4 + quarter),
        peak=_quantile(rung.largest(gaps), 1 - quarter) if quarter else 0.0,
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
