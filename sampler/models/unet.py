"""The UNet of SD and SDXL as the network of the loop: plain, compiled, lean, and made again when the pipeline's has changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..loop import Branch
from .changes import Snapshot, checksum
from .lean import Lean

log = logging.getLogger(__name__)

# On a CPU: weights packed for the kernels of each compiled shape, which takes memory for each, and kernels called from C++.
PACKED = {"freezing": True, "cpp_wrapper": True}
RECOMPILE_LIMIT = 64  # shapes compiled before the compiler gives up; its own limit of 8 is that of a few batch sizes


def compiled(unet: nn.Module) -> Callable[..., Any]:
    """The UNet compiled for one shape after another, its convolutions channels-last; without graphs of the compiler's own."""
    cpu = unet.device.type == "cpu"
    fast = torch.compile(unet.to(memory_format=torch.channels_last), dynamic=False, options=PACKED if cpu else None)
    return traced(fast, packed=cpu)


def traced(compiled: Callable[..., Any], packed: bool) -> Callable[..., Any]:
    """A compiled function, with what must be known in each call: RECOMPILE_LIMIT, and for PACKED that weights are constant."""
    from torch._dynamo import config as tracer
    from torch._inductor import config as compiler

    def call(*arguments: Any, **keywords: Any) -> Any:
        with tracer.patch(recompile_limit=RECOMPILE_LIMIT), compiler.patch(freezing=packed):
            return compiled(*arguments, **keywords)

    return call


class Networks:
    """The networks of one UNet after another, each for one batch of encoded prompts after another.

    compile, lean: have the UNet compiled, and as `Lean` has it where that suits it. Either is made of the UNet as it was: it is
    made again when the UNet is another, or changed in any way. One whose weights come and go (offloaded, cast layer by layer)
    runs as it is.
    """

    def __init__(self, compile: bool, lean: bool):
        self._compile, self._lean = compile, lean
        self._made: _Made | None = None
        self._warned = False

    def plain(self, unet: nn.Module, inputs: dict[str, Any]) -> GuidedUNet:
        """A network whose inputs are as `encode` gives them."""
        made = self._now(unet)
        return GuidedUNet(unet, inputs) if made is None else GuidedUNet(made.plain, inputs, version=made.version)

    def fast(self, unet: nn.Module, inputs: dict[str, Any]) -> GuidedUNet:
        """The fastest network there is."""
        made = self._now(unet)
        if made is None or made.lean is None:
            return self.plain(unet, inputs)
        made.lean.refresh()
        text = made.lean.text(inputs["encoder_hidden_states"])
        return GuidedUNet(made.one, {**inputs, "encoder_hidden_states": text}, made.both, version=made.version)

    def _now(self, unet: nn.Module) -> _Made | None:
        if not (self._compile or self._lean):
            return None
        if any("_hf_hook" in vars(module) or "_diffusers_hook" in vars(module) for module in unet.modules()):
            self._made = None
            if not self._warned:
                log.warning("the network's weights come and go (offloaded, or cast layer by layer): it runs as it is")
                self._warned = True
        elif self._made is None or not self._made.still(unet):
            self._made = None  # gives its memory back first
            self._made = _Made(unet, self._compile, self._lean and Lean.suits(unet))
        return self._made


class _Made:
    """What has been made of a UNet, and what the UNet was then."""

    def __init__(self, unet: nn.Module, compile: bool, lean: bool):
        prepare = compiled if compile else lambda unet: unet
        self.plain = prepare(unet)
        self.lean = Lean(unet) if lean else None
        if self.lean is not None:
            self.one, self.both = prepare(self.lean.one), prepare(self.lean.both)
        self._unet, self.version = unet, Snapshot(unet)
        self._packed = checksum(unet) if compile and unet.device.type == "cpu" else None

    def still(self, unet: nn.Module) -> bool:
        """Whether `unet` is the one this was made of, unchanged."""
        same = unet is self._unet and self.version.holds()
        return same and (self._packed is None or checksum(unet) == self._packed)


def memory_format(unet: nn.Module) -> torch.memory_format:
    """That of the UNet's convolutions, in which it also returns its prediction."""
    weight = unet.conv_in.weight
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


class GuidedUNet:
    """A UNet and the encoded prompts of one batch, as the `Network` of the loop.

    unet:    the pipeline's, or the same compiled.
    inputs:  its keyword arguments by sample, from `encode`. shared: the others.
    both:    what is called for both halves at once; None for `unet`.
    version: stays the same object while the network does, so that a call may be recorded; None where none may.
    """

    def __init__(
        self,
        unet: Callable[..., Any],
        inputs: dict[str, Any],
        both: Callable[..., Any] | None = None,
        shared: dict[str, Any] | None = None,
        version: object | None = None,
    ):
        self.unet, self.both = unet, unet if both is None else both
        self.shared, self.version = shared or {}, version
        batch = len(inputs["encoder_hidden_states"]) // 2
        halves = {"uncond": slice(0, batch), "cond": slice(batch, None), "both": slice(None)}
        self.inputs = {branch: _rows(inputs, rows) for branch, rows in halves.items()}

    @property
    def form(self) -> tuple:
        """Shapes and dtypes of the inputs."""
        return tuple((tuple(x.shape), x.dtype) for x in _tensors(self.inputs["both"]))

    @property
    def row_form(self) -> tuple:
        """Shapes and dtypes of what the inputs are for one sample."""
        return tuple((tuple(x.shape[1:]), x.dtype) for x in _tensors(self.inputs["both"]))

    @property
    def dtype(self) -> torch.dtype:
        """Of its inputs, as of the latents."""
        return self.inputs["both"]["encoder_hidden_states"].dtype

    def blank(self, batch: int) -> GuidedUNet:
        """The same for `batch` samples, which `put` gives their prompts."""
        inputs = _mapped(lambda x: x.new_zeros((2 * batch, *x.shape[1:])), self.inputs["both"])
        return GuidedUNet(self.unet, inputs, self.both, self.shared, self.version)

    def put(self, place: int, other: GuidedUNet, row: int) -> None:
        """Put a sample's prompt in the place of another, in the same memory."""
        for old, new in zip(_tensors(self.inputs["both"]), _tensors(other.inputs["both"]), strict=True):
            old[place :: len(old) // 2].copy_(new[row :: len(new) // 2])

    def select(self, index: Tensor) -> GuidedUNet:
        """The same for some samples of the batch, `index` (N,) int64."""
        batch = len(self.inputs["cond"]["encoder_hidden_states"])
        inputs = _rows(self.inputs["both"], torch.cat([index, index + batch]))
        return GuidedUNet(self.unet, inputs, self.both, self.shared, self.version)

    def load(self, inputs: dict[str, Any]) -> None:
        """Put other prompts in the place of those given at first, in the same memory."""
        for old, new in zip(_tensors(self.inputs["both"]), _tensors(inputs), strict=True):
            old.copy_(new)

    def __call__(self, latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
        unet = self.both if branch == "both" else self.unet
        return unet(latents, timesteps, **self.inputs[branch], **self.shared, return_dict=False)[0]


def _rows(value: Any, rows: slice | Tensor) -> Any:
    return _mapped(lambda x: x[rows], value)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(change, inner) for name, inner in value.items()}
    return [change(inner) for inner in value] if isinstance(value, list) else change(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
