"""One step after the network, in one launch: has the sample left its basin, which weight, guidance, the solver's update.

    gap      = || cond - uncond ||_2                        and from it whether this step is the sample's transition
    guided   = uncond + w * (cond - uncond)                 w: the weight before or after the transition
    latents' = a * latents + b * guided + history           the solver, linear (see `Column`)
    history' = p * latents + q * guided
    the network's next input = input_scale * latents', for both branches, and its next timestep

Samples of one batch may have different guidance and stand at different steps: everything is gathered from each sample's own row
of the table, on the device, and nothing is read back by the host. `definition` says the same without a device.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from .dispatch import backend, jit, launch, tl
from .eager import eager_step
from .guide import noise_gap
from .operands import check_predictions, same_layout, sample_size, sample_stride
from .rules import guided_prediction, transition
from .state import Latents, State, Transition, Workspace
from .table import (
    AFTER,
    BEFORE,
    COLUMNS,
    FALL,
    FIRST,
    INPUT_SCALE,
    KEEP,
    LIMIT,
    STEP,
    TIMESTEP,
    WAIT,
    A,
    B,
    Column,
    P,
    Q,
)
from .tiles import OPTIONS, RESIDENT, TILES, arrive, norm_of


def step(uncond: Tensor, cond: Tensor | None, table: Tensor, state: State, finds: bool = True) -> None:
    """Take every sample of `state` one row on, from the network's predictions to its next input.

    One launch on a GPU; two only where samples look for their transition and one sample alone is larger than the GPU's
    registers hold (a million elements on an H100). A sample that is done stays as it is.

    uncond, cond: (B, ...) float32, float16 or bfloat16, as for `guide`; cond None where `uncond` is the one prediction the
                  step needs, and is its guided prediction.
    table:        (any number of rows, len(Column)) float32, on the device.
    finds:        False where no row asks for the gap (every LIMIT is infinite or minus infinity, every KEEP minus infinity,
                  every FALL 0): then nobody waits for it.

    Raises ValueError if the predictions or the table do not match the state.
    """
    _check(uncond, cond, table, state)
    torch.ops.basinescape.step(uncond, cond, table, finds, None, *_buffers(state))


def guide_step(uncond: Tensor, cond: Tensor, table: Tensor, state: State, finds: bool = True) -> Tensor:
    """The guided prediction of every sample's step, (B, ...) like the latents, for a scheduler that takes its own steps.

    Arguments and errors are those of `step`. Gaps and transitions are recorded; latents and rows are left alone.
    """
    _check(uncond, cond, table, state)
    guided = torch.empty_like(state.latents.x)
    torch.ops.basinescape.step(uncond, cond, table, finds, guided, *_buffers(state))
    return guided


def _check(uncond: Tensor, cond: Tensor | None, table: Tensor, state: State) -> None:
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


# A state as an operator takes it: one buffer after another.
FORMS = (Transition, Latents, Workspace)
NAMES = [field.name for form in FORMS for field in fields(form)]


def _buffers(state: State) -> list[Tensor | None]:
    return [buffer for part in (state.transition, state.latents, state.workspace) for buffer in vars(part).values()]


def _state(buffers: tuple[Tensor | None, ...]) -> State:
    rest = iter(buffers)
    return State(*(form(*(next(rest) for _ in fields(form))) for form in FORMS))


_MUTATED = ", ".join(f"Tensor({alias}!)? {name}" for alias, name in zip("abcdefghijklm", ["guided", *NAMES], strict=True))
torch.library.define("basinescape::step", f"(Tensor uncond, Tensor? cond, Tensor table, bool finds, {_MUTATED}) -> ()")


@torch.library.register_fake("basinescape::step")
def _(*arguments: object) -> None:
    """All results are written in place."""


def _step(
    uncond: Tensor, cond: Tensor | None, table: Tensor, finds: bool, guided: Tensor | None, *buffers: Tensor | None
) -> None:
    """`step`, or, where `guided` is given, `guide_step`."""
    if backend(uncond.device) == "eager":
        eager_step(uncond, cond, table, guided, _state(buffers))
    else:
        launch_step(uncond, cond, table, finds, guided, _state(buffers))


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
        for part in tl.static_range(PARTS):
            mask = lanes < rest - part * PART
            by = start + part * PART
            u = tl.load(uncond + sample * uncond_stride + by + lanes, mask=mask, other=0.0).to(tl.float32)
            predictions = predictions + (u,)  # noqa: RUF005 (Triton knows no starred tuple)
            if cond is not None:
                c = tl.load(cond + sample * cond_stride + by + lanes, mask=mask, other=0.0).to(tl.float32)
                differences = differences + (c - u,)  # noqa: RUF005
                squared += (c - u) * (c - u)
        squares = tl.sum(squared)
        if partials is None:
            gap = tl.sqrt_rn(squares)
        else:
            arrived = arrive(partials, arrivals, squares, sample, tile, tiles)
            if MEETS:
                goal = (arrived // tiles + 1) * tiles
                seen = arrived + 1
                while seen < goal:
                    seen = tl.atomic_add(arrivals + sample, 0, sem="acquire")
                gap = norm_of(partials, sample, tiles)
            if known is not None:
                gap = tl.load(known + sample)
        limit, wait = tl.load(here + LIMIT), tl.load(here + WAIT)
        if FINDS:
            keep, fall = tl.load(here + KEEP), tl.load(here + FALL)
            left = transition(s, left, gap, before, earlier, top, keep, limit, fall, wait)
        else:
            left = tl.where((limit == float("inf")) & (left < 0), s + wait.to(tl.int64), left)
        weight = tl.load(here + tl.where((left >= 0) & (s >= left), AFTER, BEFORE))
        following = table + tl.minimum(k + 1, end) * COLUMNS
        for part in tl.static_range(PARTS):
            if PARTS > 1:
                tl.debug_barrier()  # keeps the compiler from loading the latents and histories of all parts at once
            by = sample * size + start + part * PART
            finish(
                predictions[part] if cond is None else guided_prediction(predictions[part], differences[part], weight),
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


def launch_step(uncond: Tensor, cond: Tensor | None, table: Tensor, finds: bool, guided: Tensor | None, state: State) -> None:
    way, latents, space = state.transition, state.latents, state.workspace
    batch, size = len(uncond), sample_size(uncond)
    if not batch:
        return
    uncond = _arranged(uncond, latents.x)
    cond = cond if cond is None else _arranged(cond, latents.x)
    block, warps, tiles = TILES.of(size)
    finds = finds and cond is not None
    groups, known, meets = batch, None, False
    with torch.cuda.device_of(uncond):
        if finds and tiles > 1:
            groups = TILES.resident(uncond.device) // tiles
            meets = groups > 0
            if not meets:
                groups, known = batch, noise_gap(uncond, cond)
        launch(
            step_kernel,
            min(groups, batch) * tiles,
            uncond,
            cond,
            table,
            guided,
            known,
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
            FINDS=finds,
            MEETS=meets,
            BLOCK=block,
            PARTS=parts(block, uncond.element_size()),
            num_warps=warps,
            **OPTIONS,
            **(RESIDENT if meets else {}),
        )


def _arranged(prediction: Tensor, like: Tensor) -> Tensor:
    """`prediction` with the elements of a sample in the order of the state's."""
    return prediction if same_layout(prediction, like) else torch.empty_like(like, dtype=prediction.dtype).copy_(prediction)


def parts(block: int, itemsize: int) -> int:
    """How many parts a block of predictions of `itemsize` bytes is guided in: a large one 16 bytes a thread at a time."""
    return 1 if block <= 4096 else block * itemsize // 8192
