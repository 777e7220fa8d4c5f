"""Guidance as data: which weight a step uses before and after the transition, and where the transition is.

The weights of both sides of the transition are columns of the step table; `kernels.weight_decision` picks one in each step.

guided = uncond + w * (cond - uncond), so w = 0 is the unconditional prediction, w = 1 the conditional one and w < 0
opposite guidance. Delayed and opposite guidance: Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause
Memorization", CVPR 2025, https://arxiv.org/abs/2411.16738.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..kernels.rules import columns_of, options_of
from ..kernels.table import Column
from .transitions import RULES, At, Transition
from .transitions.base import ALWAYS, NEVER, Calibrated

if TYPE_CHECKING:
    from .guard import Guard


# The columns of the step table that guidance fills.
COLUMNS = [Column.BEFORE, Column.AFTER, Column.KEEP, Column.LIMIT, Column.FALL, Column.WAIT]
COLUMNS += [Column.FIRST_OPTION, Column.SECOND_OPTION]

# Factors on the scale over u = t / num_train_timesteps in 0..1, as in the scripts of the paper's authors.
SHAPES: dict[str, Callable[[float], float]] = {
    "static": lambda u: 1.0,
    "linear": lambda u: 1 - u,
    "invlinear": lambda u: u,
    "cosine": lambda u: math.cos(math.pi * u) + 1,
    "sine": lambda u: math.sin(math.pi * u - math.pi / 2) + 1,
    "v_shape": lambda u: 1 - u if u > 0.5 else u,
    "a_shape": lambda u: 1 - u if u < 0.5 else u,
}


def first_of_step(step: Tensor) -> Tensor:
    """(K,) float32: 1 for a call that is the first of its step, 0 for the others. step: (K,) int64, the step of each call."""
    return torch.cat([torch.ones(1), step.diff().clamp(max=1).float()])


def never_came(transition_step: Tensor, steps: int) -> str | None:
    """A warning if some samples had no transition (-1) in these steps; None if all had one. transition_step: (B,)."""
    waiting = int((transition_step < 0).sum())
    text = f"{waiting} of {len(transition_step)} samples had no transition in {steps} steps, so never their full guidance"
    return f"{text}: give the transition a `latest` below {steps}" if waiting else None


def _restart(given: Sequence[Any]) -> tuple[float, float, int]:
    """Check and return (low, high, times)."""
    if not isinstance(given, Sequence) or len(given) != 3:
        raise ValueError(f"restart must be (low, high, times), got {given!r}")
    low, high = (checks.finite("restart", timestep) for timestep in given[:2])
    if low >= high:
        raise ValueError(f"restart must go back from a lower timestep to a higher one, got {given!r}")
    return low, high, checks.at_least("restart", given[2], 1)


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `cfg`, `delayed` and `opposite` as fields of `Guidance`; unknown names become `options`."""
    own: dict[str, Any] = {name: given[name] for name in ("shape", "interval", "restart", "rule") if name in given}
    return {**own, "options": {name: value for name, value in given.items() if name not in own}}


