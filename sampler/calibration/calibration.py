"""What is ordinary on a model: the basin scores and first noise gaps of prompts that it did not memorize."""

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
from ..runs.atomic import whole
from ..sampler import Sampler
from .fingerprint import differing, fingerprint
from .interpolation import curve, sound
from .ordinary import Ordinary

log = logging.getLogger(__name__)
FEW = math.ceil(2 / RATE) - 1  # pictures that a guard's thresholds at its default rate need
FILE = "calibration.json"  # beside the model_index.json of the model it belongs to
LOOKED = 10  # first steps at most whose gaps are kept
EARLY = 0.1  # the share of the steps that a guard looks at early


@dataclass(frozen=True)
class Calibration:
    """What is ordinary on one model, under one scheduler, number of steps and scale, of n plainly guided pictures.

    settings:  what was measured on: the scheduler, dtype, device and versions, size and options, and the model's name.
    steps, scale: of the runs.
    timesteps: of the steps, in 0..1000. gap: the usual noise gap of each; both empty where only scores are known.
    scores:    (n) the basin scores.
    looks:     (n, LOOKED or fewer) the first noise gaps of each, relative to what is usual.
    model:     the model's `fingerprint`. ordinary: what else is ordinary. Neither is there in a calibration made by hand.

    Raises ValueError for numbers that are not finite: a threshold made of them would let everything pass.
    """

    settings: Mapping[str, Any]
    steps: int
    scale: float
    timesteps: tuple[float, ...]
    gap: tuple[float, ...]
    scores: tuple[float, ...]
    looks: tuple[tuple[float, ...], ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    ordinary: Ordinary | None = None

    def __post_init__(self) -> None:
        for name in ("timesteps", "gap", "scores"):
            object.__setattr__(self, name, tuple(checks.finite(name, value) for value in getattr(self, name)))
        looks = tuple(tuple(checks.finite("looks", value) for value in one) for one in self.looks)
        object.__setattr__(self, "looks", looks)
        if len(self.looks) != len(self.scores) or len(self.timesteps) != len(self.gap):
            raise ValueError(
                f"looks must be as many as scores, and timesteps as gap; got {len(self.looks)} and {len(self.scores)}, "
                f"{len(self.timesteps)} and {len(self.gap)}"
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
        """Sample ordinary prompts plainly, and take what is usual from their basin scores and noise gaps.

        prompts: that the model has not memorized; FEW or more, or a guard cannot be made of them at its default rate.
        seeds:   one a prompt, or one for the first prompt, counted up from there.
        settled: also measure the gaps without guidance, which `Settled` needs; it takes twice as long.
        resume:  a file that keeps what is measured of every sample, and from which a run that was stopped goes on.

        A sample that is not finite is made again in float32 where that can help, else left out, by name.

        Raises ValueError for bad arguments, and where not even two samples are finite.
        """
        from .measure import measure  # which makes a calibration

        return measure(sampler, prompts, seeds, steps, scale, settled, batch_size, progress, resume)

    @property
    def scheduler(self) -> SchedulerMixin | None:
        """The scheduler that was measured with; None where it is not known, or this diffusers has none of its name."""
        config = dict(self.settings.get("scheduler", {}))
        made = getattr(diffusers, config.pop("class", ""), None)
        return None if made is None else made.from_config(config)

    @property
    def images(self) -> int:
        """How many pictures there were."""
        return len(self.scores)

    def threshold(self, rate: float) -> float:
        """The basin score that an ordinary picture is above with a probability of at most `rate`; see `_conformal`.

        Raises ValueError for a rate that so few pictures cannot tell.
        """
        return _conformal(self.scores, rate)

    def early(self, rate: float, scale: float) -> EarlyLook | None:
        """What gives up hopeless plain attempts, and ordinary ones with a probability of at most `rate`.

        None where no gaps are known. Raises ValueError for another scale than was calibrated, and as `threshold`.
        """
        if scale != self.scale:
            raise ValueError(f"scale is {scale!r}, but the calibration was made at {self.scale:g}: measure another")
        if not self.gap:
            return None
        steps = max(1, min(len(self.looks[0]), round(EARLY * len(self.gap))))
        return EarlyLook(self.gap, self.timesteps, steps, _conformal([sum(one[:steps]) / steps for one in self.looks], rate))

    def fitted(self, sampler: Sampler, steps: int) -> Calibration:
        """The same over the steps of this sampler: itself where they are those that were measured, else interpolated.

        Logs a warning where the sampler's model or size is not the one that was measured, and where the steps are too far from
        those for the early look, which is left out then. Scores are of no steps.
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
        levels, known = tuple(round(level, 3) for level in sampler.solver(steps).levels), self.timesteps
        if not known or (len(known) == len(levels) and all(abs(a - b) <= 1 for a, b in zip(known, levels, strict=True))):
            return self
        if not sound(known, levels):
            log.warning(
                "the first noise gaps are calibrated for %d steps at timesteps %g to %g, too far from the sampler's %d at %g "
                "to %g: no attempt is given up early; calibrate for those (--steps %d and this scheduler) to save calls",
                *(len(known), known[0], known[-1], len(levels), levels[0], levels[-1], steps),
            )
            bare = {"timesteps": (), "gap": (), "looks": ((),) * len(self.scores), "ordinary": None}
            return replace(self, steps=len(levels), **bare)
        gap, ordinary = curve(known, self.gap, levels), self.ordinary
        if ordinary is not None:
            curves = (
                curve(known, values, levels) if values else () for values in (ordinary.low, ordinary.high, ordinary.unguided)
            )
            ordinary = Ordinary(*curves, ordinary.transition)  # a norm is of its own steps alone
        return replace(self, steps=len(levels), timesteps=levels, gap=gap, ordinary=ordinary)

    def settled(self, **given: float) -> Settled:
        """The rule `Settled.over` what is usual without guidance on this model.

        Raises ValueError for a calibration that did not measure unguided gaps.
        """
        if self.ordinary is None or not self.ordinary.unguided:
            raise ValueError("the calibration has no unguided gaps of these steps, for 'settled': calibrate with --settled")
        return Settled.over(self.ordinary.unguided, **given)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(self).items())
        text = "{\n" + ",\n".join(lines) + "\n}"
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
            if not isinstance(data, dict) or not data.keys() <= {known.name for known in fields(cls)}:
                raise ValueError("its fields are not a calibration's; one of an earlier version must be measured again")
            ordinary = data.get("ordinary") and Ordinary(**{name: _tuples(value) for name, value in data["ordinary"].items()})
            return cls(**{**data, "looks": _tuples(data["looks"]), "ordinary": ordinary})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"calibration {str(path)!r} is not one: {checks.line(error)}") from error


def _conformal(values: Sequence[float], rate: float) -> float:
    """What a fresh ordinary value is above with a probability of at most `rate`: number ceil((n + 1)(1 - rate)) of n.

    Split conformal prediction (Vovk et al.; Angelopoulos & Bates, https://arxiv.org/abs/2107.07511, section 1).
    """
    rank = math.ceil((len(values) + 1) * (1 - rate) - 1e-9)
    if rank > len(values):
        needed = math.ceil(1 / rate - 1 - 1e-9)
        raise ValueError(
            f"rate is {rate:g}, which {len(values)} ordinary pictures cannot tell: calibrate with {needed} or more, or ask for "
            "a larger rate"
        )
    return sorted(values)[rank - 1]


def _tuples(value: Any) -> Any:
    """Lists that json read as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
