"""The rest of a step after the network call: noise gap, transition, guidance and solver update. It takes one launch if a
program holds a whole sample.

    gap      = || cond - uncond ||_2                        which decides whether the sample leaves its basin
    guided   = uncond + w * (cond - uncond)                 w: the column BEFORE or AFTER; or a rule of `RULES`
    latents' = a * latents + b * guided + history           the solver, linear (see `Column`)
    history' = p * latents + q * guided
    the network's next input = input_scale * latents', for both branches, and its next timestep

Samples of one batch may have different guidance and be at different steps: each sample reads its own row of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import backend, jit, launch, tl
from .eager import eager_step
from .operands import arranged, check_predictions, sample_size, sample_stride
from .rules import RULES, guided_prediction, options_of
from .state import BUFFERS, State, buffers_of, state_of
from .sums import added, launch_sums, sums_of, total_gap, total_sums
from .table import INPUT_SCALE, A, B, Column, P, Q
from .tiles import OPTIONS, TILES, parts, read, tile_of
from .weight_decision import factors, find_transition, place, record, record_kernel


def step(uncond: Tensor, cond: Tensor | None, table: Tensor, state: State, finds: bool = True, rule: str = "cfg") -> None:
    """Advance every sample of `state` by one row, from the network's predictions to its next input.

    On a GPU samples of up to 16,384 elements take one launch. Larger ones are cut into tiles and take two: the update of the
    tiles, then that of rows, transitions and gaps. If the weight depends on the gap, or the rule on sums, a launch before them
    adds up the sums. A sample that is done does not change.

    uncond, cond: (B, ...) float32, float16 or bfloat16, as for `guide`. cond None: `uncond` is the guided prediction.
    table:        (any number of rows, len(Column)) float32, on the device.
    finds:        False only if no row needs the gap for its decision: every LIMIT is infinite or minus infinity, every KEEP
                  minus infinity, every FALL 0. Under "cfg" it saves large samples the launch for the sums.
    rule:         the guidance rule of all samples. Its options are columns of the table, so samples may differ in them.

    Raises ValueError if the predictions or the table do not match the state, or the rule is not known.
    """
    _check(uncond, cond, table, state, rule)
    torch.ops.basinescape.step(uncond, cond, table, finds, None, *buffers_of(state), rule=rule)


def guide_step(
    uncond: Tensor, cond: Tensor | None, table: Tensor, state: State, finds: bool = True, rule: str = "cfg"
) -> Tensor:
    """Return the guided predictions, (B, ...) like the latents, for a scheduler whose own `step` updates the latents.
    Arguments and errors are those of `step`. Gaps and transitions are recorded; latents and rows do not change."""
    _check(uncond, cond, table, state, rule)
    guided = torch.empty_like(state.latents.x)
    torch.ops.basinescape.step(uncond, cond, table, finds, guided, *buffers_of(state), rule=rule)
    return guided


def _check(uncond: Tensor, cond: Tensor | None, table: Tensor, state: State, rule: str) -> None:
    options_of(rule, {})
    check_predictions(uncond, uncond if cond is None else cond)
    for name, given, shape in (
        ("uncond", uncond, state.latents.x.shape),
        ("table", table, (*table.shape[:1], len(Column))),
    ):
        if given.shape != shape or given.device != state.latents.x.device:
            raise ValueError(
                f"{name} is {tuple(given.shape)} on {given.device}; it must be {tuple(shape)} on {state.latents.x.device}"
            )
    if table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(f"table is {table.dtype} with strides {table.stride()}; it must be contiguous torch.float32")


_MUTATED = ", ".join(f"Tensor({alias}!)? {name}" for alias, name in zip("abcdefghijkl", ["guided", *BUFFERS], strict=True))
torch.library.define(
    "basinescape::step", f"(Tensor uncond, Tensor? cond, Tensor table, bool finds, {_MUTATED}, *, str rule='cfg') -> ()"
)


@torch.library.register_fake("basinescape::step")
def _(*arguments: object, **named: object) -> None:
    """All results are written in place."""


def _step(
    uncond: Tensor,
    cond: Tensor | None,
    table: Tensor,
    finds: bool,
    guided: Tensor | None,
    *buffers: Tensor | None,
    rule: str = "cfg",
) -> None:
    """`step`, or `guide_step` if `guided` is given."""
    if backend(uncond.device) == "eager":
        eager_step(uncond, cond, table, guided, state_of(buffers), rule)
    else:
        launch_step(uncond, cond, table, finds, guided, state_of(buffers), rule)


torch.library.impl("basinescape::step", "default", _step)


@jit
def mixed(u, d, a, b, RULE: tl.constexpr):
    """The guided prediction; u itself if d is None."""
    if d is None:
        g = u
    elif RULE is None:
        g = guided_prediction(u, d, b)
    else:
        g = a * u + b * d
    return g


@jit
def finish(g, guided, model_input, unscaled, history, here, following, batch, size, by, lanes, mask):
    """Store the guided prediction, or, if `guided` is None, the solver's update. by: offset of the first lane."""
    if guided is not None:
        tl.store(guided + by + lanes, g, mask=mask)
    else:
        first, second = model_input + by, model_input + tl.cast(batch, tl.int64) * size + by
        latents = first if unscaled is None else unscaled + by
        kept = None if history is None else history + by
        x = read(latents, lanes, mask)
        solved = tl.load(here + A) * x + tl.load(here + B) * g
        if history is not None:
            solved += tl.load(kept + lanes, mask=mask, other=0.0)
            tl.store(kept + lanes, tl.load(here + P) * x + tl.load(here + Q) * g, mask=mask)
        fed = solved.to(model_input.dtype.element_ty)
        if unscaled is not None:
            tl.store(latents + lanes, fed, mask=mask)
            fed = (fed.to(tl.float32) * tl.load(following + INPUT_SCALE)).to(model_input.dtype.element_ty)
        tl.store(first + lanes, fed, mask=mask)
        tl.store(second + lanes, fed, mask=mask)


