"""Guidance as data: which weight a step uses before and after the transition, and where the transition is.

guided = uncond + w * (cond - uncond), so w = 0 is the unconditional prediction, w = 1 the conditional one and w < 0
opposite guidance. Delayed and opposite guidance: Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause
Memorization", CVPR 2025, https://arxiv.org/abs/2411.16738.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from . import arguments
from .kernels.rules import columns_of, options_of
from .kernels.table import Column

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


class Leaving(NamedTuple):
    """What makes a sample leave its basin at a step, as columns of the table of steps; by default nothing does.

    keep:  the first minimum of the noise gap shows there, and is at most `keep` times the largest gap before it.
    limit: the gap is at most `limit`; infinity: every sample leaves.
    fall:  the gap is below `fall` times the largest gap before it.
    wait:  steps from there to the transition.
    """

    keep: float = -math.inf
    limit: float = -math.inf
    fall: float = 0.0
    wait: int = 0


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """What `cfg`, `delayed` and `opposite` are given by name, as fields: what is not one is an option of the rule."""
    own = {name: given[name] for name in ("shape", "interval", "watch", "rule") if name in given}
    return {**own, "options": {name: value for name, value in given.items() if name not in own}}


STAYS, LEAVES = Leaving(), Leaving(limit=math.inf)


@dataclass(frozen=True)
class At:
    """The transition is the first step whose timestep is at or below `timestep` (the paper's static transition point).

    `timestep` is in 0..1000 of the training schedule; schedulers that count otherwise (EDM, flow) are mapped by noise level.
    Raises ValueError if it is not finite.
    """

    timestep: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "timestep", arguments.finite("timestep", self.timestep))

    def leaving(self, levels: Sequence[float]) -> list[Leaving]:
        """What makes a sample leave at each step, by the steps' timesteps in 0..1000."""
        return [LEAVES if t <= self.timestep else STAYS for t in levels]

    def __repr__(self) -> str:
        return f"At(timestep={self.timestep:g})"


@dataclass(frozen=True)
class FirstMinimum:
    """The transition is the first local minimum of the noise gap d, per sample (the paper's dynamic transition point).

    Step k is the transition if d[k-2] > d[k-1] < d[k], strictly; step k is already guided with the weight after it.
    The defaults are the paper's rule.

    earliest: the first step that may be the transition, at least 2.
    latest:   a deadline: a sample still waiting at this step transitions there. None: it may wait for ever.
    drop:     how deep the minimum must be, against noise: d[k-1] <= (1 - drop) * max(d[0..k-1]), with 0 <= drop < 1.

    Raises ValueError for anything else.
    """

    earliest: int = 2
    latest: int | None = None
    drop: float = 0.0

    def __post_init__(self) -> None:
        arguments.at_least("earliest", self.earliest, 2)
        if self.latest is not None:
            arguments.at_least("latest", self.latest, self.earliest)
        object.__setattr__(self, "drop", arguments.finite("drop", self.drop))
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be at least 0 and below 1, got {self.drop:g}")

    def leaving(self, levels: Sequence[float]) -> list[Leaving]:
        """What makes a sample leave at each step."""
        latest, shows = len(levels) if self.latest is None else self.latest, Leaving(keep=1 - self.drop)
        return [LEAVES if k >= latest else shows if k >= self.earliest else STAYS for k in range(len(levels))]

    def __repr__(self) -> str:
        given = {"earliest": self.earliest, "latest": self.latest, "drop": self.drop}
        shown = (f"{name}={value:g}" for name, value in given.items() if value != getattr(FirstMinimum, name))
        return f"FirstMinimum({', '.join(shown)})"


@dataclass(frozen=True)
class Settled:
    """The transition is `wait` steps after the noise gap has come down to that of ordinary prompts. A rule of this project.

    ordinary: the usual gap of each step, on trajectories with the weight before the transition: the median over prompts known
              not to be memorized, of this model, scheduler and number of steps (`basinescape analyze` measures it).
    factor:   a sample has settled at the first step whose gap is at most `factor` times the ordinary one.
    wait:     steps from there to the transition.
    latest:   a deadline: a sample still waiting transitions at this step. None: it may wait for ever.

    Raises ValueError for anything else.
    """

    ordinary: tuple[float, ...]
    factor: float = 1.5
    wait: int = 0
    latest: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ordinary", tuple(arguments.finite("ordinary", gap) for gap in self.ordinary))
        object.__setattr__(self, "factor", arguments.finite("factor", self.factor))
        if self.factor <= 0:
            raise ValueError(f"factor must be above 0, got {self.factor:g}")
        arguments.at_least("wait", self.wait, 0)
        if self.latest is not None:
            arguments.at_least("latest", self.latest, self.wait)

    def leaving(self, levels: Sequence[float]) -> list[Leaving]:
        """What makes a sample leave at each step. Raises ValueError if `ordinary` has another number of steps."""
        if len(self.ordinary) != len(levels):
            raise ValueError(f"ordinary has {len(self.ordinary)} gaps, but the sampler takes {len(levels)} steps")
        limits = [self.factor * gap for gap in self.ordinary]
        if self.latest is not None:
            limits[self.latest - self.wait :] = [math.inf] * len(limits[self.latest - self.wait :])
        return [Leaving(limit=limit, wait=self.wait) for limit in limits]


@dataclass(frozen=True)
class Fallen:
    """The transition is the first step whose noise gap is below `share` times the largest one before it, per sample.

    share:  above 0 and at most 1.
    latest: a deadline: a sample still waiting at this step transitions there. None: it may wait for ever.

    Raises ValueError for anything else.
    """

    share: float = 0.5
    latest: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", arguments.finite("share", self.share))
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share:g}")
        if self.latest is not None:
            arguments.at_least("latest", self.latest, 1)

    def leaving(self, levels: Sequence[float]) -> list[Leaving]:
        """What makes a sample leave at each step."""
        latest = len(levels) if self.latest is None else self.latest
        return [LEAVES if k >= latest else Leaving(fall=self.share) for k in range(len(levels))]


