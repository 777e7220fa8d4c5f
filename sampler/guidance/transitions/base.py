"""What a transition rule is, and the registry in which commands, hosts and files find it by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from torch import Tensor

from ..early import EarlyLook


class Criterion(NamedTuple):
    """What makes a sample leave its basin at a step, as columns of the step table; by default nothing does.

    keep:  the first minimum of the noise gap shows there, and is at most `keep` times the largest gap before it.
    limit: the gap is at most `limit`; infinity: every sample leaves.
    fall:  the gap is below `fall` times the largest gap before it.
    wait:  steps from there to the transition.
    """

    keep: float = -math.inf
    limit: float = -math.inf
    fall: float = 0.0
    wait: int = 0


NEVER, ALWAYS = Criterion(), Criterion(limit=math.inf)
MEASURED = Criterion(limit=-1.0)  # no gap is as small: the step measures the gap and decides nothing by itself


class Calibrated(Protocol):
    """What guidance may ask of a calibration; `calibration.Calibration` has it."""

    @property
    def model(self) -> Mapping[str, Any]: ...

    def settled(self, **given: float) -> Transition: ...

    def threshold(self, rate: float) -> float: ...

    def early(self, rate: float, scale: float) -> EarlyLook | None: ...


class Transition:
    """Where the weight of guidance changes. A rule is a frozen dataclass derived from this class, and registered.

    A rule that the columns of the step table can state overrides `criteria`. One that needs a statistic of its own derives from
    `Statistic`.

    word:     what `--until` calls it; None: nothing. label: what a menu calls it; None: no menu offers it.
    earliest_step: the first step at which it can show, so the earliest that a deadline makes sense.
    """

    word: ClassVar[str | None] = None
    label: ClassVar[str | None] = None
    earliest_step: ClassVar[int] = 0

    def criteria(self, levels: Sequence[float]) -> list[Criterion]:
        """What makes a sample leave at each step. levels: the steps' timesteps in 0..1000, NaN where they are not known.

        Raises ValueError for steps that the rule is not made for.
        """
        raise NotImplementedError

    @classmethod
    def asked(cls, calibration: Calibrated | None = None, **given: Any) -> Transition:
        """The rule as a command or a menu asks for it. given: its fields; None for those that keep their default.

        Raises ValueError for a field that it has not.
        """
        given = {name: value for name, value in given.items() if value is not None}
        known = cls.field_names()
        for name in given:
            if name not in known:
                raise ValueError(f"until {cls.word or cls.__name__!r} takes {', '.join(known) or 'no options'}, not {name}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Its name and options as plain data; `Guidance.from_dict` reads it back."""
        return {"rule": type(self).__name__, **{name: getattr(self, name) for name in self.field_names()}}

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of its options."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]  # rules are dataclasses


class Statistic(Transition):
    """A rule by a statistic of its own, computed on the device from the noise gaps so far.

    The gaps are measured in every step until the transition. The table's columns hold besides, so `criteria` may state a
    deadline.
    """

    def criteria(self, levels: Sequence[float]) -> list[Criterion]:
        return [MEASURED] * len(levels)

    def leaves(self, gaps: Tensor, step: Tensor) -> Tensor:
        """(B,) bool: which samples leave their basin in the step they are at, which then has the weight after the transition.

        gaps: (B, N) float32 on the device, the noise gap of each solver step: of the current one and those before it; NaN where
              none was measured and in steps that are still to come. N is at least the number of steps.
        step: (B,) int64 on the device, the step each sample is at, from 0; samples of one batch may be at different ones.

        Called once a step for all samples of a batch, before the step is guided. What it says of samples that have left, or
        have another rule, is not used. Tensor operations alone: the host must not read a value.
        """
        raise NotImplementedError


RULES: dict[str, type[Transition]] = {}  # by the name of the class, as `Guidance.to_dict` has it
R = TypeVar("R", bound=type[Transition])


def register(rule: R) -> R:
    """Files, `--until` and ComfyUI's menu find the rule by its name from now on; also as a class decorator.

    Raises ValueError where another rule has its name, word or label.
    """
    for other in RULES.values():
        same = rule.__name__ == other.__name__ or {rule.word, rule.label} & {other.word, other.label} - {None}
        if same and (rule.__module__, rule.__qualname__) != (other.__module__, other.__qualname__):
            raise ValueError(f"transition {rule.__name__} has the name, word or label of {other.__name__}: choose another")
    RULES[rule.__name__] = rule
    return rule


def until_deadline(each: Criterion, levels: Sequence[float], latest: int | None) -> list[Criterion]:
    """`each` at every step before `latest`, where every sample that still waits leaves. None: it may wait for ever."""
    deadline = len(levels) if latest is None else latest
    return [ALWAYS if k >= deadline else each for k in range(len(levels))]