@jit
def step_kernel(
    uncond,
    cond,  # None: `uncond` is the guided prediction
    table,
    guided,  # None: update the latents
    row,
    last,
    at,
    gaps,
    peak,
    model_input,
    timestep,
    unscaled,  # or None
    history,  # or None
    batch,
    size,
    uncond_stride,
    cond_stride,
    gaps_stride,
    RULE: tl.constexpr,  # a guidance rule's device function; None: cfg, or one prediction alone
    FINDS: tl.constexpr,  # the transition may depend on the gaps
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # number of parts of a block that are guided one after another, to save registers
):
    """One program updates one sample."""
    sample = tl.program_id(0).to(tl.int64)
    k, active, here, following = place(table, row, last, sample)
    rest = tl.where(active, size, 0)  # 0 elements if the sample is done
    PART: tl.constexpr = BLOCK // PARTS
    lanes = tl.arange(0, PART)
    predictions = ()
    differences = ()
    squared = tl.zeros((PART,), tl.float32)
    sums = (0.0, 0.0, 0.0, 0.0)
    gap = float("nan")
    for part in tl.static_range(PARTS):
        mask = lanes < rest - part * PART
        u = read(uncond + sample * uncond_stride + part * PART, lanes, mask)
        predictions = predictions + (u,)  # type: ignore[assignment]  # noqa: RUF005 (Triton's tuples grow by +)
        if cond is not None:
            d = read(cond + sample * cond_stride + part * PART, lanes, mask) - u
            differences = differences + (d,)  # type: ignore[assignment]  # noqa: RUF005
            squared += d * d
            if RULE is not None:
                sums = added(sums, sums_of(u, d))
    sees: tl.constexpr = cond is not None
    if sees:
        gap = tl.sqrt_rn(tl.sum(squared))
    s, left = record(
        here, following, row, at, gaps, peak, timestep, sample, batch, gaps_stride, k, active, gap, sees, FINDS, guided is None
    )
    a, b = factors(here, s, left, sums, gap, size, RULE)
    for part in tl.static_range(PARTS):
        if PARTS > 1:
            tl.debug_barrier()  # keeps the compiler from loading the latents and histories of all parts at once
        by = sample * size + part * PART
        g = mixed(predictions[part], differences[part] if sees else None, a, b, RULE)  # type: ignore[misc]
        mask = lanes < rest - part * PART
        finish(g, guided, model_input, unscaled, history, here, following, batch, size, by, lanes, mask)


