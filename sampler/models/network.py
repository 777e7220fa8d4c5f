"""A pipeline's network as that of the loop: plain, compiled, lean, and made again when the pipeline's has changed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..types import Branch
from .changes import Snapshot, checksum
from .lean import Lean

log = logging.getLogger(__name__)

# On a CPU: weights packed for the kernels of each compiled shape, which takes memory for each, and kernels called from C++.
PACKED = {"freezing": True, "cpp_wrapper": True}
RECOMPILE_LIMIT = 64  # shapes compiled before the compiler gives up; its own limit of 8 is that of a few batch sizes


def compiled(net: nn.Module) -> Callable[..., Any]:
    """It compiled for one shape after another, its convolutions channels-last; without graphs of the compiler's own."""
    cpu = net.device.type == "cpu"
    if all(parameter.ndim < 5 for parameter in net.parameters()):  # for pictures
        net = net.to(memory_format=torch.channels_last)
    return traced(torch.compile(net, dynamic=False, options=PACKED if cpu else None), packed=cpu)


def traced(compiled: Callable[..., Any], packed: bool) -> Callable[..., Any]:
    """A compiled function, with what must be known in each call: RECOMPILE_LIMIT, and for PACKED that weights are constant."""
    from torch._dynamo import config as tracer
    from torch._inductor import config as compiler

    def call(*arguments: Any, **keywords: Any) -> Any:
        with tracer.patch(recompile_limit=RECOMPILE_LIMIT), compiler.patch(freezing=packed):
            return compiled(*arguments, **keywords)

    return call


