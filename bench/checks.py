"""What the kernels must do on a GPU, checked against float64 definitions. Imports torch and basinescape.kernels alone.

A check takes a device and returns its figures; it raises AssertionError where they are wrong, `Skipped` where it cannot look.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from basinescape.kernels import guide, noise_gap
from basinescape.kernels.guide import guide_eager
from basinescape.kernels.state import Column, Rule, State
from basinescape.kernels.step import resident_programs, step
from basinescape.kernels.tiles import TILES
from torch import Tensor

Figures = dict[str, Any]
STEPS = 7
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # and how far a step may be off
SD, SDXL, SD3, VIDEO = (4, 64, 64), (4, 128, 128), (16, 128, 128), (16, 21, 60, 104)
SIZES = ((1,), (5, 7), (3, 5, 7), SD, (3, 80, 81), SDXL, SD3, VIDEO)
LAYOUTS = ("contiguous", "channels last", "halves", "apart")


class Skipped(Exception):
    """A check that cannot be made here; the message says why."""


@dataclass(frozen=True)
class Mode:
    """A way the step is launched: latents of `shape`, samples that look for their transition or not.

    alone: one prediction is all that is needed. apart: tiles are not allowed to meet. launches: how many it takes.
    """

    shape: tuple[int, ...]
    finds: bool
    alone: bool = False
    apart: bool = False
    launches: int = 1

    def active(self) -> AbstractContextManager:
        """The context that brings it about."""
        return patch("basinescape.kernels.step.resident_programs", return_value=0) if self.apart else nullcontext()


MODES = {
    "one block": Mode(SD, finds=False),
    "one block, first minimum": Mode(SD, finds=True),
    "one prediction": Mode(SD, finds=False, alone=True),
    "tiles, weight known": Mode(SDXL, finds=False),
    "tiles that meet, SDXL": Mode(SDXL, finds=True),
    "tiles that meet, SD3": Mode(SD3, finds=True),
    "tiles, one prediction": Mode(SDXL, finds=False, alone=True),
    "tiles, gap known, SDXL": Mode(SDXL, finds=True, apart=True, launches=2),
    "tiles, gap known, video": Mode(VIDEO, finds=True, launches=2),
}


def require(right: bool, message: str) -> None:
    if not right:
        raise AssertionError(message)


def laid_out(x: Tensor, layout: str) -> Tensor | None:
    """`x` (B, ...) with the same values in another layout; None where there is none."""
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else None
    if layout == "halves":
        return torch.cat([x, x]).chunk(2)[1]
    return torch.stack([x, x], dim=1)[:, 0] if layout == "apart" else x


def pairs(batch: int, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layout, uncond, cond) of one size."""
    rng = torch.Generator(device).manual_seed(0)
    uncond, cond = torch.randn((2, batch, *size), generator=rng, device=device).to(dtype)
    for layout in LAYOUTS:
        u, c = laid_out(uncond, layout), laid_out(cond, layout)
        if u is not None and c is not None:
            yield layout, u, c


def check_guide(device: torch.device) -> Figures:
    """guide and noise_gap over sizes, dtypes and layouts; the bits of the eager definition are a figure, no condition."""
    figures: Figures = {"cases": 0, "same bits as eager": 0}
    for dtype in DTYPES:
        largest = gap_error = 0.0
        for size in SIZES:
            for layout, uncond, cond in pairs(3, size, dtype, device):
                for weight in (7.5, torch.tensor([0.0, -2.0, 7.5], device=device)):
                    guided, gap = guide(uncond, cond, weight)
                    wide = uncond.double(), cond.double()
                    expected, distance = guide_eager(*wide, weight)
                    room = wide[0].abs() + 7.5 * (wide[1] - wide[0]).abs() + torch.finfo(dtype).smallest_normal
                    error = ((guided.double() - expected).abs() / room).max().item()
                    apart = ((gap.double() - distance).abs() / distance).max().item()
                    where = f"{dtype}, {size}, {layout}: guided off by {error:.2g}, gap by {apart:.2g}"
                    require(error <= 2 * torch.finfo(dtype).eps and apart <= 1e-5, where)
                    require(torch.equal(gap, noise_gap(uncond, cond)), f"{where}; noise_gap differs from guide's gap")
                    figures["cases"] += 1
                    figures["same bits as eager"] += torch.equal(guided, guide_eager(uncond, cond, weight)[0])
                    largest, gap_error = max(largest, error), max(gap_error, apart)
        figures[str(dtype)] = {"guided": largest, "gap": gap_error}
    return figures


