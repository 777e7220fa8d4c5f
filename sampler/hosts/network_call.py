"""Keep a call of a host's network, and repeat it with other latents at another noise level, to judge pictures.

Whatever else the host hands to the network (prompts, adapters, control, masks, positions) stays as it was in that call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# What networks are given as their time at timestep t of a scheduler that counts to n.
TIME_INPUTS: tuple[Callable[[float, int], float], ...] = (lambda t, n: t, lambda t, n: t / n, lambda t, n: 1 - t / n)
NEAR = 0.02  # how far, relatively, a network's time may be off one of these: half precision rounds it


@dataclass(frozen=True)
class NetworkCall:
    """A call of a network.

    arguments: by name, or by position where they were given so. timestep: the scheduler's in this call. counted: the length of
    the scheduler's training schedule. Both are set in a call that is kept.
    """

    network: nn.Module
    arguments: dict[Any, Any]
    timestep: float = torch.nan
    counted: int = 1000

    @property
    def latents_key(self) -> Any:
        """The key of the latents, a network's first argument."""
        return next(key for key in (0, "sample", "hidden_states") if key in self.arguments)

    @property
    def time_key(self) -> Any:
        """The key of the time, a network's second argument."""
        return "timestep" if "timestep" in self.arguments else 1

    @property
    def latents(self) -> Tensor:
        """(rows, ...), those that the network was called with."""
        return stacked(self.arguments[self.latents_key])

    @property
    def time(self) -> Any:
        """The time that the network was given."""
        return self.arguments[self.time_key]

    def kept(self, timestep: float, counted: int = 1000) -> NetworkCall:
        """Return this call with copies of its tensors, because a host may write into them later."""
        copies = tree_map_only(Tensor, lambda value: _laid_out(value.clone(), value), self.arguments)
        return replace(self, arguments=copies, timestep=timestep, counted=counted)

    def repeated(self, latents: Tensor, timestep: float) -> Tensor:
        """Return the prediction (rows, ...) for other latents (B, ...), at another timestep of the scheduler.

        Channels or tokens that the call had beyond those of the latents stay. Raises ValueError for latents of another shape,
        and where it is not known what the network is given as its time.
        """
        own = self.arguments[self.latents_key]
        put = _put_into(self.latents, latents)
        arguments = self.arguments | {
            self.time_key: _as_time(self.time, self._time_at(timestep)),
            self.latents_key: list(put.unbind()) if isinstance(own, list) else put,
        }
        given = [value for key, value in arguments.items() if isinstance(key, int)]
        with _uncached(self.network):
            return stacked(self.network(*given, **{key: arguments[key] for key in arguments if isinstance(key, str)})[0])

    def _time_at(self, timestep: float) -> float:
        """Return the network's time at this timestep, counted as its time in this call was."""
        time = float(torch.as_tensor(self.time).flatten()[0])
        nearest = min(TIME_INPUTS, key=lambda as_input: abs(as_input(self.timestep, self.counted) - time))
        if not abs(nearest(self.timestep, self.counted) - time) <= NEAR * max(abs(time), 0.1):
            raise ValueError(
                f"{type(self.network).__name__} is told {time:g} at the scheduler's timestep {self.timestep:g}: how it is told "
                "the time is not known here, so pictures cannot be judged; use judge(...) with a function of your own"
            )
        return nearest(timestep, self.counted)


def stacked(tensors: Tensor | list[Tensor]) -> Tensor:
    """Some networks take and return a list of samples."""
    return torch.stack(tensors) if isinstance(tensors, list) else tensors


def sign_of(predicted: Tensor, taken: Tensor) -> float:
    """-1 where a pipeline takes the opposite of what its network predicts, else 1; both of one shape."""
    return -1.0 if bool((predicted * taken).nansum() < 0) else 1.0


def _as_time(own: Any, value: float) -> Any:
    if not isinstance(own, Tensor):
        return type(own)(value)
    return _laid_out(torch.full_like(own, value if own.is_floating_point() else round(value)), own)


def _laid_out(made: Tensor, own: Tensor) -> Tensor:
    """Return `made`, expanded in memory where `own` is: a compiled network would compile again for another layout."""
    first = tuple(slice(1) if stride == 0 else slice(None) for stride in own.stride())
    return made[first].expand(own.shape)


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


def _uncached(network: Any) -> AbstractContextManager[None]:
    """A context in which a network that keeps parts of its last calls (diffusers' caches) computes anew."""
    if not getattr(network, "is_cache_enabled", False):
        return nullcontext()
    network._reset_stateful_cache()
    return network.cache_context("judging")


@contextmanager
def seen(network: Any, see: Callable[[NetworkCall, Any], Any]) -> Iterator[None]:
    """Replace the output of every call of the network, compiled or not, by `see(call, output)`.

    This concerns the calls in this thread alone: pipelines in other threads may share the network.
    """
    watched = {threading.get_ident()}

    def replaced(given: tuple, named: dict[str, Any], output: Any) -> Any:
        if threading.get_ident() not in watched:
            return output
        return see(NetworkCall(network, dict(enumerate(given)) | named), output)

    compiled = network._compiled_call_impl
    if compiled is None:
        with network.register_forward_hook(lambda _, *call: replaced(*call), with_kwargs=True):
            yield
        return
    # What `network.compile()` made would compile a forward hook too.
    network._compiled_call_impl = own = lambda *given, **named: replaced(given, named, compiled(*given, **named))
    try:
        yield
    finally:
        watched.clear()
        if network._compiled_call_impl is own:  # else another thread has wrapped it, and goes on
            network._compiled_call_impl = compiled