Rule = At | FirstMinimum | Settled | Fallen
RULES = {rule.__name__: rule for rule in get_args(Rule)}


@dataclass(frozen=True)
class Watch:
    """A sample is flagged if the mean noise gap of its first `steps` steps is above `threshold`.

    Raises ValueError unless threshold is finite and steps at least 1.
    """

    threshold: float
    steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", arguments.finite("threshold", self.threshold))
        arguments.at_least("steps", self.steps, 1)


@dataclass(frozen=True)
class Guidance:
    """How strongly each step is guided. Made by `cfg`, `delayed` or `opposite`.

    scale:    weight after the transition; any finite number.
    before:   weight before it; any finite number.
    until:    where the transition is; None: at the first step.
    shape:    the scale over time: a name in SHAPES, or one factor a step (a table of one's own).
    interval: (low, high) timesteps outside which the weight after the transition is 1, the conditional prediction alone
              (Kynkaanniemi et al., https://arxiv.org/abs/2404.07724); None: everywhere inside.
    watch:    which samples this is for: the others keep plain guidance at `scale`. None: for all.
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
    watch: Watch | None = None
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
        if self.watch is not None and not isinstance(self.watch, Watch):
            raise ValueError(f"watch must be Watch(...), got {self.watch!r}")
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
    def guard(cls, guidance: Guidance, threshold: float, steps: int = 1) -> Guidance:
        """Plain guidance for all; samples whose mean noise gap over the first `steps` steps is above `threshold` start again
        under `guidance`, delayed or opposite."""
        if not isinstance(guidance, Guidance) or guidance.until is None:
            raise ValueError(f"guidance must be a delayed or opposite Guidance, got {guidance!r}")
        return replace(guidance, watch=Watch(threshold, steps))

    def __repr__(self) -> str:
        if self.watch is not None:
            inner = replace(self, watch=None)
            return f"Guidance.guard({inner!r}, threshold={self.watch.threshold:g}, steps={self.watch.steps})"
        extra = "" if self.shape == "static" else f", shape={self.shape!r}"
        extra += "" if self.interval is None else f", interval={self.interval!r}"
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
        return {**asdict(self), "until": rule, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Guidance:
        """The inverse of `to_dict`. Raises ValueError for an unknown rule or field."""
        fields = dict(data)
        try:
            if fields.get("until") is not None:
                rule = dict(fields["until"])
                fields["until"] = RULES[rule.pop("rule")](**rule)
            if fields.get("watch") is not None:
                fields["watch"] = Watch(**fields["watch"])
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
        return isinstance(self.until, At) or self.interval is not None or self.shape in SHAPES.keys() - {"static"}

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