class Exact:
    """The samples of a state, each followed in float64 from the definitions."""

    def __init__(self, state: State, table: Tensor, rule: Rule | None):
        self.table, self.rule = table.double().cpu(), rule
        self.latents = state.latents.double()
        self.history = torch.zeros_like(self.latents)
        self.at, self.left = state.step.tolist(), state.transition.tolist()
        self.gaps: list[dict[int, float]] = [{} for _ in self.at]

    def take(self, uncond: Tensor, cond: Tensor | None) -> None:
        for i, k in enumerate(self.at):
            row, guided = self.table[k].tolist(), uncond[i].double()
            if cond is not None:
                difference = cond[i].double() - guided
                self._look(i, k, difference.norm().item(), row)
                guided = guided + row[Column.AFTER if 0 <= self.left[i] <= k else Column.BEFORE] * difference
            x, a, b, p, q = self.latents[i].clone(), *row[Column.A : Column.Q + 1]
            self.latents[i] = a * x + b * guided + self.history[i]
            self.history[i] = p * x + q * guided
            self.at[i] = k + 1

    def _look(self, i: int, k: int, gap: float, row: list[float]) -> None:
        gaps, rule = self.gaps[i], self.rule
        if rule is not None and self.left[i] < 0:
            before, last = gaps.get(k - 2, -math.inf), gaps.get(k - 1, math.inf)
            minimum = k >= max(rule.earliest, 2) and before > last < gap
            minimum = minimum and last <= (1 - rule.drop) * max(gaps.values())
            if minimum or gap <= row[Column.LIMIT] or k >= rule.latest:
                self.left[i] = k + rule.wait
        gaps[k] = gap


def table_of(rng: torch.Generator, multistep: bool, scaled: bool, steps: int = STEPS) -> Tensor:
    """Random steps that neither grow nor vanish."""
    table = torch.rand((steps, len(Column)), generator=rng) * 2 - 1
    table[:, Column.LIMIT] = -torch.inf
    if not multistep:
        table[:, [Column.P, Column.Q]] = 0
    if not scaled:
        table[:, Column.INPUT_SCALE] = 1
    return table


def started(
    mode: Mode, batch: int, dtype: torch.dtype, device: torch.device, wide: bool = True, layout: str = "contiguous"
) -> tuple[State, Tensor, Rule | None]:
    """A state at its first step; `wide`: with history and scaled input."""
    rng = torch.Generator().manual_seed(1)
    table = table_of(rng, wide, wide).to(device)
    form = torch.channels_last if layout == "channels last" else torch.contiguous_format
    state = State.empty((batch, *mode.shape), STEPS, dtype, device, wide, wide, form)
    noise = torch.randn((batch, *mode.shape), generator=rng).to(device, dtype)
    return state.start(noise, table, None if mode.finds else 3), table, Rule() if mode.finds else None


