"""What the servers share: how a request names its guidance, and the noise levels of a scheduler's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..guidance.guard import PROBES, THRESHOLD, Attempt, Guard
from ..guidance.guidance import Guidance
from ..schedulers.schedule import levels, log_snrs

KEY = "basinescape"  # the name under which a request says what it asks for


@dataclass(frozen=True)
class Asked:
    """What a request asks for: the guidance of its pictures, and whether they are judged. A guard's always are.

    Raises ValueError for anything else.
    """

    guidance: Guidance | Guard
    judge: bool = False

    @classmethod
    def by(cls, named: Mapping[str, Any]) -> Asked:
        """What a request has named under KEY."""
        unknown = set(named) - {"guidance", "judge"}
        if unknown or "guidance" not in named or not isinstance(named.get("judge", False), bool):
            raise ValueError(f"{KEY} takes guidance (see Guidance.to_dict) and judge (true or false), got {dict(named)!r}")
        guidance = Guidance.from_dict(named["guidance"])
        return cls(guidance, named.get("judge", False) or isinstance(guidance, Guard))

    @property
    def attempts(self) -> Sequence[Attempt]:
        """Those of a guard; plain guidance is the only one."""
        return self.guidance.attempts if isinstance(self.guidance, Guard) else [Attempt(self.guidance, THRESHOLD, PROBES)]


def noise_levels(scheduler: Any, timesteps: Sequence[float] | Tensor) -> tuple[Any, Tensor | None]:
    """(timesteps in 0..1000, log SNRs) of the steps of a run, for `Escape`; None for log SNRs that are not known.

    timesteps: of the steps that are taken. A part of the scheduler's own is taken as it is.
    """
    if len(scheduler.timesteps) != len(timesteps) or (known := levels(scheduler)) is None:
        return timesteps, None
    return known, log_snrs(scheduler)
