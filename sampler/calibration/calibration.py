"""A calibration: the basin scores and noise gaps that a model gives for ordinary prompts, those that it has not memorized."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from .. import checks
from ..guidance.early import EarlyLook
from ..guidance.guard import RATE
from ..guidance.transitions import Settled
from ..models import located
from ..runs.atomic import atomic_write
from ..sampler import Sampler
from .baseline import Baseline
from .interpolation import curve, sound

log = logging.getLogger(__name__)
FEW = math.ceil(2 / RATE) - 1  # the fewest pictures that a guard's default thresholds can be taken from
FILE = "calibration.json"  # lies beside the model_index.json of its model
LOOKED = 10  # the noise gaps of so many first steps are kept, at most
EARLY = 0.1  # the share of all steps after which a guard may give an attempt up


@dataclass(frozen=True)
class Calibration:
    """The measurements of n pictures of ordinary prompts under plain guidance, on one model, scheduler, step number and scale.

    settings:   how they were made: scheduler, dtype, device, versions, size, options, and the model's name.
    steps, scale: the number of steps and the guidance scale of each picture.
    timesteps:  the steps' timesteps, in 0..1000. gap: the median noise gap of each step. Empty if only scores are known.
    scores:     (n) the basin scores.
    first_gaps: (n, LOOKED or fewer) the noise gaps of each picture's first steps, divided by the median of the step.
    model:      the model's `fingerprint`; empty in a calibration made by hand.
    baseline:   the spread of the gaps and other usual values; None in a calibration made by hand, or where the gaps are empty.

    Raises ValueError for numbers that are not finite, because a threshold from them would let every picture pass.
    """

    settings: Mapping[str, Any]
    steps: int
    scale: float
    timesteps: tuple[float, ...]
    gap: tuple[float, ...]
    scores: tuple[float, ...]
    first_gaps: tuple[tuple[float, ...], ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        for name in ("timesteps", "gap", "scores"):
            object.__setattr__(self, name, tuple(checks.finite(name, value) for value in getattr(self, name)))
        first = tuple(tuple(checks.finite("first_gaps", value) for value in one) for one in self.first_gaps)
        object.__setattr__(self, "first_gaps", first)
        if len(self.first_gaps) != len(self.scores) or len(self.timesteps) != len(self.gap):
            raise ValueError(
                f"first_gaps must be as many as scores, and timesteps as gap; got {len(self.first_gaps)} and "
                f"{len(self.scores)}, {len(self.timesteps)} and {len(self.gap)}"
            )

    @classmethod
    def measure(
        cls,
        sampler: Sampler,
        prompts: Sequence[str],
        seeds: int | Sequence[int] = 0,
        steps: int = 50,
        scale: float = 7.5,
        settled: bool = False,
        batch_size: int = 16,
        progress: bool = True,
        resume: str | Path | None = None,
    ) -> Calibration:
        """Sample ordinary prompts with plain guidance, and keep their basin scores and noise gaps.

        prompts: two or more that the model has not memorized; a guard's default thresholds need FEW or more.
        seeds:   one a prompt, or one for the first prompt, counted up from there.
        settled: also measure the gaps without guidance, which `Settled` needs. This doubles the time.
        resume:  a file that keeps each measured batch, so that a stopped run can continue.

        A sample that is not finite is made again in float32 where the model is in half precision. If that does not help, it is
        left out, and a warning names it.

        Raises ValueError for bad arguments, and if fewer than two samples are finite.
        """
        from .measure import measure  # here, because that module imports this one

        return measure(sampler, prompts, seeds, steps, scale, settled, batch_size, progress, resume)

    @property
    def scheduler(self) -> SchedulerMixin | None:
        """The scheduler of the calibration's pictures; None in a calibration that names none.

        Raises ValueError where the installed diffusers has no scheduler of that name.
        """
        config = dict(self.settings.get("scheduler", {}))
        if not (name := config.pop("class", "")):
            return None
        if not hasattr(diffusers, name):
            raise ValueError(
                f"the calibration was made with {name}, which diffusers {diffusers.__version__} lacks: give another one "
                "(--scheduler own is the model's), or calibrate again"
            )
        return getattr(diffusers, name).from_config(config)

    @property
    def images(self) -> int:
        """The number of pictures, n."""
        return len(self.scores)

    @property
    def size(self) -> tuple[int, int] | None:
        """The (height, width) of its pictures; None in a calibration that does not say."""
        height, width = self.settings.get("size") or (0, 0)
        return (height, width) if height else None

    def threshold(self, rate: float) -> float:
        """Return the basin score that an ordinary picture exceeds with a probability of at most `rate`; see `_conformal`.

        Raises ValueError for a rate that is not between 0 and 1, or that needs more pictures.
        """
        return _conformal(self.scores, rate)

    def early(self, rate: float, scale: float) -> EarlyLook | None:
        """Return the early look of a guard. It gives up an ordinary attempt with a probability of at most `rate`.

        None where no gaps are known. Raises ValueError for another scale than the calibration's, and what `threshold` raises.
        """
        if scale != self.scale:
            raise ValueError(f"scale is {scale!r}, but the calibration was made at {self.scale:g}: measure another")
        if not self.gap:
            return None
        steps = max(1, min(len(self.first_gaps[0]), round(EARLY * len(self.gap))))
        means = [sum(one[:steps]) / steps for one in self.first_gaps]
        return EarlyLook(self.gap, self.timesteps, steps, _conformal(means, rate))

    def fitted(self, sampler: Sampler, steps: int) -> Calibration:
        """Return the calibration for the sampler's steps: itself if these were measured, else with interpolated gaps.

        Logs the warnings of `made_on`. Logs a warning and drops the gaps if the steps are too far from the measured
        ones. The scores are kept, because they do not depend on the steps.
        """
        self.made_on(sampler)
        levels, known = tuple(round(level, 3) for level in sampler.solver(steps).levels), self.timesteps
        if not known or self.has(levels):
            return self
        if not sound(known, levels):
            log.warning(
                "the first noise gaps are calibrated for %d steps at timesteps %g to %g, too far from the sampler's %d at %g "
                "to %g: they are left out, no attempt is given up early by them; calibrate for those (--steps %d and this "
                "scheduler) to save a guard's calls",
                *(len(known), known[0], known[-1], len(levels), levels[0], levels[-1], steps),
            )
            none: tuple[tuple[float, ...], ...] = ((),) * self.images
            return replace(self, steps=len(levels), timesteps=(), gap=(), first_gaps=none, baseline=None)
        baseline = self.baseline and self.baseline.fitted(known, levels)
        return replace(self, steps=len(levels), timesteps=levels, gap=curve(known, self.gap, levels), baseline=baseline)

    def has(self, levels: Sequence[float]) -> bool:
        """Whether its gaps were measured at these levels, timesteps in 0..1000."""
        pairs = zip(self.timesteps, levels, strict=False)
        return 0 < len(self.timesteps) == len(levels) and all(abs(known - level) <= 1 for known, level in pairs)

    def made_on(self, sampler: Sampler) -> bool:
        """Whether it was made on the sampler's model and picture size. Logs the warnings of `Sampler.measured_on`."""
        return sampler.measured_on(self.model, self.size)

    def settled(self, **given: float) -> Settled:
        """The rule `Settled.over` the gaps that ordinary prompts have without guidance.

        Raises ValueError where those were not measured.
        """
        if self.baseline is None or not self.baseline.unguided:
            raise ValueError("the calibration has no unguided gaps of these steps, for 'settled': calibrate with --settled")
        return Settled.over(self.baseline.unguided, **given)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, a field a line."""
        lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(self).items())
        text = "{\n" + ",\n".join(lines) + "\n}"
        with atomic_write(Path(path)) as part:
            part.write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def beside(model: str | Path) -> Path | None:
        """Return the calibration file of a model, or None. model: its folder, or the name of a shipped pipeline."""
        path = Path(located(model)) / FILE
        return path if path.is_file() else None

    @classmethod
    def load(cls, path_or_name: str | Path) -> Calibration:
        """Read a calibration. path_or_name: a file, a model's folder, or the name of a shipped pipeline.

        Raises FileNotFoundError for a missing file, ValueError for one that is no calibration.
        """
        path = cls.beside(path_or_name) or Path(path_or_name)
        if not path.is_file():
            raise FileNotFoundError(f"calibration {str(path_or_name)!r} does not exist")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or not data.keys() <= {known.name for known in fields(cls)}:
                raise ValueError("its fields are not a calibration's; one of an earlier version must be measured again")
            baseline = data.get("baseline")
            baseline = baseline and Baseline(**{name: _tuples(value) for name, value in baseline.items()})
            return cls(**{**data, "first_gaps": _tuples(data["first_gaps"]), "baseline": baseline})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"calibration {str(path)!r} is not one: {checks.line(error)}") from error


def steps_and_scale(sampler: Sampler, known: Calibration | None, steps: int | None, scale: float | None) -> tuple[int, float]:
    """Return steps and scale: the given ones, else the calibration's, else the defaults of the model's pipeline."""
    own = (sampler.model.own_steps, sampler.model.own_scale) if known is None else (known.steps, known.scale)
    return (own[0] if steps is None else steps), (own[1] if scale is None else scale)


def _conformal(values: Sequence[float], rate: float) -> float:
    """Return the bound that a new ordinary value exceeds with probability <= rate: value number ceil((n + 1)(1 - rate)) of n.

    Split conformal prediction (Vovk et al.; Angelopoulos & Bates, https://arxiv.org/abs/2107.07511, section 1).
    """
    rank = math.ceil((len(values) + 1) * (1 - checks.rate(rate)) - 1e-9)
    if rank > len(values):
        needed = math.ceil(1 / rate - 1 - 1e-9)
        raise ValueError(
            f"rate is {rate:g}, which {len(values)} ordinary pictures cannot tell: calibrate with {needed} or more, or ask for "
            "a larger rate"
        )
    return sorted(values)[rank - 1]


def _tuples(value: Any) -> Any:
    """Convert nested lists, as JSON reads them, to tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
