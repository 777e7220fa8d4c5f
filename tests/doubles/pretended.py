"""A CUDA device that is not there, for what must hold on one before there is one.

Its tensors say they are on cuda:0 and keep their values on the CPU; its kernels run in Triton's interpreter. As on the real
one, operands on two devices are refused, reads and copies that make the host wait are counted, and refused in a capture, and a
captured graph is a recording of operators that computes nothing until it is replayed, without Python. The profiler sees its
launches and waits; torch.compile leaves functions as they are. What a GPU does at its own pace (streams, memory order, speed)
is not seen.
"""

from __future__ import annotations

import ctypes
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType, profiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
# Without it a CPU build of torch does not slice what says it is on a GPU: nobody there guards the current device.
GUARD = r"""
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


def install_guard(folder: Path) -> None:
    """Build and register a guard that does nothing, for the life of the process."""
    source, library, home = folder / "guard.cpp", folder / "libguard.so", Path(torch.__file__).parent
    source.write_text(GUARD)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(source), "-o", str(library)]
    subprocess.run([*command, f"-L{home / 'lib'}", "-lc10"], check=True)
    ctypes.CDLL(str(library))


class OnDevice(Tensor):
    """A tensor of `device`; `held` are its values, on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor, device: Device) -> OnDevice:
        form = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, **form, device="cuda:0")
        made.held, made.owner = held, device
        return made

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __format__(self, how: str) -> str:
        return format(self.cpu(), how)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = self.detach().clone()
        made = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
        return memo.setdefault(id(self), made)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):  # from a thread the mode is not active in
        owner = next(leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, cls)).owner
        return owner.call(function, arguments, keywords or {})


class Elsewhere(TorchDispatchMode):
    """The device, in another thread than the one that it was entered in."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return self.device.call(function, arguments, keywords or {})


class Graph:
    """In the place of torch.cuda.CUDAGraph: operators on values, and where their results go."""

    def __init__(self) -> None:
        self.recorded: list[tuple[Callable[[], Any], Any]] = []
        self.owner: Device | None = None

    def replay(self) -> None:
        self.owner.launched("cudaGraphLaunch", len(self.recorded))
        with patch.object(self.owner, "seen", None), torch.inference_mode(False), torch.no_grad():
            for again, results in self.recorded:
                for old, new in zip(_tensors(results), _tensors(again()), strict=True):
                    if old is not new:
                        old.copy_(new)


class Device(TorchDispatchMode):
    """The device, while it is entered.

    waits: how often the host has waited. raises: whether that is an error. graph: what is being captured. seen: what a profiler
    has seen. is_full: whether the next operator that needs memory finds none. current: torch's current device; this one is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.raises, self.is_full, self.current = 0, False, False, 0
        self.graph: Graph | None = None
        self.seen: list[SimpleNamespace] | None = None
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._lock = threading.RLock()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return self.call(function, arguments, keywords or {})

    def call(self, function, arguments, keywords):
        """The operator, on the values of its operands."""
        if function._can_decompose():
            with self:
                return function.decompose(*arguments, **keywords)
        self.see(function._schema.name)
        operands = _tensors((arguments, keywords))
        here = {id(x.held): x for x in operands if isinstance(x, OnDevice)}
        target = keywords.get("device")
        lands = bool(here) if target is None else torch.device(target).type == "cuda"
        if not here and not lands:
            return function(*arguments, **keywords)
        if function is aten._fused_sdp_choice.default:
            return 0  # plain operators
        self._check(function, operands, lands)
        values, named = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (arguments, keywords))
        if target is not None:
            named["device"] = torch.device("cpu")
        with self._lock, torch.inference_mode(False), torch.no_grad():
            result = self._run(function, values, named)
            return tree_map(lambda x: self._placed(x, here), result) if lands else result

    @contextmanager
    def full(self) -> Iterator[None]:
        """Inside, there is no memory left."""
        self.is_full = True
        try:
            yield
        finally:
            self.is_full = False

    def _placed(self, x: Any, here: dict[int, OnDevice]) -> Any:
        if not isinstance(x, Tensor):
            return x
        if self.is_full and _where(x) not in {_where(known.held) for known in here.values()}:
            raise torch.OutOfMemoryError("the pretended GPU is full")
        return here[id(x)] if id(x) in here else OnDevice(x, self)

    def _check(self, function, operands: list[Tensor], lands: bool) -> None:
        strange = [x for x in operands if not isinstance(x, OnDevice) and x.ndim]
        if strange and function not in COPIES:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found cuda:0 and cpu")
        picks = function is aten.index.Tensor and any(x.dtype == torch.bool for x in operands[1:])
        if function in READS or picks or (function in COPIES and (strange or not lands)):
            if self.graph is not None or self.raises:
                raise RuntimeError(f"{function} makes the host wait")
            self.waits += 1
            self.see("cudaStreamSynchronize")

    def see(self, name: str, where: DeviceType = DeviceType.CPU) -> None:
        if self.seen is not None:
            self.seen.append(SimpleNamespace(name=name, device_type=where, cpu_parent=None))

    def launched(self, how: str = "cudaLaunchKernel", kernels: int = 1) -> None:
        self.see(how)
        for _ in range(kernels):
            self.see("kernel", DeviceType.CUDA)

    @contextmanager
    def profile(self, **_: Any) -> Iterator[SimpleNamespace]:
        """In the place of torch.autograd.profiler.profile."""
        self.seen = []
        try:
            yield SimpleNamespace(function_events=self.seen)
        finally:
            self.seen = None

    def _run(self, function, values, named):
        if self.graph is None:
            result = function(*values, **named)
            if function.namespace == "aten" and not _is_free(function, values, named, result):
                self.launched()
            return result
        for argument, value in _given(function, values, named):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in _tensors(value):
                    self._before.setdefault(_where(x), (_memory(x), _memory(x).clone()))
        with patch.object(self, "seen", None):
            result = function(*values, **named)
        if not _is_free(function, values, named, result):
            self.graph.recorded.append((lambda: function(*values, **named), result))
        return result

    @contextmanager
    def capture(self, graph: Graph, **_: Any) -> Iterator[None]:
        """In the place of torch.cuda.graph: records, puts back what was written, and spoils what was made. Where another device
        is the current one, it records nothing: all runs at once."""
        graph.owner, self._before = self, {}
        self.graph = None if self.current else graph
        try:
            yield
        finally:
            self.graph = None
            with torch.inference_mode(False), torch.no_grad():
                for memory, was in self._before.values():
                    memory.copy_(was)
                for made in _tensors([results for _, results in graph.recorded]):
                    if made.is_floating_point() and _where(made) not in self._before:
                        made.fill_(torch.nan)

    @contextmanager
    def made_current(self, device: Any) -> Iterator[None]:
        """In the place of torch.cuda.device."""
        before, self.current = self.current, getattr(device, "index", device) or 0
        try:
            yield
        finally:
            self.current = before

    def watch(self, mode: str | int) -> None:
        """In the place of torch.cuda.set_sync_debug_mode."""
        self.raises = mode in ("error", 2)


