"""A call of a host's network, kept, and repeated with other latents at another noise level: how pictures are judged there.

Whatever else the host hands to the network (prompts, adapters, control, masks, positions) stays as it was in that call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

TimeInput = Callable[[float, int], float]

# What a network is given as its time at timestep t of a scheduler that counts to n: t itself, its share of n, or the rest.
TIME_INPUTS: tuple[TimeInput, ...] = (lambda t, n: t, lambda t, n: t / n, lambda t, n: 1 - t / n)
NEAR = 0.02  # how far, relatively, a network's time may be off one of these: half precision rounds it


@dataclass(frozen=True)
class NetworkCall:
    """A call of a network.

    given, named: its arguments. timestep: the scheduler's there. counted: the length of the scheduler's training schedule.
    """

    network: nn.Module
    given: tuple
    named: dict[str, Any]
    timestep: float
    counted: int

    @classmethod
    def kept(cls, network: nn.Module, given: tuple, named: dict[str, Any], timestep: float, counted: int = 1000) -> NetworkCall:
        """A call with copies of its tensors: a host may write into them later."""
        given, named = tree_map(
            lambda value: _laid_out(value.clone(), value) if isinstance(value, Tensor) else value, (given, named)
        )
        return cls(network, given, named, timestep, counted)

    def repeated(self, latents: Tensor, timestep: float) -> Tensor:
        """The prediction (rows, ...) for other latents (B, ...), at another timestep of the scheduler.

        Channels or tokens that the call had beyond those of the latents stay. Raises ValueError for latents of another shape,
        and where it is not known what the network is given as its time.
        """
        time = self._time_input()(timestep, self.counted)
        given, named = _with(self.given, self.named, "timestep", lambda own: _as_time(own, time))
        given, named = _with(given, named, sample_name(given, named), lambda own: _replaced(own, latents))
        with uncached(self.network):
            return stacked(self.network(*given, **named)[0])

    def _time_input(self) -> TimeInput:
        """How what the network is given as its time follows from the scheduler's timestep."""
        time = float(torch.as_tensor(timestep_of(self.given, self.named)).flatten()[0])
        off, found = min(((_off(one(self.timestep, self.counted), time), one) for one in TIME_INPUTS), key=lambda one: one[0])
        if off > NEAR:
            raise ValueError(
                f"{type(self.network).__name__} is told {time:g} at the scheduler's timestep {self.timestep:g}: how it is told "
                "the time is not known here, so pictures cannot be judged; use judge(...) with a function of your own"
            )
        return found


def sample_name(given: tuple, named: dict[str, Any]) -> str:
    """What a network's first argument is called."""
    return "sample" if given or "sample" in named else "hidden_states"


def sample_of(given: tuple, named: dict[str, Any]) -> Tensor:
    """The latents that a network was called with, (rows, ...)."""
    return stacked(given[0] if given else named[sample_name(given, named)])


def timestep_of(given: tuple, named: dict[str, Any]) -> Any:
    """What a network was given as its time."""
    return named["timestep"] if "timestep" in named else given[1]


def stacked(tensors: Tensor | list[Tensor]) -> Tensor:
    """Some networks take and return a list of samples."""
    return torch.stack(tensors) if isinstance(tensors, list) else tensors


def _off(guess: float, time: float) -> float:
    return abs(guess - time) / max(abs(time), 0.1)


def _with(given: tuple, named: dict[str, Any], name: str, change: Callable[[Any], Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments with one changed: the latents are a network's first, the timestep its second."""
    if name in named:
        return given, named | {name: change(named[name])}
    place = 1 if name == "timestep" else 0
    return (*given[:place], change(given[place]), *given[place + 1 :]), named


def _as_time(own: Any, value: float) -> Any:
    if not isinstance(own, Tensor):
        return type(own)(value)
    return _laid_out(torch.full_like(own, value if own.is_floating_point() else round(value)), own)


def _laid_out(made: Tensor, own: Tensor) -> Tensor:
    """`made` as expanded in memory as `own` is: a compiled network would compile anew for another layout."""
    first = tuple(slice(1) if stride == 0 else slice(None) for stride in own.stride())
    return made[first].expand(own.shape)


def _replaced(own: Tensor | list[Tensor], latents: Tensor) -> Tensor | list[Tensor]:
    if isinstance(own, list):
        return list(_put_into(torch.stack(own), latents).unbind())
    return _put_into(own, latents)


def _put_into(own: Tensor, latents: Tensor) -> Tensor:
    made, rows = own.clone(), len(own) // len(latents)
    there = made[:, : latents.shape[1]]
    if len(own) != rows * len(latents) or there[0].numel() != latents[0].numel():
        raise ValueError(
            f"latents are {tuple(latents.shape)}, and the network was called with {tuple(own.shape)}: give them as it takes "
            "them"
        )
    there.copy_(torch.cat([latents] * rows).reshape(there.shape))
    return made


def uncached(network: Any) -> AbstractContextManager[None]:
    """Inside, a network that keeps parts of its last calls (diffusers' caches) computes anew."""
    if not getattr(network, "is_cache_enabled", False):
        return nullcontext()
    network._reset_stateful_cache()
    return network.cache_context("judging")


@contextmanager
def seen(network: Any, see: Callable[[tuple, dict, Any], Any]) -> Iterator[None]:
    """`see` gets (arguments, named ones, output) of every call, and its result is the output; compiled or not."""
    compiled = network._compiled_call_impl
    if compiled is None:
        handle = network.register_forward_hook(lambda _, *call: see(*call), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
    else:  # of `network.compile()`, into which a hook would be compiled
        network._compiled_call_impl = lambda *given, **named: see(given, named, compiled(*given, **named))
        try:
            yield
        finally:
            network._compiled_call_impl = compiled