@dataclass(frozen=True)
class Guidance:
    """How strongly each step is guided. Made by `cfg`, `delayed` or `opposite`.

    scale:    weight after the transition; any finite number.
    before:   weight before it; any finite number.
    until:    the rule for the transition, one of `transitions.RULES`; None: the transition is the first step.
    shape:    the scale over time: a name in SHAPES, or one factor for each step.
    interval: (low, high) timesteps outside which the weight after the transition is 1, the conditional prediction alone
              (Kynkaanniemi et al., https://arxiv.org/abs/2404.07724); None: no limits.
    restart:  (low, high, times): before the first step whose timestep is at or below `low`, add fresh noise from the sample's
              generator and repeat the steps from the first at or below `high`, `times` times (restart sampling, Xu et al.,
              NeurIPS 2023, https://arxiv.org/abs/2306.14878). For linear schedulers only. None: no step is repeated.
    rule:     how the two predictions are combined (`kernels.rules.RULES`), before the transition and after it. Under every
              rule a weight of 0 gives the unconditional prediction, and 1 the conditional one. A batch has one rule.
    options:  options of the rule, by name; `cfg`, `delayed` and `opposite` take them as keyword arguments.

    Raises ValueError for anything else.
    """

    scale: float
    before: float = 0.0
    until: Transition | None = None
    shape: str | tuple[float, ...] = "static"
    interval: tuple[float, float] | None = None
    restart: tuple[float, float, int] | None = None
    rule: str = "cfg"
    options: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", checks.finite("scale", self.scale))
        object.__setattr__(self, "before", checks.finite("before", self.before))
        if self.until is not None and type(self.until).__name__ not in RULES:
            unregistered = "; `transitions.register` it first" if isinstance(self.until, Transition) else ""
            known = ", ".join(f"{name}(...)" for name in RULES)
            raise ValueError(f"until must be one of {known}, such as At(timestep=680); got {self.until!r}{unregistered}")
        if self.shape not in SHAPES if isinstance(self.shape, str) else not isinstance(self.shape, Iterable):
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, or a factor for each step; got {self.shape!r}")
        if not isinstance(self.shape, str):
            object.__setattr__(self, "shape", tuple(checks.finite("shape", factor) for factor in self.shape))
        if self.interval is not None:
            given = self.interval if isinstance(self.interval, Iterable) else ()
            interval = tuple(checks.finite("interval", timestep) for timestep in given)
            if len(interval) != 2 or interval[0] > interval[1]:
                raise ValueError(f"interval must be two timesteps (low, high), got {self.interval!r}")
            object.__setattr__(self, "interval", interval)
        if self.restart is not None:
            object.__setattr__(self, "restart", _restart(self.restart))
        object.__setattr__(self, "options", tuple(options_of(self.rule, dict(self.options)).items()))

    @classmethod
    def cfg(cls, scale: float, **given: Any) -> Guidance:
        """Plain classifier-free guidance (Ho & Salimans, https://arxiv.org/abs/2207.12598), from the first step on.

        The formula holds for every scale: 0 gives the unconditional prediction, 1 the conditional one. diffusers' pipelines,
        in contrast, use the conditional prediction alone at every scale up to 1. So use scale 1 here for a turbo model whose
        page says `guidance_scale=0.0`.
        """
        return cls(scale, **_fields(given))

    @classmethod
    def delayed(cls, scale: float, until: Transition, before: float = 0.0, **given: Any) -> Guidance:
        """The weight `before` (default 0, the unconditional prediction) until the transition, `scale` from there on."""
        return cls(scale, before, until, **_fields(given))

    @classmethod
    def opposite(cls, opposite_scale: float, scale: float, until: Transition, **given: Any) -> Guidance:
        """The weight -opposite_scale, constant, until the transition, `scale` from there on."""
        if checks.finite("opposite_scale", opposite_scale) <= 0:
            raise ValueError(f"opposite_scale must be above 0 (it is applied with a minus sign), got {opposite_scale!r}")
        return cls(scale, -float(opposite_scale), until, **_fields(given))

    def scaled(self, scale: float) -> Guidance:
        """The same at another scale."""
        return replace(self, scale=scale)

    def rescaled(self, phi: float) -> Guidance:
        """A copy with the rule "rescale" if phi > 0, else itself. Raises ValueError for a bad phi, or for another rule."""
        if not checks.share("guidance_rescale", phi):
            return self
        if self.rule != "cfg":
            raise ValueError(f"guidance_rescale is the rule 'rescale', and the guidance has the rule {self.rule!r}: give one")
        return replace(self, rule="rescale", options={"phi": phi})

    @classmethod
    def guard(
        cls,
        scale: float = 7.5,
        calibration: Calibrated | None = None,
        threshold: float | None = None,
        later: float | None = None,
        rate: float | None = None,
        attempts: Sequence[Guidance] | None = None,
        **given: Any,
    ) -> Guard:
        """Plain guidance with a check of each picture: what looks like a copy is sampled again, more carefully; see `Guard`.

        calibration: of this model. It sets the default thresholds, and an early look that ends hopeless plain attempts.
        threshold:   the basin score above which a plain picture is suspect; default 0.3, or from the calibration.
        later:       the same for the later attempts, with a stricter default: 0.2, or from the calibration.
        rate:        with a calibration, the share of ordinary pictures that may be sampled again: half of it because of their
                     first gaps, half because of their scores. Default 0.01.
        attempts:    the guidances after the plain one; None: delayed guidance, until the log SNRs of `DELAYS`.
        given:       rule and its options, shape, interval or restart, for the plain attempt and the default ones.

        Raises ValueError for anything else, and for a calibration of too few pictures for the rate.
        """
        from . import guard  # here, because guard.py imports this module

        if rate is not None and checks.rate(rate) and calibration is None:
            raise ValueError(f"rate is {rate!r}, which needs a calibration: give one, or a threshold in place of the rate")
        plain, rate = cls.cfg(scale, **given), guard.RATE if rate is None else rate
        if calibration is not None and not hasattr(calibration, "threshold"):
            path = repr(str(calibration)) if isinstance(calibration, str | Path) else "path"
            raise ValueError(f"calibration must be a Calibration, got {calibration!r}: give Calibration.load({path})")
        if not isinstance(attempts, Sequence | None):
            raise ValueError(f"attempts must be a list of guidances, got {attempts!r}")
        if attempts is None:
            attempts = [replace(plain, until=At(log_snr=log_snr)) for log_snr in guard.DELAYS]
        if threshold is None:
            threshold = guard.THRESHOLD if calibration is None else calibration.threshold(rate / 2)
        if later is None:
            later = guard.LATER if calibration is None else calibration.threshold(guard.LATER_RATE)
        later = checks.finite("later", later)
        tried = (guard.Attempt(plain, threshold), *(guard.Attempt(one, later) for one in attempts))
        if calibration is None:
            return guard.Guard(tried)
        return guard.Guard(tried, calibration.early(rate / 2, plain.scale), calibration.model or None, calibration.size)

    def __repr__(self) -> str:
        extra = "" if self.shape == "static" else f", shape={self.shape!r}"
        extra += "" if self.interval is None else f", interval={self.interval!r}"
        extra += "" if self.restart is None else f", restart={self.restart!r}"
        extra += "" if self.rule == "cfg" else f", rule={self.rule!r}"
        extra += "".join(f", {name}={value:g}" for name, value in dict(self.options).items())
        if self.until is None:
            return f"Guidance.cfg({self.scale:g}{extra})"
        if self.before < 0:
            return f"Guidance.opposite({-self.before:g}, scale={self.scale:g}, until={self.until!r}{extra})"
        before = f", before={self.before:g}" if self.before else ""
        return f"Guidance.delayed({self.scale:g}, until={self.until!r}{before}{extra})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write; `from_dict` reads it back."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "until": self.until and self.until.to_dict(), "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Guidance | Guard:
        """The inverse of `to_dict` and of `Guard.to_dict`. Raises ValueError for an unknown rule or field."""
        if not isinstance(data, Mapping):
            raise ValueError(f"not a guidance: {data!r}")
        given = dict(data)
        try:
            if "attempts" in given:
                from .guard import Guard

                return Guard.from_dict(given)
            if given.get("until") is not None:
                rule = dict(given["until"])
                name = rule.pop("rule")
                if name not in RULES:
                    known = ", ".join(RULES)
                    raise ValueError(f"until has the rule {name!r}, and there are {known}: import the file that registers it")
                given["until"] = RULES[name](**rule)
            return cls(**given)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a guidance: {data!r} ({error})") from error

    def over(self, timesteps: Sequence[float], log_snrs: Sequence[float] | None) -> Guidance:
        """A copy for steps at these noise levels, in which a transition at a log SNR is replaced by one at its timestep.

        Raises ValueError for a transition at a log SNR if the log SNRs of the steps are not known.
        """
        return replace(self, until=self.until.over(timesteps, log_snrs)) if isinstance(self.until, At) else self

    def weights(self, levels: Sequence[float]) -> list[tuple[float, float]]:
        """(weight before, weight after the transition) for every step. levels: the steps' timesteps in 0..1000.

        Raises ValueError if `shape` is a table of another length.
        """
        if isinstance(self.shape, str):
            factors = [SHAPES[self.shape](t / 1000) for t in levels]
        else:
            factors = list(self.shape)
            if len(factors) != len(levels):
                raise ValueError(f"shape has {len(factors)} factors, but the sampler takes {len(levels)} steps")
        after = [self.scale * factor for factor in factors]
        if self.interval is not None:
            low, high = self.interval
            after = [weight if low <= t <= high else 1.0 for weight, t in zip(after, levels, strict=True)]
        return [(self.before, weight) for weight in after]

    def idle(self, levels: Sequence[float]) -> str | None:
        """A warning if no step at these timesteps is guided, or if the transition has no effect in them; None if all is well.

        Call it on the result of `over`.
        """
        if self.interval is not None and not any(self.interval[0] <= t <= self.interval[1] for t in levels):
            return f"{self!r} guides no step here: none of {len(levels)} steps is in its interval of timesteps, 0 to 1000"
        if self.until is None:
            return None
        if all(before == after for before, after in self.weights(levels)):
            return f"{self!r} is plain guidance here: its weight is the same before the transition and after it"
        criteria = self.until.criteria(levels)
        if criteria[0] == ALWAYS:
            return f"{self!r} is plain guidance here: the first of {len(levels)} steps is past the transition already"
        if all(step == NEVER or k + step.wait >= len(levels) for k, step in enumerate(criteria)):
            return f"{self!r} has no transition here: none of {len(levels)} steps comes so far"
        return None

    @property
    def timed(self) -> bool:
        """Whether its weights or its transition depend on timesteps."""
        return (
            isinstance(self.until, At)
            or self.interval is not None
            or self.restart is not None
            or self.shape in SHAPES.keys() - {"static"}
        )

    def calls(self, levels: Sequence[float], step: Tensor, first: Tensor) -> dict[Column, Tensor]:
        """The columns of the step table that guidance determines: (K,) float32 on the CPU, one entry for each network call.

        levels: the steps' timesteps in 0..1000 of the training schedule.
        step:   (K,) int64, the step each call belongs to.
        first:  (K,), 1 for the first call of its step, 0 for the others. Only a first call can show a transition.

        Raises ValueError if the guidance is made for another number of steps.
        """
        criteria = [ALWAYS] * len(levels) if self.until is None else self.until.criteria(levels)
        if len(criteria) != len(levels):
            raise ValueError(f"{self.until!r} has {len(criteria)} criteria for {len(levels)} steps")
        options = columns_of(dict(self.options))
        rows = [(*weights, *criterion, *options) for weights, criterion in zip(self.weights(levels), criteria, strict=True)]
        columns = dict(zip(COLUMNS, torch.tensor(rows, dtype=torch.float32)[step].unbind(1), strict=True))
        for column, nothing in ((Column.KEEP, -torch.inf), (Column.LIMIT, -torch.inf), (Column.FALL, 0.0)):
            columns[column] = columns[column].where(first > 0, torch.tensor(nothing))
        return columns | {Column.STEP: step.float(), Column.FIRST: first.float()}