def predictions(mode: Mode, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(uncond, cond) of each step; the gaps of each sample go up and down, each its own way."""
    rng = torch.Generator(device).manual_seed(2)
    shape = (batch, *mode.shape)
    for _ in range(STEPS):
        sizes = torch.rand((batch, *[1] * len(mode.shape)), generator=rng, device=device) + 0.1
        uncond = torch.randn(shape, generator=rng, device=device).to(dtype)
        cond = uncond.float() + sizes * torch.randn(shape, generator=rng, device=device)
        yield uncond, None if mode.alone else cond.to(dtype)


def check_step(device: torch.device) -> Figures:
    """The step in every mode, dtype and layout, with and without history, samples at steps of their own."""
    figures = {}
    for name, mode in MODES.items():
        with mode.active():
            for dtype, tolerance in DTYPES.items():
                worst = max(_follow(mode, dtype, wide, layout, device) for wide in (True, False) for layout in LAYOUTS)
                figures[f"{name}, {dtype}"] = worst
                require(worst <= tolerance, f"{name}, {dtype}: latents off by {worst:.2g}")
    return figures


def _follow(mode: Mode, dtype: torch.dtype, wide: bool, layout: str, device: torch.device) -> float:
    if layout == "channels last" and len(mode.shape) != 3:
        return 0.0
    state, table, rule = started(mode, 3, dtype, device, wide, layout)
    state.step.copy_(torch.tensor([0, 2, 1]))
    exact, worst = Exact(state, table, rule), 0.0
    for uncond, cond in list(predictions(mode, 3, dtype, device))[: STEPS - 2]:
        step(laid_out(uncond, layout), None if cond is None else laid_out(cond, layout), table, state, rule)
        exact.take(uncond, cond)
        error = (state.latents.double() - exact.latents).abs() / (1 + exact.latents.abs())
        worst = max(worst, error.max().item())
        where = f"{mode}, {dtype}, {layout}"
        require(state.transition.tolist() == exact.left, f"{where}: transitions {state.transition.tolist()}, not {exact.left}")
        require(state.step.tolist() == exact.at, f"{where}: steps {state.step.tolist()}, not {exact.at}")
        for i, gaps in enumerate(exact.gaps):
            for k, gap in gaps.items():
                require(abs(state.gaps[i, k].item() - gap) <= 1e-5 * gap, f"{where}: gap {state.gaps[i, k]}, not {gap}")
        _require_fed(state, table, dtype, where)
        if state.history is not None:
            require(torch.allclose(state.history.double(), exact.history, atol=1e-4, rtol=1e-4), f"{where}: history")
        exact.latents = state.latents.double()  # roundings do not add up
    return worst


def _require_fed(state: State, table: Tensor, dtype: torch.dtype, where: str) -> None:
    """The network's next input and timestep are those of the latents and steps."""
    rows = state.rows(table)
    scale = rows[:, Column.INPUT_SCALE].view(-1, *[1] * (state.latents.ndim - 1))
    tolerance = torch.finfo(dtype).eps
    for half in state.model_input.chunk(2):
        require(torch.allclose(half.float(), state.latents.float() * scale, atol=tolerance, rtol=tolerance), f"{where}: input")
    require(torch.equal(state.timestep, rows[:, Column.TIMESTEP].repeat(2)), f"{where}: timestep")


def check_batches(device: torch.device) -> Figures:
    """A sample has the same bits in any batch."""
    for name, mode in MODES.items():
        with mode.active():
            for dtype in DTYPES:
                after = {chosen: _bits(mode, list(chosen), dtype, device) for chosen in ((0, 1, 2, 3, 4), (3,), (3, 1))}
                for chosen, found in after.items():
                    at = chosen.index(3)
                    same = (torch.equal(a[at], b[3]) for a, b in zip(found, after[0, 1, 2, 3, 4], strict=True))
                    require(all(same), f"{name}, {dtype}: sample 3 differs in batch {chosen}")
    return {"modes": len(MODES), "dtypes": len(DTYPES)}


def _bits(mode: Mode, chosen: list[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    all_of, table, rule = started(mode, 5, dtype, device)
    state = State.empty((len(chosen), *mode.shape), STEPS, dtype, device, True, True)
    state.start(all_of.latents[chosen], table, None if mode.finds else 3)
    for uncond, cond in predictions(mode, 5, dtype, device):
        step(uncond[chosen], None if cond is None else cond[chosen], table, state, rule)
    return [state.latents, state.gaps.nan_to_num(-1), state.transition]


@dataclass
class Run:
    """A loop over a network that is a product of elements: it can be taken again, and captured."""

    mode: Mode
    state: State
    table: Tensor
    rule: Rule | None
    noise: Tensor
    pattern: Tensor

    @classmethod
    def of(cls, mode: Mode, batch: int, dtype: torch.dtype, device: torch.device) -> Run:
        state, table, rule = started(mode, batch, dtype, device)
        rng = torch.Generator(device).manual_seed(3)
        pattern = 0.3 * torch.randn(state.model_input.shape, generator=rng, device=device)
        return cls(mode, state, table, rule, state.latents.clone(), pattern.to(dtype))

    def restart(self) -> None:
        self.state.start(self.noise, self.table, None if self.mode.finds else 3)

    def take(self) -> None:
        uncond, cond = (self.state.model_input * self.pattern).chunk(2)
        step(uncond, None if self.mode.alone else cond, self.table, self.state, self.rule)

    def result(self) -> list[Tensor]:
        self.restart()
        for _ in range(STEPS):
            self.take()
        return self.snapshot()

    def snapshot(self) -> list[Tensor]:
        """All that a step writes; arrivals count on for ever."""
        written = {name: value for name, value in vars(self.state).items() if name not in ("arrivals", "partials", "scratch")}
        return [value.nan_to_num(-1) for value in written.values() if value is not None]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check_streams(device: torch.device) -> Figures:
    """Launches that meet, overlapping on many streams from one thread and from many, beside work that fills the GPU."""
    meeting = [mode for mode in MODES.values() if mode.finds and not mode.apart]
    runs = [Run.of(mode, batch, torch.float16, device) for mode in meeting for batch in (1, 3)]
    expected = [run.result() for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    filler, square = torch.cuda.Stream(), torch.randn((2048, 2048), device=device)
    torch.cuda.synchronize()
    rounds = 30
    for turn in range(rounds):
        with torch.cuda.stream(filler):
            for _ in range(20):
                square @ square
        (_in_threads if turn % 2 else _interleaved)(runs, streams)
        torch.cuda.synchronize()
        for run, right in zip(runs, expected, strict=True):
            require(same(run.snapshot(), right), f"round {turn}: {run.mode} differs from its serial run")
    return {"streams": len(streams), "rounds": rounds, "launches": rounds * len(runs) * STEPS}


def _interleaved(runs: list[Run], streams: list[torch.cuda.Stream]) -> None:
    for k in range(STEPS):
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                if k == 0:
                    run.restart()
                run.take()


def _in_threads(runs: list[Run], streams: list[torch.cuda.Stream]) -> None:
    def work(run: Run, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            run.restart()
            for _ in range(STEPS):
                run.take()

    threads = [threading.Thread(target=work, args=pair) for pair in zip(runs, streams, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def each_run(device: torch.device) -> Iterator[tuple[str, Run]]:
    """A warmed-up run of each mode, active."""
    for name, mode in MODES.items():
        with mode.active():
            run = Run.of(mode, 2, torch.float16, device)
            run.result()
            yield name, run


def check_synchronisation(device: torch.device) -> Figures:
    """No step makes the host wait."""
    for _, run in each_run(device):
        run.restart()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(STEPS):
                run.take()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"modes": len(MODES)}


def check_capture(device: torch.device) -> Figures:
    """A captured step, replayed, is the step."""
    for name, run in each_run(device):
        expected = run.result()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run.take()
        run.restart()
        for _ in range(STEPS):
            graph.replay()
        require(same(run.snapshot(), expected), f"{name}: captured and uncaptured differ")
    return {"modes": len(MODES)}


def check_launches(device: torch.device) -> Figures:
    """Kernels, copies and fills of one step, as the profiler sees them on the device."""
    probe = torch.zeros(8, device=device)
    _kernels(lambda: None)  # the first profile also sees the profiler's own start
    if _kernels(lambda: probe.add_(1)) != 1:
        raise Skipped("the profiler sees no kernels here")
    figures = {}
    for name, run in each_run(device):
        uncond, cond = (run.state.model_input * run.pattern).chunk(2)
        arguments = uncond, None if run.mode.alone else cond, run.table, run.state, run.rule
        figures[name] = _kernels(partial(step, *arguments))
        require(figures[name] == run.mode.launches, f"{name}: {figures[name]} launches, not {run.mode.launches}")
    return figures


def _kernels(call: Callable[[], object]) -> int:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def check_residence(device: torch.device) -> Figures:
    """One sample that needs every resident program at once: the launch is refused, or hangs, unless they all are."""
    programs, (tile, _) = resident_programs(device), TILES.tile
    mode = Mode((programs, tile), finds=True)
    figures = {"programs": programs, "elements": programs * tile}
    for dtype, tolerance in DTYPES.items():
        state, table, rule = started(mode, 1, dtype, device)
        exact = Exact(state, table, rule)
        for uncond, cond in predictions(mode, 1, dtype, device):
            step(uncond, cond, table, state, rule)
            exact.take(uncond, cond)
            error = ((state.latents.double() - exact.latents).abs() / (1 + exact.latents.abs())).max().item()
            require(error <= tolerance, f"{dtype}: latents off by {error:.2g}")
            exact.latents = state.latents.double()
        require(state.transition.tolist() == exact.left, f"{dtype}: transition {state.transition.tolist()}, not {exact.left}")
    return figures


CHECKS: dict[str, Callable[[torch.device], Figures]] = {
    "guide": check_guide,
    "step": check_step,
    "batches": check_batches,
    "launches": check_launches,
    "synchronisation": check_synchronisation,
    "capture": check_capture,
    "residence": check_residence,
    "streams": check_streams,
}
