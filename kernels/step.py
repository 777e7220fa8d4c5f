"""One step after the network, in one launch: has the sample left its basin, which weight, guidance, the solver's update.

    gap      = || cond - uncond ||_2                        and from it whether this step is the sample's transition
    guided   = uncond + w * (cond - uncond)                 w: the weight before or after the transition; or a rule of `RULES`
    latents' = a * latents + b * guided + history           the solver, linear (see `Column`)
    history' = p * latents + q * guided
    the network's next input = input_scale * latents', for both branches, and its next timestep

Samples of one batch may have different guidance and stand at different steps: all is gathered from each sample's own row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import backend, jit, launch, tl
from .eager import eager_step
from .guide import launch_guide
from .operands import arranged, check_predictions, sample_size, sample_stride
from .rules import RULES, combined, guided_prediction, options_of, transition
from .state import BUFFERS, State, buffers_of, state_of
from .sums import added, empty_sums, keep_sums, known_sums, met_sums, sums_of
from .table import (
    AFTER,
    BEFORE,
    COLUMNS,
    FALL,
    FIRST,
    FIRST_OPTION,
    INPUT_SCALE,
    KEEP,
    LIMIT,
    SECOND_OPTION,
    STEP,
    TIMESTEP,
    WAIT,
    A,
    B,
    Column,
    P,
    Q,
)
from .tiles import OPTIONS, RESIDENT, TILES, arrive, norm_of, parts


def step(uncond: Tensor, cond: Tensor | None, table: Tensor, state: State, finds: bool = True, rule: str = "cfg") -> None:
    """Take every sample of `state` one row on, from the network's predictions to its next input.

    One launch on a GPU; two only where samples look for their transition, or are guided by another rule than "cfg", and one
    sample alone is larger than the GPU's registers hold (a million elements on an H100). A sample that is done stays as it is.

    uncond, cond: (B, ...) float32, float16 or bfloat16, as for `guide`; cond None where `uncond` is the one prediction the
                  step needs, and is its guided prediction.
    table:        (any number of rows, len(Column)) float32, on the device.
    finds:        False where no row asks for the gap (every LIMIT is infinite or minus infinity, every KEEP minus infinity,
                  every FALL 0): then nobody waits for it.
    rule:         the guidance rule of all samples; its options are columns of the table, so they may differ.

    Raises ValueError if the predictions or the table do not match the state, or the rule is not known.
    """
    _check(uncond, cond, table, state, rule)
    torch.ops.basinescape.step(uncond, cond, table, finds, None, *buffers_of(state), rule=rule)


def guide_step(
    uncond: Tensor, cond: Tensor | None, table: Tensor, state: State, finds: bool = True, rule: str = "cfg"
) -> Tensor:
    """The guided prediction of every sample's step, (B, ...) like the latents, for a scheduler that takes its own steps.
    Arguments and errors are those of `step`. Gaps and transitions are recorded; latents and rows are left alone."""
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


_MUTATED = ", ".join(f"Tensor({alias}!)? {name}" for alias, name in zip("abcdefghijklm", ["guided", *BUFFERS], strict=True))
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
    """`step`, or, where `guided` is given, `guide_step`."""
    if backend(uncond.device) == "eager":
        eager_step(uncond, cond, table, guided, state_of(buffers), rule)
    else:
        launch_step(uncond, cond, table, finds, guided, state_of(buffers), rule)


torch.library.impl("basinescape::step", ("cpu", "cuda"), _step)


@jit
def finish(g, guided, model_input, second, unscaled, history, here, following, lanes, mask):
    """Store the guided prediction, or go on to the solver and store what follows from it."""
    if guided is not None:
        tl.store(guided + lanes, g, mask=mask)
    else:
        latents = model_input if unscaled is None else unscaled
        x = tl.load(latents + lanes, mask=mask, other=0.0).to(tl.float32)
        solved = tl.load(here + A) * x + tl.load(here + B) * g
        if history is not None:
            solved += tl.load(history + lanes, mask=mask, other=0.0)
            tl.store(history + lanes, tl.load(here + P) * x + tl.load(here + Q) * g, mask=mask)
        fed = solved.to(model_input.dtype.element_ty)
        if unscaled is not None:
            tl.store(unscaled + lanes, fed, mask=mask)
            fed = (fed.to(tl.float32) * tl.load(following + INPUT_SCALE)).to(model_input.dtype.element_ty)
        tl.store(model_input + lanes, fed, mask=mask)
        tl.store(second + lanes, fed, mask=mask)


@jit
def moved(pointer, by):
    return None if pointer is None else pointer + by


@jit
def step_kernel(
    uncond,
    cond,  # None: `uncond` is the guided prediction
    table,
    guided,  # None: go on to the solver
    known,  # (B,) float32, gaps computed beforehand; None
    sums,  # (SUMS - 1, B) float32, the same for a rule; None
    row,
    last,
    at,
    gaps,
    peak,
    model_input,
    timestep,
    unscaled,  # or None
    history,  # or None
    partials,  # None where one program holds a whole sample
    arrivals,
    batch,
    size,
    tiles,
    uncond_stride,
    cond_stride,
    gaps_stride,
    RULE: tl.constexpr,  # a guidance rule's device function; None: cfg, or one prediction alone
    FINDS: tl.constexpr,  # samples look for their transition in their gaps
    MEETS: tl.constexpr,  # ... and the programs of one sample wait for each other's sums
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # a block is guided part after part, to stay within the registers
):
    tile = tl.program_id(0) % tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    start = tile.to(tl.int64) * BLOCK
    PART: tl.constexpr = BLOCK // PARTS
    lanes = tl.arange(0, PART)
    while sample < batch:
        end = tl.load(last + sample)
        k = tl.load(row + sample)
        goes = k <= end
        k = tl.minimum(k, end)
        here = table + k * COLUMNS
        s = tl.load(here + STEP).to(tl.int64)
        left = tl.load(at + sample)
        rest = tl.where(goes, tl.cast(size - start, tl.int32), 0)  # a sample that is done has nothing left to work on
        if FINDS:
            own = gaps + sample * gaps_stride + s
            before = tl.load(own - 2, mask=s >= 2, other=float("nan"))
            earlier = tl.load(own - 1, mask=s >= 1, other=float("nan"))
            top = tl.load(peak + sample)
        predictions = ()
        differences = ()
        squared = tl.zeros((PART,), tl.float32)
        own = (0.0, 0.0, 0.0, 0.0)
        for part in tl.static_range(PARTS):
            mask = lanes < rest - part * PART
            by = start + part * PART
            u = tl.load(uncond + sample * uncond_stride + by + lanes, mask=mask, other=0.0).to(tl.float32)
            predictions = predictions + (u,)  # noqa: RUF005 (Triton knows no starred tuple)
            if cond is not None:
                c = tl.load(cond + sample * cond_stride + by + lanes, mask=mask, other=0.0).to(tl.float32)
                differences = differences + (c - u,)  # noqa: RUF005
                squared += (c - u) * (c - u)
                if RULE is not None and sums is None:
                    own = added(own, sums_of(u, c - u))
        squares = tl.sum(squared)
        if partials is None:
            gap = tl.sqrt_rn(squares)
        else:
            if RULE is not None and sums is None:
                keep_sums(partials, own, sample, tile, batch, tiles)
            arrived = arrive(partials, arrivals, squares, sample, tile, tiles)
            if MEETS:
                goal = (arrived // tiles + 1) * tiles
                seen = arrived + 1
                while seen < goal:
                    seen = tl.atomic_add(arrivals + sample, 0, sem="acquire")
                gap = norm_of(partials, sample, tiles)
                if RULE is not None:
                    own = met_sums(partials, sample, batch, tiles)
            if known is not None:
                gap = tl.load(known + sample)
                if RULE is not None:
                    own = known_sums(sums, sample, batch)
        limit, wait = tl.load(here + LIMIT), tl.load(here + WAIT)
        if FINDS:
            keep, fall = tl.load(here + KEEP), tl.load(here + FALL)
            left = transition(s, left, gap, before, earlier, top, keep, limit, fall, wait)
        else:
            left = tl.where((limit == float("inf")) & (left < 0), s + wait.to(tl.int64), left)
        weight = tl.load(here + tl.where((left >= 0) & (s >= left), AFTER, BEFORE))
        if RULE is not None:
            option, other = tl.load(here + FIRST_OPTION), tl.load(here + SECOND_OPTION)
            a, b = combined(RULE, weight, own, gap, size, option, other)
        following = table + tl.minimum(k + 1, end) * COLUMNS
        for part in tl.static_range(PARTS):
            if PARTS > 1:
                tl.debug_barrier()  # keeps the compiler from loading the latents and histories of all parts at once
            by = sample * size + start + part * PART
            if cond is None:
                g = predictions[part]
            elif RULE is None:
                g = guided_prediction(predictions[part], differences[part], weight)
            else:
                g = a * predictions[part] + b * differences[part]
            finish(
                g,
                moved(guided, by),
                model_input + by,
                model_input + tl.cast(batch, tl.int64) * size + by,
                moved(unscaled, by),
                moved(history, by),
                here,
                following,
                lanes,
                lanes < rest - part * PART,
            )

        # One program keeps the books, once all of the sample's programs have read the state.
        if partials is None:
            tl.debug_barrier()
            keeps = goes
        elif MEETS:
            keeps = goes & (tile == 0)
        else:
            keeps = goes & (arrived % tiles == tiles - 1)
        if keeps:
            tl.store(at + sample, left)
            if cond is not None:
                if partials is not None and not MEETS and known is None:
                    gap = norm_of(partials, sample, tiles)
                first = tl.load(here + FIRST) > 0
                tl.store(gaps + sample * gaps_stride + s, gap, mask=first)
                if FINDS:
                    tl.store(peak + sample, tl.where(gap > top, gap, top), mask=first)
            if guided is None:
                tl.store(row + sample, k + 1)
                told = tl.load(following + TIMESTEP)
                tl.store(timestep + sample, told)
                tl.store(timestep + batch + sample, told)
        sample += tl.num_programs(0) // tiles


def launch_step(
    uncond: Tensor,
    cond: Tensor | None,
    table: Tensor,
    finds: bool,
    guided: Tensor | None,
    state: State,
    rule: str = "cfg",
) -> None:
    way, latents, space = state.transition, state.latents, state.workspace
    batch, size = len(uncond), sample_size(uncond)
    if not batch:
        return
    uncond = arranged(uncond, latents.x)
    cond = cond if cond is None else arranged(cond, latents.x)
    block, warps, tiles = TILES.of(size)
    finds, combines = finds and cond is not None, None if cond is None else RULES[rule]
    groups, known, sums, meets = batch, None, None, False
    with torch.cuda.device_of(uncond):
        if tiles > 1 and (finds or combines is not None):
            groups = TILES.resident(uncond.device) // tiles
            meets = groups > 0
            if not meets:
                groups, known = batch, uncond.new_empty(batch, dtype=torch.float32)
                sums = None if combines is None else empty_sums(uncond)
                launch_guide(uncond, cond, 0.0, None, known, sums=sums)
        launch(
            step_kernel,
            min(groups, batch) * tiles,
            uncond,
            cond,
            table,
            guided,
            known,
            sums,
            way.row,
            way.last,
            way.at,
            way.gaps,
            way.peak,
            latents.model_input,
            latents.timestep,
            latents.unscaled,
            latents.history,
            space.partials,
            space.arrivals,
            batch,
            size,
            tiles,
            sample_stride(uncond),
            0 if cond is None else sample_stride(cond),
            way.gaps.stride(0),
            RULE=None if combines is None else combines.device,
            FINDS=finds,
            MEETS=meets,
            BLOCK=block,
            PARTS=parts(block, uncond.element_size()),
            num_warps=warps,
            **OPTIONS,
            **(RESIDENT if meets else {}),
        )
