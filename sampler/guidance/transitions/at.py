"""The static transition, at a noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import gt

from ... import checks
from .base import ALWAYS, NEVER, Criterion, Transition


@dataclass(frozen=True)
class At(Transition):
    """The transition is the first step at or below a noise level (the paper's static transition point). Give one of:

    timestep: in 0..1000 of the training schedule; schedulers that count otherwise (EDM, flow) are mapped by noise level.
    log_snr:  log(a^2 / s^2) of latents a * data + s * noise; the transition is the first step at or above it. A log SNR means
              the same amount of noise on every model, but a timestep does not.

    Raises ValueError for anything else.
    """

    timestep: float | None = None
    log_snr: float | None = None

    label = "timestep"

    def __post_init__(self) -> None:
        if (self.timestep is None) == (self.log_snr is None):
            raise ValueError(f"At takes timestep or log_snr, one of the two; got {self.timestep!r} and {self.log_snr!r}")
        if self.log_snr is not None:
            object.__setattr__(self, "log_snr", checks.finite("log_snr", self.log_snr))
        if self.timestep is not None:
            object.__setattr__(self, "timestep", checks.finite("timestep", self.timestep))
        if self.timestep is not None and self.timestep > 1000:  # where every step would be past the transition
            raise ValueError(f"timestep must be at most 1000, which is noise (0 is the image); got {self.timestep:g}")

    def over(self, timesteps: Sequence[float], log_snrs: Sequence[float] | None) -> At:
        """The same with a timestep, for steps at these timesteps in 0..1000 and log SNRs; -1 if no step reaches the log SNR.

        Raises ValueError if the log SNRs are needed and not known, or fall from one step to the next.
        """
        if self.log_snr is None:
            return self
        if log_snrs is None or any(map(math.isnan, log_snrs)):
            raise ValueError(f"{self!r} asks for the noise levels of the steps, and they are not known: use At(timestep=...)")
        if any(map(gt, log_snrs, log_snrs[1:])):
            raise ValueError(f"{self!r} asks for steps whose log SNRs rise, got {list(log_snrs)}")
        steps = zip(timesteps, log_snrs, strict=True)
        return At(next((timestep for timestep, log_snr in steps if log_snr >= self.log_snr), -1.0))

    def criteria(self, levels: Sequence[float]) -> list[Criterion]:
        """ALWAYS at and below the timestep. Raises ValueError for a log SNR, which `over` converts first."""
        if self.timestep is None:
            raise ValueError(f"{self!r} is not laid over the steps of a scheduler yet: see over")
        return [ALWAYS if t <= self.timestep else NEVER for t in levels]

    def __repr__(self) -> str:
        return f"At(timestep={self.timestep:g})" if self.log_snr is None else f"At(log_snr={self.log_snr:g})"
