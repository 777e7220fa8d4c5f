"""Transition rules: what makes a sample leave its basin, each as its rows of the table of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

from .. import checks


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


STAYS, LEAVES = Leaving(), Leaving(limit=math.inf)


@dataclass(frozen=True)
class At:
    """The transition is the first step at or below a noise level (the paper's static transition point). Give one of:

    timestep: in 0..1000 of the training schedule; schedulers that count otherwise (EDM, flow) are mapped by noise level.
    log_snr:  log(a^2 / s^2) of latents that are a * data + s * noise: the first step at or above it. It means the same amount
              of noise on every model, where a timestep does not.

    Raises ValueError for anything else.
    """

    timestep: float | None = None
    log_snr: float | None = None

    def __post_init__(self) -> None:
        if (self.timestep is None) == (self.log_snr is None):
            raise ValueError(f"At takes timestep or log_snr, one of the two; got {self.timestep!r} and {self.log_snr!r}")
        name = "log_snr" if self.timestep is None else "timestep"
        object.__setattr__(self, name, checks.finite(name, getattr(self, name)))
        if name == "timestep" and self.timestep > 1000:  # where every step would be past the transition
            raise ValueError(f"timestep must be at most 1000, which is noise (0 is the image); got {self.timestep:g}")

    def over(self, timesteps: Sequence[float], log_snrs: Sequence[float] | None) -> At:
        """The same as a timestep, for steps at these timesteps in 0..1000 and log SNRs; below all where no step comes so far.

        Raises ValueError where the log SNRs are asked for and not known.
        """
        if self.log_snr is None:
            return self
        if log_snrs is None or any(map(math.isnan, log_snrs)):
            raise ValueError(f"{self!r} asks for the noise levels of the steps, and they are not known: use At(timestep=...)")
        steps = zip(timesteps, log_snrs, strict=True)
        return At(next((timestep for timestep, log_snr in steps if log_snr >= self.log_snr), -1.0))

    def leaving(self, levels: Sequence[float]) -> list[Leaving]:
        """What makes a sample leave at each step, by the steps' timesteps in 0..1000; see `over` for a log SNR."""
        if self.timestep is None:
            raise ValueError(f"{self!r} is not laid over the steps of a scheduler yet: see over")
        return [LEAVES if t <= self.timestep else STAYS for t in levels]

    def __repr__(self) -> str:
        return f"At(timestep={self.timestep:g})" if self.log_snr is None else f"At(log_snr={self.log_snr:g})"


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
        checks.at_least("earliest", self.earliest, 2)
        if self.latest is not None:
            checks.at_least("latest", self.latest, self.earliest)
        object.__setattr__(self, "drop", checks.finite("drop", self.drop))
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
        object.__setattr__(self, "ordinary", tuple(checks.finite("ordinary", gap) for gap in self.ordinary))
        object.__setattr__(self, "factor", checks.finite("factor", self.factor))
        if self.factor <= 0:
            raise ValueError(f"factor must be above 0, got {self.factor:g}")
        checks.at_least("wait", self.wait, 0)
        if self.latest is not None:
            checks.at_least("latest", self.latest, self.wait)

    @classmethod
    def over(cls, ordinary: Sequence[float], factor: float = 1.5, wait: float = 0.16, latest: float = 0.48) -> Settled:
        """With wait and latest as shares of the steps, by default as chosen on a small pipeline in bench/RESULTS.md."""
        steps = len(ordinary)
        return cls(tuple(ordinary), factor, round(wait * steps), max(round(latest * steps), round(wait * steps)))

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
        object.__setattr__(self, "share", checks.finite("share", self.share))
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share:g}")
        if self.latest is not None:
            checks.at_least("latest", self.latest, 1)

    def leaving(self, levels: Sequence[float]) -> list[Leaving]:
        """What makes a sample leave at each step."""
        latest = len(levels) if self.latest is None else self.latest
        return [LEAVES if k >= latest else Leaving(fall=self.share) for k in range(len(levels))]


Rule = At | FirstMinimum | Settled | Fallen
RULES = {rule.__name__: rule for rule in get_args(Rule)}