class Guided:
    """A network and the encoded prompts of one batch, as the `Network` of the loop; a subclass says how it is called.

    net:     the pipeline's, or the same compiled.
    inputs:  its keyword arguments by sample, from `encode`. shared: the others.
    both:    what is called for both halves at once; None for `net`.
    version: stays the same object while the network does, so that a call may be recorded; None where none may.
    """

    lean: type[Lean] | None = None  # how such a network is made lean

    def __init__(
        self,
        net: Callable[..., Any],
        inputs: dict[str, Any],
        both: Callable[..., Any] | None = None,
        shared: dict[str, Any] | None = None,
        version: object | None = None,
    ):
        self.net, self.both = net, net if both is None else both
        self.shared, self.version = shared or {}, version
        self._give(inputs)

    def _give(self, inputs: dict[str, Any]) -> None:
        batch = len(next(_tensors(inputs))) // 2
        halves = {"uncond": slice(0, batch), "cond": slice(batch, None), "both": slice(None)}
        self.inputs = {branch: rows_of(inputs, rows) for branch, rows in halves.items()}

    @property
    def form(self) -> tuple:
        """What a recorded call depends on beside contents: shapes and dtypes, and what is no tensor."""
        tensors = tuple((tuple(x.shape), x.dtype) for x in (*_tensors(self.inputs["both"]), *_tensors(self.shared)))
        return tensors + tuple((name, str(value)) for name, value in self.shared.items() if not isinstance(value, Tensor))

    @property
    def row_form(self) -> tuple:
        """Shapes and dtypes of what the inputs are for one sample."""
        return tuple((tuple(x.shape[1:]), x.dtype) for x in _tensors(self.inputs["both"]))

    def blank(self, batch: int) -> Self:
        """The same for `batch` samples, which `put` gives their prompts."""
        other = copy.copy(self)
        other._give(_mapped(lambda x: x.new_zeros((2 * batch, *x.shape[1:])), self.inputs["both"]))
        return other

    def put(self, place: int, other: Guided, row: int) -> None:
        """Put a sample's prompt in the place of another, in the same memory."""
        for old, new in zip(_tensors(self.inputs["both"]), _tensors(other.inputs["both"]), strict=True):
            old[place :: len(old) // 2].copy_(new[row :: len(new) // 2])

    def select(self, index: Tensor) -> Self:
        """The same for some samples of the batch, `index` (N,) int64."""
        batch = len(next(_tensors(self.inputs["cond"])))
        other = copy.copy(self)
        other._give(rows_of(self.inputs["both"], torch.cat([index, index + batch])))
        return other

    def load(self, other: Guided) -> None:
        """Put another's prompts in the place of those given at first, in the same memory."""
        for inputs, given in ((self.inputs["both"], other.inputs["both"]), (self.shared, other.shared)):
            for old, new in zip(_tensors(inputs), _tensors(given), strict=True):
                old.copy_(new)

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
        net = self.both if branch == "both" else self.net
        return self.predict(net, latents, timesteps, {**self.inputs[branch], **self.shared})

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What the network makes of latents (N, ...) and the table's timesteps (N,): (N, ...) in the latents' dtype."""
        raise NotImplementedError


class Networks:
    """One network after another, each for one batch of encoded prompts after another.

    guided: what they become. compile, lean: have them compiled, and as `Lean` has them where that suits them. Either is made of
    the network as it was: it is made again when that is another, or changed in any way. One whose weights come and go
    (offloaded, cast layer by layer) runs as it is.
    """

    def __init__(self, guided: type[Guided], compile: bool, lean: bool):
        self.guided, self._compile, self._lean = guided, compile, lean
        self._made: _Made | None = None
        self._warned = False

    def plain(self, net: nn.Module, inputs: dict[str, Any], shared: dict[str, Any]) -> Guided:
        """A network whose inputs are as `encode` gives them."""
        made = self._now(net)
        if made is None:
            return self.guided(net, inputs, shared=shared)
        return self.guided(made.plain, inputs, shared=shared, version=made.version)

    def fast(self, net: nn.Module, inputs: dict[str, Any], shared: dict[str, Any]) -> Guided:
        """The fastest network there is."""
        made = self._now(net)
        if made is None or made.lean is None:
            return self.plain(net, inputs, shared)
        made.lean.refresh()
        inputs = {**inputs, "encoder_hidden_states": made.lean.text(inputs["encoder_hidden_states"])}
        return self.guided(made.one, inputs, made.both, shared, made.version)

    def _now(self, net: nn.Module) -> _Made | None:
        if not (self._compile or self._lean):
            return None
        if hasattr(net, "_reset_stateful_cache"):
            net._reset_stateful_cache()  # leaves an empty registry, as the pipeline does after the first call
        if hooked(net):
            self._made = None
            if not self._warned:
                log.warning("the network's weights come and go (offloaded, or cast layer by layer): it runs as it is")
                self._warned = True
        elif self._made is None or not self._made.still(net):
            self._made = None  # gives its memory back first
            lean = self.guided.lean if self._lean and self.guided.lean and self.guided.lean.suits(net) else None
            self._made = _Made(net, self._compile, lean)
        return self._made


class _Made:
    """What has been made of a network, and what that was then."""

    def __init__(self, net: nn.Module, compile: bool, lean: type[Lean] | None):
        prepare = compiled if compile else lambda net: net
        self.plain = prepare(net)
        self.lean = None if lean is None else lean(net)
        if self.lean is not None:
            self.one, self.both = prepare(self.lean.one), prepare(self.lean.both)
        self._net, self.version = net, Snapshot(net)
        self._packed = checksum(net) if compile and net.device.type == "cpu" else None

    def still(self, net: nn.Module) -> bool:
        """Whether `net` is the one this was made of, unchanged."""
        same = net is self._net and self.version.holds()
        return same and (self._packed is None or checksum(net) == self._packed)


def hooked(net: nn.Module) -> bool:
    """Whether the weights of a module, or of any in it, come and go: offloaded, or cast layer by layer."""
    registries = (getattr(module, "_diffusers_hook", None) for module in net.modules())
    return any("_hf_hook" in vars(module) for module in net.modules()) or any(
        registry is not None and registry.hooks for registry in registries
    )


def rows_of(value: Any, rows: slice | Tensor) -> Any:
    """Some rows of every tensor in nested dicts and lists."""
    return _mapped(lambda x: x[rows], value)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(change, inner) for name, inner in value.items()}
    return [_mapped(change, inner) for inner in value] if isinstance(value, list) else change(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
