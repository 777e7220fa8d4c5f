"""Guidance as data: which weight a step uses before and after the transition, and where the transition is.

guided = uncond + w * (cond - uncond), so w = 0 is the unconditional prediction, w = 1 the conditional one and w < 0
opposite guidance. Delayed and opposite guidance: Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause
Memorization", CVPR 2025, https://arxiv.org/abs/2411.16738.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import arguments
from .kernels.rules import columns_of, options_of
from .kernels.table import Column
from .transitions import LEAVES, RULES, At, Rule

if TYPE_CHECKING:
    from .calibration import Calibration

Branch = Literal["both", "uncond", "cond"]  # which predictions a call of the network makes

# Factors on the scale over u = t / num_train_timesteps in 0..1, as carried by the authors' scripts.
SHAPES: dict[str, Callable[[float], float]] = {
    "static": lambda u: 1.0,
    "linear": lambda u: 1 - u,
    "invlinear": lambda u: u,
    "cosine": lambda u: math.cos(math.pi * u) + 1,
    "sine": lambda u: math.sin(math.pi * u - math.pi / 2) + 1,
    "v_shape": lambda u: 1 - u if u > 0.5 else u,
    "a_shape": lambda u: 1 - u if u < 0.5 else u,
}


def _restart(given: Sequence[float]) -> tuple[float, float, int]:
    """(low, high, times) as checked."""
    if len(given) != 3:
        raise ValueError(f"restart must be (low, high, times), got {given!r}")
    low, high = (arguments.finite("restart", timestep) for timestep in given[:2])
    if low >= high:
        raise ValueError(f"restart must go back from a lower timestep to a higher one, got {given!r}")
    return low, high, arguments.at_least("restart", given[2], 1)


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """What `cfg`, `delayed` and `opposite` are given by name, as fields: what is not one is an option of the rule."""
    own = {name: given[name] for name in ("shape", "interval", "restart", "rule") if name in given}
    return {**own, "options": {name: value for name, value in given.items() if name not in own}}


@dataclass(frozen=True)
class Guidance:
    """How strongly each step is guided. Made by `cfg`, `delayed` or `opposite`.

    scale:    weight after the transition; any finite number.
    before:   weight before it; any finite number.
    until:    where the transition is; None: at the first step.
    shape:    the scale over time: a name in SHAPES, or one factor a step (a table of one's own).
    interval: (low, high) timesteps outside which the weight after the transition is 1, the conditional prediction alone
              (Kynkaanniemi et al., https://arxiv.org/abs/2404.07724); None: everywhere inside.
    restart:  (low, high, times): at the first step whose timestep is at or below `low`, go back to the first at or below `high`
              by fresh noise of the sample's own and come down again, so many times (restart sampling, Xu et al., NeurIPS 2023,
              https://arxiv.org/abs/2306.14878). For schedulers that are linear. None: straight down.
    rungs:    the attempts of a guard, the first of which is plain; the rest of the fields is that one's. Empty: no guard.
    rule:     how the two predictions are combined (`kernels.rules.RULES`), before the transition and after it; a weight of 0
              is the unconditional prediction under every rule, and 1 the conditional one. One a batch.
    options:  the rule's, by name; `cfg`, `delayed` and `opposite` take them as arguments of their own.

    Raises ValueError for anything else.
    """

    scale: float
    before: float = 0.0
    until: Rule | None = None
    shape: str | tuple[float, ...] = "static"
    interval: tuple[float, float] | None = None
    restart: tuple[float, float, int] | None = None
    rungs: tuple[Rung, ...] = ()
    rule: str = "cfg"
    options: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", arguments.finite("scale", self.scale))
        object.__setattr__(self, "before", arguments.finite("before", self.before))
        if self.until is not None and not isinstance(self.until, Rule):
            raise ValueError(f"until must be one of {', '.join(f'{name}(...)' for name in RULES)}, got {self.until!r}")
        if isinstance(self.shape, str):
            if self.shape not in SHAPES:
                raise ValueError(f"shape must be one of {', '.join(SHAPES)}, or a factor for each step; got {self.shape!r}")
        else:
            object.__setattr__(self, "shape", tuple(arguments.finite("shape", factor) for factor in self.shape))
        if self.interval is not None:
            interval = tuple(arguments.finite("interval", timestep) for timestep in self.interval)
            if len(interval) != 2 or interval[0] > interval[1]:
                raise ValueError(f"interval must be two timesteps (low, high), got {self.interval!r}")
            object.__setattr__(self, "interval", interval)
        if self.restart is not None:
            object.__setattr__(self, "restart", _restart(self.restart))
        object.__setattr__(self, "rungs", tuple(self.rungs))
        if any(not isinstance(rung, Rung) or rung.guidance.rungs for rung in self.rungs):
            raise ValueError(f"rungs must be Rung(...), none of which is a guard, got {self.rungs!r}")
        object.__setattr__(self, "options", tuple(options_of(self.rule, dict(self.options)).items()))

    @classmethod
    def cfg(cls, scale: float, **given: Any) -> Guidance:
        """Plain classifier-free guidance (Ho & Salimans, https://arxiv.org/abs/2207.12598), from the first step on.

        The formula holds for every scale: 0 is the unconditional prediction, 1 the conditional one. diffusers' pipelines switch
        guidance off at scales up to 1 and run the conditional prediction: for a turbo model, whose page says
        `guidance_scale=0.0`, that is scale 1 here.
        """
        return cls(scale, **_fields(given))

    @classmethod
    def delayed(cls, scale: float, until: Rule, before: float = 0.0, **given: Any) -> Guidance:
        """No guidance (or the weight `before`) until the transition, `scale` from there on."""
        return cls(scale, before, until, **_fields(given))

    @classmethod
    def opposite(cls, opposite_scale: float, scale: float, until: Rule, **given: Any) -> Guidance:
        """The weight -opposite_scale, constant, until the transition, `scale` from there on."""
        if arguments.finite("opposite_scale", opposite_scale) <= 0:
            raise ValueError(f"opposite_scale must be above 0 (it is applied with a minus sign), got {opposite_scale!r}")
        return cls(scale, -float(opposite_scale), until, **_fields(given))

    def rescaled(self, phi: float) -> Guidance:
        """The same under the rule "rescale" where phi is above 0. Raises ValueError for a bad phi or beside another rule."""
        if not arguments.share("guidance_rescale", phi):
            return self
        if self.rule != "cfg":
            raise ValueError(f"guidance_rescale is the rule 'rescale', and the guidance has the rule {self.rule!r}: give one")
        return replace(self, rule="rescale", options={"phi": phi})

    @classmethod
    def guard(cls, scale: float, calibration: Calibration, rungs: Sequence[Guidance] | None = None) -> Guidance:
        """Plain guidance that checks its own work: what looks memorized begins again, more carefully each time; see `guard`.

        calibration: of this model, scheduler and number of steps. rungs: the attempts after the plain one, of those that were
        calibrated; None: all of them. Raises ValueError for another scale than the calibration's, or other rungs.
        """
        return cls.ladder(calibration.at(scale, rungs))

    @classmethod
    def ladder(cls, rungs: Sequence[Rung]) -> Guidance:
        """A guard of these attempts, the first of which is plain. Raises ValueError for any other."""
        if not rungs or any(not isinstance(rung, Rung) for rung in rungs) or rungs[0].guidance.until is not None:
            raise ValueError(f"rungs must be Rung(...), the first of plain guidance, got {list(rungs)!r}")
        return replace(rungs[0].guidance, rungs=tuple(rungs))

    def __repr__(self) -> str:
        if self.rungs:
            return f"Guidance.ladder({list(self.rungs)!r})"
        extra = "" if self.shape == "static" else f", shape={self.shape!r}"
        extra += "" if self.interval is None else f", interval={self.interval!r}"
        extra += "" if self.restart is None else f", restart={self.restart!r}"
        extra += "" if self.rule == "cfg" else f", rule={self.rule!r}"
        extra += "".join(f", {name}={value:g}" for name, value in self.options)
        if self.until is None:
            return f"Guidance.cfg({self.scale:g}{extra})"
        if self.before < 0:
            return f"Guidance.opposite({-self.before:g}, scale={self.scale:g}, until={self.until!r}{extra})"
        before = f", before={self.before:g}" if self.before else ""
        return f"Guidance.delayed({self.scale:g}, until={self.until!r}{before}{extra})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json can write; `from_dict` reads it back."""
        rule = None if self.until is None else {"rule": type(self.until).__name__, **asdict(self.until)}
        rungs = [{**vars(rung), "guidance": rung.guidance.to_dict()} for rung in self.rungs]
        return {**asdict(replace(self, rungs=())), "until": rule, "options": dict(self.options), "rungs": rungs}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Guidance:
        """The inverse of `to_dict`. Raises ValueError for an unknown rule or field."""
        fields = dict(data)
        try:
            if fields.get("until") is not None:
                rule = dict(fields["until"])
                fields["until"] = RULES[rule.pop("rule")](**rule)
            rungs = fields.get("rungs", ())
            fields["rungs"] = [Rung(**{**rung, "guidance": cls.from_dict(rung["guidance"])}) for rung in rungs]
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a guidance: {data!r} ({error})") from error

    def weights(self, levels: Sequence[float]) -> list[tuple[float, float]]:
        """The weight before and after the transition at every step, by the steps' timesteps in 0..1000.

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

    @property
    def timed(self) -> bool:
        """Whether it asks for timesteps."""
        return (
            isinstance(self.until, At)
            or self.interval is not None
            or self.restart is not None
            or self.shape in SHAPES.keys() - {"static"}
        )

    def rows(self, levels: Sequence[float]) -> dict[Column, Tensor]:
        """The guidance's columns of the table of steps, float32 on the CPU, a number for each step.

        levels: the steps' timesteps in 0..1000 of the training schedule. Raises ValueError if the guidance has another number
        of steps.
        """
        leaving = [LEAVES] * len(levels) if self.until is None else self.until.leaving(levels)
        columns = zip(*((*weights, *how) for weights, how in zip(self.weights(levels), leaving, strict=True)), strict=True)
        names = (Column.BEFORE, Column.AFTER, Column.KEEP, Column.LIMIT, Column.FALL, Column.WAIT)
        columns = dict(zip(names, columns, strict=True))
        for name, option in zip((Column.FIRST_OPTION, Column.SECOND_OPTION), columns_of(dict(self.options)), strict=True):
            columns[name] = [option] * len(levels)
        return {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}

    def calls(self, levels: Sequence[float], step: Tensor, first: Tensor) -> dict[Column, Tensor]:
        """`rows`, STEP and FIRST for each call of the network. step: (K,) int64, the step it belongs to; first: (K,), 1 for the
        first of its step, which alone may show a transition, 0 for the others."""
        columns = {column: values[step] for column, values in self.rows(levels).items()}
        for column, nothing in ((Column.KEEP, -torch.inf), (Column.LIMIT, -torch.inf), (Column.FALL, 0.0)):
            columns[column] = columns[column].where(first > 0, torch.tensor(nothing))
        return columns | {Column.STEP: step.float(), Column.FIRST: first.float()}


def looks(columns: dict[Column, Tensor]) -> bool:
    """Whether samples look for their transition in their noise gaps; False where the table says beforehand where it is."""
    keep, limit, fall = columns[Column.KEEP], columns[Column.LIMIT], columns[Column.FALL]
    return bool(((keep > -torch.inf) | (limit.abs() < torch.inf) | (fall > 0)).any())


def branches(columns: dict[Column, Tensor], finds: bool) -> tuple[Branch, ...]:
    """The one branch that each row needs, or both: a sample still looking for its transition needs its noise gap."""
    transition, needed = math.inf, []
    names = (Column.STEP, Column.LIMIT, Column.WAIT, Column.BEFORE, Column.AFTER)
    for k, limit, wait, before, after in zip(*(columns[name].tolist() for name in names), strict=True):
        if limit == math.inf:  # by then every sample has left
            transition = min(transition, k + wait)
        left = k >= transition
        weight = after if left else before
        needed.append("both" if finds and not left else {0.0: "uncond", 1.0: "cond"}.get(weight, "both"))
    return tuple(needed)


@dataclass(frozen=True)
class Rung:
    """One attempt of a guard, and what is usual under it.

    guidance: of the attempt.
    gap:      the usual noise gap of each step, 0 where none is computed; gaps are measured in it, so that 1 is usual.
    steps:    how many of the first gaps are looked at before the sample goes on.
    early:    their mean above which the attempt is given up.
    first, later: how many gaps the score looks at, from the first computed one on. power: of the first ones, in the score.
    verdict:  the score above which a finished attempt is suspect.
    peak:     the largest gap of all above which it is, too, whatever its score; 0: no such check.
    lost:     the score below which it says too little of its prompt, and is made again where a rung is left; 0: no such check.
    levels:   the timesteps, 0..1000, of the steps that all this was measured on; empty: any so many steps.
    """

    guidance: Guidance
    gap: tuple[float, ...]
    steps: int
    early: float
    first: int
    later: int
    verdict: float
    peak: float = 0.0
    lost: float = 0.0
    power: float = 1.0
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("gap", "levels"):
            object.__setattr__(self, name, tuple(arguments.finite(name, value) for value in getattr(self, name)))
        for name, least in (("steps", 1), ("first", 1), ("later", 0)):
            arguments.at_least(name, getattr(self, name), least)
        needed = max(self.steps, self.first + self.later)
        if len(self.computed) < needed or not self.gap[-1] > 0:
            raise ValueError(f"gap must be above 0 in {needed} steps and in the last one, got {self.gap}")

    @property
    def computed(self) -> list[int]:
        """The steps that have a gap."""
        return [k for k, gap in enumerate(self.gap) if gap > 0]

    def check(self, levels: Sequence[float]) -> None:
        """ValueError unless steps at these timesteps are those that it was measured on."""
        known = self.levels or levels
        if len(self.gap) != len(levels) or any(abs(a - b) > 1 for a, b in zip(known, levels, strict=False)):
            raise ValueError(
                f"the guard is calibrated for {len(self.gap)} steps{_at(self.levels)}, but the sampler takes "
                f"{len(levels)} steps{_at(levels)}: calibrate for those, or choose other guidance"
            )

    def look(self, gaps: Tensor) -> Tensor:
        """The mean of the first gaps of (..., steps), relative to what is usual."""
        return self._relative(gaps, self.computed[: self.steps]).mean(dim=-1)

    def score(self, gaps: Tensor) -> Tensor:
        """How memorized a finished attempt looks, 1 where its gaps are as usual: (..., steps) -> (...).

        The gap of a memorized sample is large at first, may collapse once the sample is in its basin, and is large again at the
        last step: (mean of the first) ** power / (mean of the later) * last, geometric means.
        """
        first, later = self.computed[: self.first], self.computed[self.first :][: self.later]
        logs = self.power * self._relative(gaps, first).log().mean(dim=-1) + self._relative(gaps, [-1])[..., 0].log()
        return (logs - self._relative(gaps, later).log().mean(dim=-1) if later else logs).exp()

    def largest(self, gaps: Tensor) -> Tensor:
        """The largest gap, relative to what is usual: (..., steps) -> (...). It peaks where a sample enters its basin late."""
        return self._relative(gaps, self.computed).amax(dim=-1)

    def suspect(self, gaps: Tensor) -> Tensor:
        """Whether a finished attempt looks memorized, by its score or by its peak: (..., steps) -> (...) bool."""
        above = self.score(gaps) > self.verdict
        return above | (self.largest(gaps) > self.peak) if self.peak else above

    def _relative(self, gaps: Tensor, steps: list[int]) -> Tensor:
        return gaps[..., steps] / torch.tensor([self.gap[k] for k in steps])


def _at(levels: Sequence[float]) -> str:
    return f" at timesteps {levels[0]:g} to {levels[-1]:g}" if levels else ""