@jit
def tile_kernel(
    uncond,
    cond,
    table,
    guided,
    row,
    last,
    at,
    gaps,
    peak,
    model_input,
    timestep,
    unscaled,
    history,
    partials,  # (SUMS, B, tiles) float32: read if the weight depends on the sums, else written; None if cond is None
    batch,
    size,
    tiles,
    uncond_stride,
    cond_stride,
    gaps_stride,
    RULE: tl.constexpr,
    FINDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program does the work of `step_kernel` on one tile, but leaves rows, transitions and gaps to `record_kernel`."""
    sample, tile, start = tile_of(tiles, BLOCK)
    _, active, here, following = place(table, row, last, sample)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < tl.where(active, tl.cast(size - start, tl.int32), 0)
    u = read(uncond + sample * uncond_stride + start, lanes, mask)
    d = None
    gap = float("nan")
    sums = (0.0, 0.0, 0.0, 0.0)
    if cond is not None:
        d = read(cond + sample * cond_stride + start, lanes, mask) - u
        if FINDS or RULE is not None:
            gap = total_gap(partials, sample, tiles)
            if RULE is not None:
                sums = total_sums(partials, sample, batch, tiles)
        else:
            tl.store(partials + sample * tiles + tile, tl.sum(d * d))
    s, left, _ = find_transition(here, at, gaps, peak, sample, gaps_stride, gap, FINDS)
    a, b = factors(here, s, left, sums, gap, size, RULE)
    g = mixed(u, d, a, b, RULE)
    by = sample * size + start
    finish(g, guided, model_input, unscaled, history, here, following, batch, size, by, lanes, mask)


def launch_step(
    uncond: Tensor,
    cond: Tensor | None,
    table: Tensor,
    finds: bool,
    guided: Tensor | None,
    state: State,
    rule: str = "cfg",
) -> None:
    """Launch the kernels of `step`, or of `guide_step` if `guided` is given."""
    way, latents, partials = state.transition, state.latents, state.workspace.partials
    batch, size = len(uncond), sample_size(uncond)
    if not batch:
        return
    uncond = arranged(uncond, latents.x)
    cond = cond if cond is None else arranged(cond, latents.x)
    block, warps, tiles = TILES.of(size)
    finds, combines = finds and cond is not None, None if cond is None else RULES[rule]
    recorded = way.row, way.last, way.at, way.gaps, way.peak
    operands = uncond, cond, table, guided, *recorded, latents.model_input, latents.timestep, latents.unscaled, latents.history
    strides = sample_stride(uncond), 0 if cond is None else sample_stride(cond), way.gaps.stride(0)
    options = {"RULE": None if combines is None else combines.device, "FINDS": finds, "BLOCK": block, "num_warps": warps}
    with torch.cuda.device_of(uncond):
        if tiles == 1:
            options["PARTS"] = parts(block, uncond.element_size())
            launch(step_kernel, batch, *operands, batch, size, *strides, **options, **OPTIONS)
            return
        partials = None if cond is None else partials
        if cond is not None and partials is not None and (finds or combines is not None):
            launch_sums(uncond, cond, partials, combines is not None)
        launch(tile_kernel, batch * tiles, *operands, partials, batch, size, tiles, *strides, **options, **OPTIONS)
        options = {"FINDS": finds, "MOVES": guided is None, "num_warps": 1}
        kept = table, *recorded, latents.timestep, partials, batch, tiles, way.gaps.stride(0)
        launch(record_kernel, batch, *kept, **options, **OPTIONS)
