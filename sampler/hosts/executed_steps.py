"""Which of the scheduler's steps a host runs, their noise levels, and the step of each call of the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedulers.schedule import noise_levels, step_of_calls


class Taken(NamedTuple):
    """Steps as `Escape` takes them.

    timesteps: of each, in 0..1000, NaN where that is not known. log_snrs: likewise, or None. step: of each call of the network.
    """

    timesteps: Sequence[float] | Tensor
    log_snrs: Tensor | None
    step: Tensor


def taken(scheduler: Any, calls: slice) -> Taken:
    """Those of these calls of a scheduler that is set to a run. Steps are counted from the first that is taken."""
    step, known = step_of_calls(scheduler)[calls], noise_levels(scheduler)
    step = step - step[0]
    first = torch.searchsorted(step, torch.arange(int(step[-1]) + 1))
    if known is None:
        return Taken([torch.nan] * len(first), None, step)
    return Taken(known.timestep[calls][first], known.log_snr[calls][first], step)


def called(scheduler: Any, timesteps: Tensor) -> slice:
    """Which of a scheduler's calls are those at `timesteps` (K,), which are all of its own or follow one another in them.

    Raises ValueError where they are neither.
    """
    own, count = scheduler.timesteps.cpu(), len(timesteps)
    for start in range(len(own) - count + 1):
        if torch.equal(own[start : start + count], timesteps.cpu().to(own.dtype)):
            return slice(start, start + count)
    raise ValueError(f"the {count} timesteps of the run are none of the scheduler's own: its noise levels are not known")
