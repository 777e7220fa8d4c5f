"""The captured step: network and launch recorded as CUDA graphs, one a branch, and replayed. Runs on a GPU only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .kernels.state import State
from .loop import Branch, Plan, Step, fused_step
from .models import GuidedUNet

log = logging.getLogger(__name__)
WARM_UP = 3  # runs before a capture: libraries choose their algorithms and compilers compile in the first ones


class Graphs:
    """Captured steps by shape, all in one memory pool; `clear` gives the memory back."""

    def __init__(self) -> None:
        self._sessions: dict[tuple, Session] = {}
        self._pool: Any = None
        self._failed = False
        self._version: object | None = None

    def step(self, network: GuidedUNet, plan: Plan, noise: Tensor, memory_format: torch.memory_format) -> tuple[Step, State]:
        """A step to take from `noise` under `plan`, captured where that works, and the state it updates.

        What was captured of an earlier version of the network is given back.
        """
        if network.version is not self._version:
            self.clear()
            self._version = network.version
        form = tuple(noise.shape), noise.dtype, memory_format, network.form
        key = (*form, len(plan.table), plan.rule, plan.multistep, plan.scaled)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(network, plan, plan.state(noise, memory_format))
        session.network.load(network.inputs["both"])
        session.plan.table.copy_(plan.table)
        if not self._failed:
            try:
                self._capture(session, dict.fromkeys(plan.branches))
            except RuntimeError as error:
                self._failed = True
                log.warning("the step cannot be captured (%s); it runs uncaptured", error)
        session.state.start(noise, session.plan.table, plan.transition)
        return (session.take if self._failed else session.replay), session.state

    def _capture(self, session: Session, branches: dict[Branch, None]) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        for branch in branches:
            if branch not in session.graphs:
                session.capture(branch, self._pool)

    def clear(self) -> None:
        self._sessions.clear()
        self._pool = self._version = None
        self._failed = False
        torch.cuda.empty_cache()


class Session:
    """What the graphs of one shape read and write, in memory that stays where it is."""

    def __init__(self, network: GuidedUNet, plan: Plan, state: State):
        self.network, self.plan, self.state = network, plan, state
        self.take = fused_step(network, plan, state)
        self.graphs: dict[Branch, torch.cuda.CUDAGraph] = {}

    def capture(self, branch: Branch, pool: Any) -> None:
        """Record a step; the state's contents are lost. Raises RuntimeError where a step makes the host wait, or is refused."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.take(branch)
                with _no_waiting():  # better refused here: a capture that breaks off leaves torch in the midst of it
                    self.take(branch)
        finally:
            current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(current), torch.cuda.graph(graph, pool=pool):  # `current` again, however the capture ends
            self.take(branch)
        self.graphs[branch] = graph

    def replay(self, branch: Branch) -> None:
        self.graphs[branch].replay()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
