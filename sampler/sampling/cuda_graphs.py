"""The captured step: network and launch recorded as CUDA graphs, one a branch, and replayed. Runs on a GPU only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.state import State
from ..models import PromptedNetwork
from ..types import Branch, Pair
from .step_table import StepTable
from .steps import DeviceBatch, fused_step

log = logging.getLogger(__name__)
ROWS = 256  # the fewest rows of a session's table, else the next power of two, so that plans of several lengths share graphs
SESSIONS = 16  # shapes whose captured steps are kept
WARM_UP = 3  # steps before a capture, because libraries choose their algorithms and compilers compile in the first ones
_free = threading.Condition()  # held during a capture
_using = 0  # threads in `no_capture`


@contextmanager
def no_capture() -> Iterator[None]:
    """A context in which no thread captures. Threads beside the sampler's use a device in it.

    In a capture, waiting for a device raises an exception in every thread.
    """
    global _using
    with _free:
        _using += 1
    try:
        yield
    finally:
        with _free:
            _using -= 1
            _free.notify_all()


@contextmanager
def _alone() -> Iterator[None]:
    """A context in which no other thread captures or is in `no_capture`. A thread that is in `no_capture` must not enter it."""
    with _free:
        _free.wait_for(lambda: not _using)
        yield


class Graphs:
    """Captured steps by shape. All share one memory pool, which `clear` gives back.

    failure: why a step could not be captured. From then on steps run uncaptured; for want of memory, those of that batch alone.
    """

    def __init__(self) -> None:
        self._sessions: dict[tuple, Session] = {}  # the one that was used last is the last
        self._busy = threading.Lock()
        self._pool: Any = None
        self.failure: RuntimeError | None = None
        self._version: object | None = None

    def open_batch(
        self, network: PromptedNetwork, plan: StepTable, noise: Tensor, memory_format: torch.memory_format
    ) -> DeviceBatch:
        """A batch that begins from `noise` under `plan`. Its step is captured where that works.

        Captures of an earlier version of the network are dropped.
        """
        if network.version is not self._version:
            self.clear()
            self._version = network.version
        rows = max(ROWS, 2 ** (len(plan.table) - 1).bit_length())
        key = (tuple(noise.shape), noise.dtype, memory_format, network.form, rows, plan.multistep, plan.scaled, plan.rule)
        session = self._sessions.pop(key, None) or Session(network, plan, rows, noise, memory_format)
        session.network.load(network)
        session.table[: len(plan.table)].copy_(plan.table)
        if isinstance(self.failure, torch.OutOfMemoryError):
            self.failure = None
        if self.failure is None:
            try:
                self._capture(session, dict.fromkeys(plan.branches))
                self._sessions[key] = session
            except RuntimeError as error:
                self.failure = error.with_traceback(None)  # whose frames would keep a step's memory
                log.warning("the step cannot be captured (%s); it runs uncaptured", error)
        if len(self._sessions) > SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        take = session.replay if self.failure is None else session.take
        return DeviceBatch(session.network, session.start(noise, plan), take, session.table)

    def _capture(self, session: Session, branches: dict[Branch, None]) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        for branch in branches:
            if branch not in session.graphs:
                with _alone(), torch.cuda.device(session.table.device):  # the current device may be another one
                    session.capture(branch, self._pool)

    @contextmanager
    def used(self) -> Iterator[None]:
        """A context for one call of a sampler. Raises ValueError inside another: both would write into the same buffers."""
        if not self._busy.acquire(blocking=False):
            raise ValueError("a sampler with capture is called during another call of it: use a second sampler, or no capture")
        try:
            yield
        finally:
            self._busy.release()

    def clear(self) -> None:
        self._sessions.clear()
        self._pool = self._version = self.failure = None
        torch.cuda.empty_cache()


class Session:
    """The buffers that the graphs of one shape read and write, at fixed addresses.

    Guidance is data in the table, so one graph a branch serves all guidance of one rule. The graph records the general step, in
    which every sample looks for its transition. Samples that look for none lose microseconds, because a large sample, which
    several programs share, is read twice.
    """

    def __init__(self, network: PromptedNetwork, plan: StepTable, rows: int, noise: Tensor, memory_format: torch.memory_format):
        self.network, self.table = network, plan.table.new_zeros((rows, plan.table.shape[1]))
        shape = tuple(noise.shape)
        self.state = State.empty(shape, rows, noise.dtype, noise.device, plan.multistep, plan.scaled, memory_format)
        self.state.start(noise, self.table)
        self.take = fused_step(network, replace(plan, table=self.table, finds=True), self.state)
        self.graphs: dict[Branch, tuple[torch.cuda.CUDAGraph, Pair]] = {}

    def start(self, noise: Tensor, plan: StepTable) -> State:
        """The state at the start of `plan`. It has as many gaps as the plan has steps."""
        self.state.start(noise, self.table, last=plan.last)
        transition = replace(self.state.transition, gaps=self.state.transition.gaps[:, : plan.steps])
        return replace(self.state, transition=transition)

    def capture(self, branch: Branch, pool: Any) -> None:
        """Record a step; the state is overwritten. Raises RuntimeError if a step makes the host wait or cannot be captured."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.take(branch)
                with _no_waiting():  # before the capture: one that fails half-way leaves torch in the middle of it
                    self.take(branch)
        finally:
            current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Its own default stream is one of the first device that was captured on. Other threads may allocate memory.
        recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(current), recording:  # restores `current` even if the capture fails
            pair = self.take(branch)
        self.graphs[branch] = graph, pair  # the pair is kept, so that no other graph of the pool gets its memory

    def replay(self, branch: Branch) -> Pair:
        graph, pair = self.graphs[branch]
        graph.replay()
        return pair


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Make every operation that waits for the device raise RuntimeError."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
