"""What the kernels must do on a GPU, checked against float64 definitions. Needs torch and triton alone.

A check takes a device and returns its figures; it raises AssertionError where they are wrong, `Skipped` where it cannot look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from basinescape.kernels import guide, guide_eager, noise_gap, step
from basinescape.kernels.rules import RULES
from basinescape.kernels.state import State
from basinescape.kernels.table import Column
from torch import Tensor
from torch.autograd import DeviceType

from ..speed.timing import profiled
from .cases import (
    DTYPES,
    LAYOUTS,
    MODES,
    SD,
    SD3,
    SDXL,
    STEPS,
    VIDEO,
    Exact,
    Mode,
    Run,
    laid_out,
    predictions,
    require,
    started,
)

Figures = dict[str, Any]
SIZES = ((1,), (5, 7), (3, 5, 7), SD, (3, 80, 81), SDXL, SD3, VIDEO)


class Skipped(Exception):
    """A check that cannot be made here; the message says why."""


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
                    gap_off = ((gap.double() - distance).abs() / distance).max().item()
                    where = f"{dtype}, {size}, {layout}: guided off by {error:.2g}, gap by {gap_off:.2g}"
                    require(error <= 2 * torch.finfo(dtype).eps and gap_off <= 1e-5, where)
                    require(torch.equal(gap, noise_gap(uncond, cond)), f"{where}; noise_gap differs from guide's gap")
                    figures["cases"] += 1
                    figures["same bits as eager"] += torch.equal(guided, guide_eager(uncond, cond, weight)[0])
                    largest, gap_error = max(largest, error), max(gap_error, gap_off)
        figures[str(dtype)] = {"guided": largest, "gap": gap_error}
    return figures


def check_step(device: torch.device) -> Figures:
    """The step in every mode, dtype and layout, with and without history, samples at steps of their own."""
    figures = {}
    for name, mode in MODES.items():
        for dtype, tolerance in DTYPES.items():
            worst = max(_follow(mode, dtype, wide, layout, device) for wide in (True, False) for layout in LAYOUTS)
            figures[f"{name}, {dtype}"] = worst
            require(worst <= tolerance, f"{name}, {dtype}: latents off by {worst:.2g}")
    return figures


def check_rules(device: torch.device) -> Figures:
    """The step under every guidance rule, in one program and in tiles."""
    figures = {}
    for rule, (name, mode), (dtype, tolerance) in product(RULES, MODES.items(), DTYPES.items()):
        if not mode.alone:
            worst = _follow(mode, dtype, True, "contiguous", device, rule)
            figures[f"{rule}, {name}, {dtype}"] = worst
            require(worst <= tolerance, f"{rule}, {name}, {dtype}: latents off by {worst:.2g}")
    return figures


def _follow(mode: Mode, dtype: torch.dtype, wide: bool, layout: str, device: torch.device, rule: str = "cfg") -> float:
    if layout == "channels last" and len(mode.shape) != 3:
        return 0.0
    state, table = started(mode, 3, dtype, device, wide, layout)
    state.start(state.latents.x.clone(), table, row=torch.tensor([0, 2, 1], device=device))
    exact, worst = Exact(state, table), 0.0
    for uncond, cond in list(predictions(mode, 3, dtype, device))[: STEPS - 1]:
        u, cond = laid_out(uncond, layout), None if cond is None else laid_out(cond, layout)
        assert u is not None
        step(u, cond, table, state, mode.finds, rule)
        exact.take(uncond, cond, rule)
        where = f"{mode}, {dtype}, {layout}"
        worst = max(worst, exact.compare(state, where))
        _require_fed(state, table, dtype, where)
    return worst


def _require_fed(state: State, table: Tensor, dtype: torch.dtype, where: str) -> None:
    """The network's next input and timestep are those of the latents and steps."""
    rows, latents = state.transition.rows(table), state.latents
    scaled = latents.x.float() * rows[:, Column.INPUT_SCALE].view(-1, *[1] * (latents.x.ndim - 1))
    tolerance = torch.finfo(dtype).eps
    for half in latents.model_input.chunk(2):
        require(torch.allclose(half.float(), scaled, atol=tolerance, rtol=tolerance), f"{where}: input")
    require(torch.equal(latents.timestep, rows[:, Column.TIMESTEP].repeat(2)), f"{where}: timestep")


def check_batches(device: torch.device) -> Figures:
    """A sample has the same bits in any batch."""
    for name, mode in MODES.items():
        for dtype in DTYPES:
            after = {chosen: _bits(mode, list(chosen), dtype, device) for chosen in ((0, 1, 2, 3, 4), (3,), (3, 1))}
            for chosen, found in after.items():
                at = chosen.index(3)
                agree = (torch.equal(a[at], b[3]) for a, b in zip(found, after[0, 1, 2, 3, 4], strict=True))
                require(all(agree), f"{name}, {dtype}: sample 3 differs in batch {chosen}")
    return {"modes": len(MODES), "dtypes": len(DTYPES)}


def _bits(mode: Mode, chosen: list[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    all_of, table = started(mode, 5, dtype, device)
    state = State.empty((len(chosen), *mode.shape), STEPS, dtype, device, True, True)
    state.start(all_of.latents.x[chosen], table)
    for uncond, cond in predictions(mode, 5, dtype, device):
        step(uncond[chosen], None if cond is None else cond[chosen], table, state, mode.finds)
    return [state.latents.x, state.transition.gaps.nan_to_num(-1), state.transition.at]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def each_run(device: torch.device) -> Iterator[tuple[str, Run]]:
    """A warmed-up run of each mode."""
    for name, mode in MODES.items():
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
    _kernels(lambda: None, device)  # the first profile also sees the profiler's own start
    if _kernels(lambda: probe.add_(1), device) != 1:
        raise Skipped("the profiler sees no kernels here")
    figures = {}
    for name, run in each_run(device):
        uncond, cond = (run.state.latents.model_input * run.pattern).chunk(2)
        arguments = uncond, None if run.mode.alone else cond, run.table, run.state, run.mode.finds
        figures[name] = _kernels(partial(step, *arguments), device)
        require(figures[name] == run.mode.launches, f"{name}: {figures[name]} launches, not {run.mode.launches}")
    return figures


def _kernels(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiled(call, device))


CHECKS: dict[str, Callable[[torch.device], Figures]] = {
    "guide": check_guide,
    "step": check_step,
    "rules": check_rules,
    "batches": check_batches,
    "launches": check_launches,
    "synchronisation": check_synchronisation,
    "capture": check_capture,
}
