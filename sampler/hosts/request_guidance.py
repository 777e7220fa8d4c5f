"""How a request to a server names its guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..guidance.guard import PROBES, THRESHOLD, Attempt, Guard
from ..guidance.guidance import Guidance

KEY = "basinescape"  # the name under which a request says what it asks for


@dataclass(frozen=True)
class RequestGuidance:
    """What a request asks for: the guidance of its pictures, and whether they are judged. A guard's always are.

    Raises ValueError for anything else.
    """

    guidance: Guidance | Guard
    judge: bool = False

    @classmethod
    def by(cls, named: Mapping[str, Any]) -> RequestGuidance:
        """Return what a request asks for. named: its value under KEY."""
        unknown = set(named) - {"guidance", "judge"}
        if unknown or "guidance" not in named or not isinstance(named.get("judge", False), bool):
            raise ValueError(f"{KEY} takes guidance (see Guidance.to_dict) and judge (true or false), got {dict(named)!r}")
        guidance = Guidance.from_dict(named["guidance"])
        return cls(guidance, named.get("judge", False) or isinstance(guidance, Guard))

    @property
    def attempts(self) -> Sequence[Attempt]:
        """A guard's attempts; other guidance is one attempt."""
        return self.guidance.attempts if isinstance(self.guidance, Guard) else [Attempt(self.guidance, THRESHOLD, PROBES)]


def check_one_scale(sampling: Any) -> None:
    """Raise ValueError for a request with another scale for a model's second network."""
    if sampling.guidance_scale_2 not in (None, sampling.guidance_scale):
        raise ValueError("guidance_scale_2 is not followed: guidance that varies over time is Guidance's shape and interval")