def _is_free(function, values, named, result) -> bool:
    """Whether the operator makes a view or memory alone: it computes nothing."""
    operands = _tensors((values, named))
    mine, memory = {id(x) for x in operands}, {_where(x) for x in operands}
    view = any(id(x) not in mine and _where(x) in memory for x in _tensors(result))
    return view or "empty" in function._schema.name


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _given(function, values, named) -> Iterator[tuple[Any, Any]]:
    """The operator's arguments and what was given for each."""
    for i, argument in enumerate(function._schema.arguments):
        yield argument, values[i] if i < len(values) else named.get(argument.name)


def _where(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _memory(x: Tensor) -> Tensor:
    """All of the memory that `x` lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


class Stream:
    """All streams are one."""

    cuda_stream = 0

    def wait_stream(self, other: Stream) -> None:
        pass


OnCPU = torch.Generator


class Generator(type):
    """The class in the place of torch.Generator: those of the device are on the CPU, where its values are."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return OnCPU()

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, OnCPU)


class Event:
    """The device is done when the host is."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@contextmanager
def pretended() -> Iterator[Device]:
    """Let there be a CUDA device. Needs `install_guard` on a CPU build of torch."""
    from triton.runtime.interpreter import GridExecutor

    device, execute, run = Device(), GridExecutor.__call__, threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)  # which holds for a thread
        with Elsewhere(device):
            run(thread)

    def counted(*given: Any, **named: Any) -> None:
        device.launched("cuLaunchKernelEx")
        execute(*given, **named)

    replaced = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: device.graph is not None,
        "device": device.made_current,
        "device_of": lambda _: nullcontext(),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (2**36, 2**36),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "get_sync_debug_mode": lambda: 2 * device.raises,
        "set_sync_debug_mode": device.watch,
        "get_device_name": lambda *_: "a pretended GPU",
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *_: Stream(),
        "stream": lambda _: nullcontext(),
        "CUDAGraph": Graph,
        "graph": device.capture,
        "graph_pool_handle": object,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(threading.Thread, "run", run_there))
        stack.enter_context(patch.object(GridExecutor, "__call__", counted))
        stack.enter_context(patch.object(profiler, "profile", device.profile))
        stack.enter_context(patch.object(torch, "compile", lambda function, **_: function))
        stack.enter_context(patch.object(torch, "Generator", Generator("Generator", (), {})))
        # Modules moved to the device get new parameters, and torch.tensor(..., device="cuda") starts on the CPU: either would
        # go past the mode otherwise.
        for switch in (torch.__future__.set_overwrite_module_params_on_conversion, torch._C._set_only_lift_cpu_tensors):
            switch(True)
            stack.callback(switch, False)
        yield stack.enter_context(device)
