"""Which of a scheduler's steps a run takes, with their noise levels; and `stepping`, which replaces a scheduler's step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guidance.guidance import first_of_step
from ..schedulers.schedule import noise_levels, step_of_calls


class StepsTaken(NamedTuple):
    """Steps as `Escape` takes them, counted from the first that is taken.

    timesteps: of each, in 0..1000, NaN where that is not known. log_snrs: likewise, or None. step: of each call of the network.
    """

    timesteps: Sequence[float] | Tensor
    log_snrs: Tensor | None
    step: Tensor


def steps_taken(scheduler: Any, timesteps: Tensor) -> StepsTaken:
    """Return the steps of a run that takes the calls at `timesteps` (K,), after the scheduler's `set_timesteps`.

    Raises ValueError unless these follow one another in the scheduler's own timesteps.
    """
    own, count = scheduler.timesteps.cpu(), len(timesteps)
    wanted = timesteps.cpu().to(own.dtype)
    calls = [slice(k, k + count) for k in range(len(own) - count + 1) if torch.equal(own[k : k + count], wanted)]
    if not calls or not count:
        raise ValueError(f"the {count} timesteps of the run are none of the scheduler's own: its noise levels are not known")
    step, levels = step_of_calls(scheduler)[calls[0]], noise_levels(scheduler)
    first = first_of_step(step) > 0
    if levels is None:
        return StepsTaken([torch.nan] * int(first.sum()), None, step - step[0])
    return StepsTaken(levels.timestep[calls[0]][first], levels.log_snr[calls[0]][first], step - step[0])


class _Taken(functools.partial):
    """What `stepping` puts in the place of a scheduler's step."""


def is_taken(scheduler: Any) -> bool:
    """Whether `stepping` has replaced the scheduler's step: a scheduler holds the state of one run alone."""
    return isinstance(scheduler.step, _Taken)


@contextmanager
def stepping(scheduler: Any, take: Callable[..., Any]) -> Iterator[None]:
    """Call `take(step, *arguments)` in the place of the scheduler's every `step(*arguments)`."""
    step = scheduler.step
    own = vars(scheduler).get("step")
    scheduler.step = functools.wraps(step)(_Taken(take, step))
    try:
        yield
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own
