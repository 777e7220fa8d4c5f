"""One step after the network, in one launch: has the sample left its basin, which weight, guidance, the solver's update.

    gap      = || cond - uncond ||_2                        and from it whether this step is the sample's transition
    guided   = uncond + w * (cond - uncond)                 w: the weight before or after the transition
    latents' = a * latents + b * guided + history           the solver, linear (see `Column`)
    history' = p * latents + q * guided
    the network's next input = input_scale * latents', for both branches, and its next timestep

Samples of one batch may stand at different steps: everything is gathered by each sample's own step index, on the device, and
nothing is read back by the host.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from .dispatch import backend, jit, tl
from .eager import eager_step
from .guide import guided_prediction, noise_gap
from .operands import check_predictions, same_layout, sample_size, sample_stride
from .state import Column, Rule, State
from .tiles import OPTIONS, TILES, arrive, norm_of

# What lets two programs of a tile share an SM, so that all programs of a launch that meets are resident together.
RESIDENT = {"maxnreg": 128, "launch_cooperative_grid": True}
PROGRAMS_AN_SM = 2


def step(uncond: Tensor, cond: Tensor | None, table: Tensor, state: State, rule: Rule | None = None) -> None:
    """Take every sample of `state` one step on, from the network's predictions to its next input.

    One launch on a GPU; two only where samples look for their transition and one sample alone is larger than the GPU's
    registers hold (a million elements on an H100).

    uncond, cond: (B, ...) float32, float16 or bfloat16, as for `guide`; cond None where `uncond` is the one prediction the
                  step needs, and is its guided prediction.
    table:        (K, len(Column)) float32, on the device.
    rule:         how samples find their transition; None where `state.transition` was given at the start.

    Raises ValueError if the predictions or the table do not match the state.
    """
    _check(uncond, cond, table, state)
    torch.ops.basinescape.step(uncond, cond, table, *_flat(rule), None, *_buffers(state))


def guide_step(uncond: Tensor, cond: Tensor, table: Tensor, state: State, rule: Rule | None = None) -> Tensor:
    """The guided prediction of every sample's step, (B, ...) like the latents, for a scheduler that takes its own steps.

    Arguments and errors are those of `step`. Gaps and transitions are recorded; latents and step indices are left alone.
    """
    _check(uncond, cond, table, state)
    guided = torch.empty_like(state.latents)
    torch.ops.basinescape.step(uncond, cond, table, *_flat(rule), guided, *_buffers(state))
    return guided


def _check(uncond: Tensor, cond: Tensor | None, table: Tensor, state: State) -> None:
    check_predictions(uncond, uncond if cond is None else cond)
    for name, given, shape in (
        ("uncond", uncond, state.latents.shape),
        ("table", table, (state.gaps.shape[1], len(Column))),
    ):
        if given.shape != shape or given.device != state.step.device:
            raise ValueError(
                f"{name} is {tuple(given.shape)} on {given.device}; the state's is {tuple(shape)} on {state.step.device}"
            )
    if table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(f"table is {table.dtype} with strides {table.stride()}; it must be contiguous torch.float32")


def _flat(rule: Rule | None) -> tuple[bool, int, int, float, int]:
    return (rule is not None, *(rule or Rule()))


def _buffers(state: State) -> list[Tensor | None]:
    return [getattr(state, name) for name in BUFFERS]


BUFFERS = [field.name for field in fields(State)]
_MUTATED = ", ".join(f"Tensor({alias}!)? {name}" for alias, name in zip("abcdefghijklmn", ["guided", *BUFFERS], strict=False))
torch.library.define(
    "basinescape::step",
    "(Tensor uncond, Tensor? cond, Tensor table, bool finds, int earliest, int latest, float drop, int wait, "
    + _MUTATED
    + ") -> ()",
)


@torch.library.register_fake("basinescape::step")
def _(*arguments: object) -> None:
    """All results are written in place."""


def _step(
    uncond: Tensor,
    cond: Tensor | None,
    table: Tensor,
    finds: bool,
    earliest: int,
    latest: int,
    drop: float,
    wait: int,
    guided: Tensor | None,
    *buffers: Tensor | None,
) -> None:
    """`step`, or, where `guided` is given, `guide_step`."""
    state, rule = State(*buffers), Rule(earliest, latest, drop, wait) if finds else None
    if backend(uncond.device) == "eager":
        eager_step(uncond, cond, table, rule, guided, state)
    else:
        _launch(uncond, cond, table, rule, guided, state)


torch.library.impl("basinescape::step", ("cpu", "cuda"), _step)


@jit
def transition_at(k, gap, before, last, peak, left, limit, earliest, latest, keep, wait):
    """The step of the transition: `left` where it is known, k + wait if it shows at this step k, else -1."""
    minimum = (before > last) & (last < gap) & (last <= keep * peak) & (k >= earliest)
    return tl.where((minimum | (gap <= limit) | (k >= latest)) & (left < 0), k + wait, left)


@jit
def finish(g, guided, model_input, second, apart, history, row, following_row, lanes, mask):
    """Store the guided prediction, or go on to the solver and store what follows from it."""
    if guided is not None:
        tl.store(guided + lanes, g, mask=mask)
    else:
        latents = model_input if apart is None else apart
        x = tl.load(latents + lanes, mask=mask, other=0.0).to(tl.float32)
        following = tl.load(row + 2) * x + tl.load(row + 3) * g
        if history is not None:
            following += tl.load(history + lanes, mask=mask, other=0.0)
            tl.store(history + lanes, tl.load(row + 4) * x + tl.load(row + 5) * g, mask=mask)
        fed = following.to(model_input.dtype.element_ty)
        if apart is not None:
            tl.store(apart + lanes, fed, mask=mask)
            fed = (fed.to(tl.float32) * tl.load(following_row + 6)).to(model_input.dtype.element_ty)
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
    model_input,
    timestep,
    apart,  # or None
    history,  # or None
    step,
    transition,
    gaps,
    peak,
    partials,  # None where one program holds a whole sample
    arrivals,
    batch,
    steps,
    size,
    tiles,
    uncond_stride,
    cond_stride,
    earliest,
    latest,
    keep,
    wait,
    FINDS: tl.constexpr,  # samples look for their transition
    MEETS: tl.constexpr,  # ... and the programs of one sample wait for each other's sums
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # a block is guided part after part, to stay within the registers
):
    tile = tl.program_id(0) % tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    start = tile.to(tl.int64) * BLOCK
    rest = tl.cast(size - start, tl.int32)
    PART: tl.constexpr = BLOCK // PARTS
    lanes = tl.arange(0, PART)
    while sample < batch:
        k = tl.minimum(tl.load(step + sample), steps - 1)
        left = tl.load(transition + sample)
        row = table + k * COLUMNS
        if FINDS:
            before = tl.load(gaps + sample * steps + k - 2, mask=k >= 2, other=0.0)
            last = tl.load(gaps + sample * steps + k - 1, mask=k >= 1, other=0.0)
            top = tl.load(peak + sample)
        predictions = ()
        differences = ()
        squared = tl.zeros((PART,), tl.float32)
        for part in tl.static_range(PARTS):
            mask = lanes < rest - part * PART
            at = start + part * PART
            u = tl.load(uncond + sample * uncond_stride + at + lanes, mask=mask, other=0.0).to(tl.float32)
            predictions = predictions + (u,)  # noqa: RUF005 (Triton knows no starred tuple)
            if cond is not None:
                c = tl.load(cond + sample * cond_stride + at + lanes, mask=mask, other=0.0).to(tl.float32)
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
                gap = norm_of(partials, sample, tiles, 256)
            if known is not None:
                gap = tl.load(known + sample)
        if FINDS:
            left = transition_at(k, gap, before, last, top, left, tl.load(row + 8), earliest, latest, keep, wait)
        weight = tl.load(row + tl.where((left >= 0) & (k >= left), 1, 0))
        following_row = table + tl.minimum(k + 1, steps - 1) * COLUMNS
        for part in tl.static_range(PARTS):
            if PARTS > 1:
                tl.debug_barrier()  # keeps the compiler from loading the latents and histories of all parts at once
            at = sample * size + start + part * PART
            finish(
                predictions[part] if cond is None else guided_prediction(predictions[part], differences[part], weight),
                moved(guided, at),
                model_input + at,
                model_input + tl.cast(batch, tl.int64) * size + at,
                moved(apart, at),
                moved(history, at),
                row,
                following_row,
                lanes,
                lanes < rest - part * PART,
            )

        # One program keeps the books, once all of the sample's programs have read the state.
        if partials is None:
            tl.debug_barrier()
            keeps = True
        elif MEETS:
            keeps = tile == 0
        else:
            keeps = arrived % tiles == tiles - 1
        if keeps:
            if cond is not None:
                if partials is not None and not MEETS and known is None:
                    gap = norm_of(partials, sample, tiles, 256)
                tl.store(gaps + sample * steps + k, gap)
                if FINDS:
                    tl.store(transition + sample, left)
                    tl.store(peak + sample, tl.where(gap > top, gap, top))
            if guided is None:
                tl.store(step + sample, k + 1)
                told = tl.load(following_row + 7)
                tl.store(timestep + sample, told)
                tl.store(timestep + batch + sample, told)
        sample += tl.num_programs(0) // tiles


def _launch(uncond: Tensor, cond: Tensor | None, table: Tensor, rule: Rule | None, guided: Tensor | None, state: State) -> None:
    batch, size = len(uncond), sample_size(uncond)
    if not batch:
        return
    uncond = _arranged(uncond, state.latents)
    cond = cond if cond is None else _arranged(cond, state.latents)
    block, warps, tiles = TILES.of(size)
    finds = rule is not None and cond is not None
    rule = rule or Rule()
    groups, known, meets = batch, None, False
    with torch.cuda.device_of(uncond):
        if finds and tiles > 1:
            groups = resident_programs(uncond.device) // tiles
            meets = groups > 0
            if not meets:
                groups, known = batch, noise_gap(uncond, cond)
        step_kernel[(min(groups, batch) * tiles,)](
            uncond,
            cond,
            table,
            guided,
            known,
            state.model_input,
            state.timestep,
            state.apart,
            state.history,
            state.step,
            state.transition,
            state.gaps,
            state.peak,
            state.partials,
            state.arrivals,
            batch,
            len(table),
            size,
            tiles,
            sample_stride(uncond),
            0 if cond is None else sample_stride(cond),
            rule.earliest,
            rule.latest,
            1 - rule.drop,
            rule.wait,
            FINDS=finds,
            MEETS=meets,
            COLUMNS=len(Column),
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


def resident_programs(device: torch.device) -> int:
    """How many programs of a tile may wait for each other on `device`; none in the interpreter, which runs them in turn."""
    if device.type != "cuda":
        return 0
    return PROGRAMS_AN_SM * torch.cuda.get_device_properties(device).multi_processor_count
