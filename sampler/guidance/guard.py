"""A guard's configuration: plain guidance first; more careful attempts follow if the picture looks like a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .. import checks
from .early import EarlyLook
from .guidance import Guidance

PROBES = 2  # noises that a picture is judged by
# Without a calibration: the basin scores above which a picture of the plain attempt, or of a later one, is suspect.
THRESHOLD, LATER = 0.3, 0.2
# With one: the share of ordinary pictures that may be sampled again, and the share with a score above the later threshold.
RATE, LATER_RATE = 0.01, 0.1
DELAYS = (-2.8, -2.8, -2.8, -1.9, -1.9, -1.5, -0.8)  # log SNRs of the transitions of the attempts after the plain one


@dataclass(frozen=True)
class Attempt:
    """One attempt of a guard.

    threshold: its picture is suspect if the basin score is above this.
    probes:    the number of noises that judge the picture. Each needs a call of both branches.
    """

    guidance: Guidance
    threshold: float
    probes: int = PROBES

    def __post_init__(self) -> None:
        if not isinstance(self.guidance, Guidance):
            raise ValueError(f"guidance must be a Guidance, such as Guidance.from_dict(...), got {self.guidance!r}")
        object.__setattr__(self, "threshold", checks.finite("threshold", self.threshold))
        object.__setattr__(self, "probes", checks.at_least_one("probes", self.probes))


@dataclass(frozen=True)
class Guard:
    """Plain guidance whose pictures are judged by their basin score (see `basin_score`), with more careful attempts for copies.

    attempts: the first is plain. After a suspect picture, the next attempt starts from the next noise of the sample's own
              generator. If none passes, the last is returned, marked. A picture that passes at once has plain guidance's bits.
    early:    gives up a hopeless plain attempt after its first steps; None: every attempt is finished.
    model:    the fingerprint of the model of the calibration, for a warning if another model is used; None: not known.
    size:     the (height, width) of the calibration's pictures, for a warning if others are made; None: not known.

    Made by `Guidance.guard`. Raises ValueError if the first attempt is not plain, or if rules differ between attempts.
    """

    attempts: tuple[Attempt, ...]
    early: EarlyLook | None = None
    model: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    size: tuple[int, int] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attempts", tuple(self.attempts))
        if not self.attempts or any(not isinstance(one, Attempt) for one in self.attempts):
            raise ValueError(f"attempts must be one or more Attempt(...), got {self.attempts!r}")
        if not isinstance(self.model, Mapping | None):
            raise ValueError(f"model must be a fingerprint, such as Calibration.model, got {self.model!r}")
        object.__setattr__(self, "size", self.size and tuple(self.size))
        if self.plain.until is not None:
            raise ValueError(f"the first of the attempts must be plain guidance, got {self.plain!r}")
        rules = {one.guidance.rule for one in self.attempts}
        if len(rules) > 1:
            raise ValueError(f"attempts must have one rule, got {', '.join(sorted(rules))}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Guard:
        """The inverse of `to_dict`. Raises ValueError, KeyError or TypeError for data of another form."""
        fields = dict(data)
        attempts = [Attempt(**{**one, "guidance": Guidance.from_dict(one["guidance"])}) for one in fields.pop("attempts")]
        return cls(tuple(attempts), (early := fields.pop("early")) and EarlyLook(**early), **fields)

    @property
    def plain(self) -> Guidance:
        """The guidance of the first attempt."""
        return self.attempts[0].guidance

    @property
    def scale(self) -> float:
        """The scale of the first attempt."""
        return self.plain.scale

    def changed(self, change: Callable[[Guidance], Guidance]) -> Guard:
        """A copy in which `change` is applied to each attempt's guidance."""
        return replace(self, attempts=tuple(replace(one, guidance=change(one.guidance)) for one in self.attempts))

    def scaled(self, scale: float) -> Guard:
        """A copy with another scale, and without the early look, which was measured at the old one."""
        return replace(self.changed(lambda one: one.scaled(scale)), early=None)

    def rescaled(self, phi: float) -> Guard:
        """A copy with `Guidance.rescaled` applied to every attempt."""
        return self.changed(lambda one: one.rescaled(phi))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write; `Guidance.from_dict` reads it back."""
        attempts = [{**vars(one), "guidance": one.guidance.to_dict()} for one in self.attempts]
        own: dict[str, Any] = {"attempts": attempts, "early": self.early and asdict(self.early)}
        known = {"model": self.model and dict(self.model), "size": self.size}
        return own | {name: value for name, value in known.items() if value}
