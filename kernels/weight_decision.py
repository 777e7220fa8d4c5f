"""Device code that reads a sample's row, decides its transition and weight, and stores transition, noise gap and next row."""

from __future__ import annotations

from .dispatch import jit, tl
from .rules import combined, transition
from .sums import total_gap
from .table import AFTER, BEFORE, COLUMNS, FALL, FIRST, FIRST_OPTION, KEEP, LIMIT, SECOND_OPTION, STEP, TIMESTEP, WAIT


@jit
def place(table, row, last, sample):
    """(row number, whether it is not done, pointer to that row, to the next row) of a sample; if done, of its last row."""
    end, k = tl.load(last + sample), tl.load(row + sample)
    active = k <= end
    k = tl.minimum(k, end)
    return k, active, table + k * COLUMNS, table + tl.minimum(k + 1, end) * COLUMNS


@jit
def find_transition(here, at, gaps, peak, sample, gaps_stride, gap, FINDS: tl.constexpr):
    """(solver step, step of the transition or -1, largest gap) of a sample, including the current gap."""
    s = tl.load(here + STEP).to(tl.int64)
    left, limit, wait = tl.load(at + sample), tl.load(here + LIMIT), tl.load(here + WAIT)
    top = gap
    if FINDS:
        own = gaps + sample * gaps_stride + s
        before = tl.load(own - 2, mask=s >= 2, other=float("nan"))
        earlier = tl.load(own - 1, mask=s >= 1, other=float("nan"))
        peak_before = tl.load(peak + sample)
        left = transition(s, left, gap, before, earlier, peak_before, tl.load(here + KEEP), limit, tl.load(here + FALL), wait)
        top = tl.where(gap > peak_before, gap, peak_before)
    else:
        left = tl.where((limit == float("inf")) & (left < 0), s + wait.to(tl.int64), left)
    return s, left, top


@jit
def factors(here, s, left, sums, gap, size, RULE: tl.constexpr):
    """(a, b): the guided prediction is a uncond + b (cond - uncond)."""
    a, b = 1.0, tl.load(here + tl.where((left >= 0) & (s >= left), AFTER, BEFORE))
    if RULE is not None:
        a, b = combined(RULE, b, sums, gap, size, tl.load(here + FIRST_OPTION), tl.load(here + SECOND_OPTION))
    return a, b


@jit
def record(
    here,
    following,
    row,
    at,
    gaps,
    peak,
    timestep,
    sample,
    batch,
    gaps_stride,
    k,
    active,
    gap,
    SEES: tl.constexpr,  # a gap was computed
    FINDS: tl.constexpr,
    MOVES: tl.constexpr,  # advance the sample to its next row
):
    """Store transition, gap and next row of a sample that is not done; return (solver step, step of the transition)."""
    s, left, top = find_transition(here, at, gaps, peak, sample, gaps_stride, gap, FINDS)
    tl.debug_barrier()  # all threads have read the state
    tl.store(at + sample, left, mask=active)
    if SEES:
        first = active & (tl.load(here + FIRST) > 0)
        tl.store(gaps + sample * gaps_stride + s, gap, mask=first)
        if FINDS:
            tl.store(peak + sample, top, mask=first)
    if MOVES:
        tl.store(row + sample, k + 1, mask=active)
        told = tl.load(following + TIMESTEP)
        tl.store(timestep + sample, told, mask=active)
        tl.store(timestep + batch + sample, told, mask=active)
    return s, left


@jit
def record_kernel(
    table,
    row,
    last,
    at,
    gaps,
    peak,
    timestep,
    partials,  # None: no gap was computed
    batch,
    tiles,
    gaps_stride,
    FINDS: tl.constexpr,
    MOVES: tl.constexpr,  # advance samples to their next rows
):
    """One program makes the decision of `tile_kernel` for one sample again, and stores it."""
    sample = tl.program_id(0).to(tl.int64)
    k, active, here, following = place(table, row, last, sample)
    gap = float("nan")
    if partials is not None:
        gap = total_gap(partials, sample, tiles)
    sees = partials is not None
    record(here, following, row, at, gaps, peak, timestep, sample, batch, gaps_stride, k, active, gap, sees, FINDS, MOVES)
