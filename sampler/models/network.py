"""The network that the loop calls: the pipeline's own, perhaps compiled or lean, rebuilt when the pipeline's changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..types import Branch
from .lean import Lean
from .module_snapshot import Snapshot, checksum

log = logging.getLogger(__name__)

# Options on a CPU: pack the weights (a copy for each compiled shape), and call the kernels from C++.
PACKED: dict[str, str | int | bool | Callable[..., Any]] = {"freezing": True, "cpp_wrapper": True}
RECOMPILE_LIMIT = 64  # shapes before the compiler gives up. Its own limit of 8 is reached after a few batch sizes.


def compiled(net: Any) -> Callable[..., Any]:
    """The network, compiled for each shape it meets, with channels-last convolutions and without the compiler's CUDA graphs."""
    cpu = net.device.type == "cpu"
    if all(parameter.ndim < 5 for parameter in net.parameters()):  # for pictures
        net = net.to(memory_format=torch.channels_last)
    return traced(torch.compile(net, dynamic=False, options=PACKED if cpu else None), packed=cpu)


def traced(compiled: Callable[..., Any], packed: bool) -> Callable[..., Any]:
    """Wrap a compiled function so that each call runs under RECOMPILE_LIMIT and, if `packed`, with constant weights."""
    from torch._dynamo import config as tracer
    from torch._inductor import config as compiler

    def call(*arguments: Any, **keywords: Any) -> Any:
        with tracer.patch(recompile_limit=RECOMPILE_LIMIT), compiler.patch(freezing=packed):
            return compiled(*arguments, **keywords)

    return call


class PromptedNetwork:
    """A network with the encoded prompts of one batch: the `Network` of the loop. Subclasses implement `predict`.

    net:     the pipeline's network, perhaps compiled.
    inputs:  its keyword arguments with a row a sample, see `Encoded`. shared: its other keyword arguments.
    both:    the network for both halves at once; None for `net`.
    version: the same object for as long as the network is unchanged, so that a call may be captured; None forbids capture.
    """

    lean: type[Lean] | None = None  # the lean form of such a network

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
        batch = len(_tensors(inputs)[0]) // 2
        halves = {"uncond": slice(0, batch), "cond": slice(batch, None), "both": slice(None)}
        self.inputs = {branch: tree_map(itemgetter(rows), inputs) for branch, rows in halves.items()}

    @property
    def form(self) -> tuple:
        """What a captured call depends on: shapes, dtypes, and values that are no tensors."""
        tensors = tuple((tuple(x.shape), x.dtype) for x in (*_tensors(self.inputs["both"]), *_tensors(self.shared)))
        return tensors + tuple((name, str(value)) for name, value in self.shared.items() if not isinstance(value, Tensor))

    @property
    def row_form(self) -> tuple:
        """Shapes and dtypes of one sample's inputs."""
        return tuple((tuple(x.shape[1:]), x.dtype) for x in _tensors(self.inputs["both"]))

    def blank(self, batch: int) -> Self:
        """The same network for `batch` samples. `put` gives them their prompts."""
        other = copy.copy(self)
        other._give(tree_map(lambda x: x.new_zeros((2 * batch, *x.shape[1:])), self.inputs["both"]))
        return other

    def put(self, place: int, other: PromptedNetwork, row: int) -> None:
        """Copy the prompt of sample `row` of `other` into the memory of sample `place`."""
        for old, new in zip(_tensors(self.inputs["both"]), _tensors(other.inputs["both"]), strict=True):
            old[place :: len(old) // 2].copy_(new[row :: len(new) // 2])

    def select(self, index: Tensor) -> Self:
        """The same network for some samples of the batch. index: (N,) int64."""
        batch = len(_tensors(self.inputs["cond"])[0])
        other = copy.copy(self)
        other._give(tree_map(itemgetter(torch.cat([index, index + batch])), self.inputs["both"]))
        return other

    def load(self, other: PromptedNetwork) -> None:
        """Copy the prompts of `other` into this network's memory."""
        for inputs, given in ((self.inputs["both"], other.inputs["both"]), (self.shared, other.shared)):
            for old, new in zip(_tensors(inputs), _tensors(given), strict=True):
                old.copy_(new)

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
        net = self.both if branch == "both" else self.net
        return self.predict(net, latents, timesteps, {**self.inputs[branch], **self.shared})

    @staticmethod
    def predict(net: Callable[..., Any], latents: Tensor, timesteps: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The prediction, (N, ...) in the latents' dtype, for latents (N, ...) and the step table's timesteps (N,)."""
        raise NotImplementedError


class Networks:
    """Makes the networks that the loop calls, and caches their compiled and lean forms.

    guided:  the class to make. compile: compile the network. lean: use its lean form, where it has one.

    Compiled and lean forms are made again when the pipeline's network is replaced or changed. A network whose weights are
    offloaded, or cast layer by layer, is neither compiled nor made lean.
    """

    def __init__(self, guided: type[PromptedNetwork], compile: bool, lean: bool):
        self.guided, self._compile, self._lean = guided, compile, lean
        self._made: _Made | None = None
        self._warned = False

    def of(self, net: nn.Module, inputs: dict[str, Any], shared: dict[str, Any], plain: bool) -> PromptedNetwork:
        """Return the fastest network, which may transform the text first; plain: one that takes `encode`'s inputs unchanged."""
        made = self._now(net)
        if made is None:
            return self.guided(net, inputs, shared=shared)
        if plain or made.lean is None:
            return self.guided(made.plain, inputs, shared=shared, version=made.version)
        made.lean.refresh()
        inputs = {**inputs, "encoder_hidden_states": made.lean.text(inputs["encoder_hidden_states"])}
        return self.guided(made.one, inputs, made.both, shared, made.version)

    def _now(self, net: Any) -> _Made | None:
        if not (self._compile or self._lean):
            return None
        if hasattr(net, "_reset_stateful_cache"):
            net._reset_stateful_cache()  # adds an empty registry now, as the pipeline does after its first call
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
    """The compiled and lean forms of a network, and a snapshot of that network."""

    def __init__(self, net: nn.Module, compile: bool, lean: type[Lean] | None):
        prepare: Callable[[Any], Callable[..., Any]] = compiled if compile else lambda net: net
        self.plain = prepare(net)
        self.lean = None if lean is None else lean(net)
        if self.lean is not None:
            self.one, self.both = prepare(self.lean.one), prepare(self.lean.both)
        self._net, self.version = net, Snapshot(net)
        self._packed = checksum(net) if compile and net.device.type == "cpu" else None

    def still(self, net: nn.Module) -> bool:
        """Whether `net` is the network that these forms were made from, and unchanged."""
        same = net is self._net and self.version.holds()
        return same and (self._packed is None or checksum(net) == self._packed)


def hooked(net: nn.Module) -> bool:
    """Whether any weights of a module are offloaded, or cast layer by layer."""
    registries = (getattr(module, "_diffusers_hook", None) for module in net.modules())
    return any("_hf_hook" in vars(module) for module in net.modules()) or any(one and one.hooks for one in registries)


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested dicts and lists."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
