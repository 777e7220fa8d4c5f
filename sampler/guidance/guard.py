"""A guard's configuration: plain guidance first; more careful attempts follow if the picture looks like a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .. import checks
from .early import EarlyLook
from .guidance import Guidance

PROBES = 2  # noises that a picture is judged by
# The basin score above which a picture is suspect, of a plain attempt and of those after it, without a calibration.
THRESHOLD, LATER = 0.3, 0.2
# With one: the share of ordinary pictures that may begin again, and of those that are above the threshold of later attempts.
RATE, LATER_RATE = 0.01, 0.1
DELAYS = (-2.8, -2.8, -2.8, -1.9, -1.9, -1.5, -0.8)  # log SNRs until which the attempts after the plain one are delayed


@dataclass(frozen=True)
class Attempt:
    """One attempt of a guard.

    threshold: its picture is suspect where the basin score is above it.
    probes:    by how many noises the picture is judged. Each is a call of both branches.
    """

    guidance: Guidance
    threshold: float
    probes: int = PROBES

    def __post_init__(self) -> None:
        if not isinstance(self.guidance, Guidance):
            raise ValueError(f"guidance must be a Guidance, such as Guidance.from_dict(...), got {self.guidance!r}")
        object.__setattr__(self, "threshold", checks.finite("threshold", self.threshold))
        checks.at_least_one("probes", self.probes)


@dataclass(frozen=True)
class Guard:
    """Plain guidance whose pictures are judged by their basin score (see `basin_score`), with more careful attempts for copies.

    attempts: the first is plain. An attempt that is suspect is followed by the next, from the next noise of the sample's own
              generator, until one passes; the last is returned, and marked. What passes at once keeps plain guidance's bits.
    early:    gives up a hopeless plain attempt after its first steps; None: all are finished.
    model:    the fingerprint of the model that it was calibrated on, for `escape` to warn of another; None: not known, as in
              one that was read back, since `to_dict` leaves it out.

    Made by `Guidance.guard`. Raises ValueError where the first attempt is not plain, or the attempts have several rules.
    """

    attempts: tuple[Attempt, ...]
    early: EarlyLook | None = None
    model: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attempts", tuple(self.attempts))
        if not self.attempts or any(not isinstance(one, Attempt) for one in self.attempts):
            raise ValueError(f"attempts must be one or more Attempt(...), got {self.attempts!r}")
        if self.plain.until is not None:
            raise ValueError(f"the first of the attempts must be plain guidance, got {self.plain!r}")
        rules = {one.guidance.rule for one in self.attempts}
        if len(rules) > 1:
            raise ValueError(f"attempts must have one rule, got {', '.join(sorted(rules))}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Guard:
        """The inverse of `to_dict`. Raises ValueError, KeyError or TypeError for what is none."""
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
        """The same with what `change` makes of each attempt's guidance."""
        return replace(self, attempts=tuple(replace(one, guidance=change(one.guidance)) for one in self.attempts))

    def scaled(self, scale: float) -> Guard:
        """The same at another scale, without the early look, which belongs to one."""
        return replace(self.changed(lambda one: one.scaled(scale)), early=None)

    def rescaled(self, phi: float) -> Guard:
        """As `Guidance.rescaled`, every attempt."""
        return self.changed(lambda one: one.rescaled(phi))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write; `Guidance.from_dict` reads it back."""
        attempts = [{**vars(one), "guidance": one.guidance.to_dict()} for one in self.attempts]
        return {"attempts": attempts, "early": self.early and asdict(self.early)}
