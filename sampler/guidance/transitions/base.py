"""The base classes of transition rules, and the registry in which commands, hosts and files find rules by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from torch import Tensor

from ..early import EarlyLook


class Criterion(NamedTuple):
    """Conditions under which a sample leaves its basin at a step, as columns of the step table. By default it never does.

    keep:  the step before had a local minimum of the noise gap, at most `keep` times the largest earlier gap.
    limit: the gap is at most `limit`; infinity: every sample leaves.
    fall:  the gap is below `fall` times the largest gap before it.
    wait:  steps from there to the transition.
    """

    keep: float = -math.inf
    limit: float = -math.inf
    fall: float = 0.0
    wait: int = 0


NEVER, ALWAYS = Criterion(), Criterion(limit=math.inf)
MEASURED = Criterion(limit=-1.0)  # no gap is so small, so the step measures the gap and lets no sample leave


class Calibrated(Protocol):
    """The members of a calibration that guidance uses; `calibration.Calibration` has them."""

    @property
    def model(self) -> Mapping[str, Any]: ...

    @property
    def size(self) -> tuple[int, int] | None: ...

    def settled(self, **given: float) -> Transition: ...

    def threshold(self, rate: float) -> float: ...

    def early(self, rate: float, scale: float) -> EarlyLook | None: ...


class Transition:
    """The step at which the weight of guidance changes. A rule is a registered frozen dataclass derived from this class.

    A rule that the columns of the step table can express overrides `criteria`. A rule with a statistic of its own derives from
    `Statistic`.

    word:     its name for `--until`; None: it has none. label: its name in menus; None: no menu offers it.
    earliest_step: the first step at which the transition can come, and so the earliest useful deadline.
    """

    word: ClassVar[str | None] = None
    label: ClassVar[str | None] = None
    earliest_step: ClassVar[int] = 0

    def criteria(self, levels: Sequence[float]) -> list[Criterion]:
        """The criterion of each step. levels: the steps' timesteps in 0..1000, NaN where they are not known.

        Raises ValueError for steps that the rule is not made for.
        """
        raise NotImplementedError

    @classmethod
    def asked(cls, calibration: Calibrated | None = None, **given: Any) -> Transition:
        """Make the rule from the options of a command or a menu. given: its fields; None: the default.

        Raises ValueError for a field that the rule does not have.
        """
        given = {name: value for name, value in given.items() if value is not None}
        known = cls.field_names()
        for name in given:
            if name not in known:
                raise ValueError(f"until {cls.word or cls.__name__!r} takes {', '.join(known) or 'no options'}, not {name}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Its class name and options as plain data; `Guidance.from_dict` reads them."""
        return {"rule": type(self).__name__, **{name: getattr(self, name) for name in self.field_names()}}

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of its options."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]  # rules are dataclasses


class Statistic(Transition):
    """A rule with a statistic of its own, computed on the device from the noise gaps so far.

    The gaps are measured in every step until the transition. The criteria also apply, so `criteria` may add a deadline.
    """

    def criteria(self, levels: Sequence[float]) -> list[Criterion]:
        return [MEASURED] * len(levels)

    def leaves(self, gaps: Tensor, step: Tensor) -> Tensor:
        """(B,) bool: which samples leave their basin in the step they are at, which then has the weight after the transition.

        gaps: (B, N) float32 on the device, the noise gap of each solver step up to the current one; NaN where no gap was
              measured, and in later steps. N is at least the number of steps.
        step: (B,) int64 on the device, the current step of each sample, from 0. Samples of one batch may be at different steps.

        Called once a step for all samples of a batch, before the step is guided. The result is ignored for samples that have
        left already or have another rule. Use tensor operations only: the host must not read a value.
        """
        raise NotImplementedError


RULES: dict[str, type[Transition]] = {}  # by class name, as in `Guidance.to_dict`
R = TypeVar("R", bound=type[Transition])


def register(rule: R) -> R:
    """Register the rule, so that files, `--until` and ComfyUI's menu find it by name. It can be used as a class decorator.

    Raises ValueError if another rule has its name, word or label.
    """
    for other in RULES.values():
        same = rule.__name__ == other.__name__ or {rule.word, rule.label} & {other.word, other.label} - {None}
        if same and (rule.__module__, rule.__qualname__) != (other.__module__, other.__qualname__):
            raise ValueError(f"transition {rule.__name__} has the name, word or label of {other.__name__}: choose another")
    RULES[rule.__name__] = rule
    return rule


def until_deadline(each: Criterion, levels: Sequence[float], latest: int | None) -> list[Criterion]:
    """The criterion `each` at every step before `latest`, and ALWAYS from there on. latest None: no deadline."""
    deadline = len(levels) if latest is None else latest
    return [ALWAYS if k >= deadline else each for k in range(len(levels))]
