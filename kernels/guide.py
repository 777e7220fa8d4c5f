"""Guidance and noise gap in one pass over the two predictions.

guided = uncond + w * (cond - uncond)     classifier-free guidance (Ho & Salimans, arXiv 2207.12598)
gap    = || cond - uncond ||_2            basin-escape statistic (Jain et al., CVPR 2025, arXiv 2411.16738)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .dispatch import backend, jit, launch, tl, triton
from .operands import (
    check_gap,
    check_guided,
    check_predictions,
    check_weight,
    empty_guided,
    in_memory_order,
    sample_size,
    sample_stride,
)
from .rules import (
    RULES,
    GuidanceRule,
    columns_of,
    combined,
    combined_eager,
    guided_prediction,
    guided_prediction_eager,
    options_of,
)
from .sums import empty_sums, keep_sums, known_sums, met_sums, norms, sample_sums, sums_of
from .tiles import OPTIONS, SUMS, TILES, arrive, norm_of


@jit
def guide_kernel(
    uncond,
    cond,
    weight,  # float, or pointer to one number a sample
    guided,  # None: the noise gap alone
    gap,
    sums,  # (SUMS - 1, B) float32 for a rule of several tiles, computed with the gap and read with both; or None
    partials,  # (SUMS, B, tiles) float32; None where one program holds a whole sample, or all is computed
    arrivals,  # (B,) int32, zero between launches
    first,  # options of the rule
    second,
    batch,
    size,
    tiles,
    uncond_stride,
    cond_stride,
    weight_stride,  # None for a float
    guided_stride,
    RULE: tl.constexpr,  # a guidance rule's device function; None: cfg
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    start = tile.to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < size - start
    u = tl.load(uncond + sample * uncond_stride + start + lanes, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cond + sample * cond_stride + start + lanes, mask=mask, other=0.0).to(tl.float32)
    difference = c - u
    if guided is not None:
        w = tl.cast(weight if weight_stride is None else tl.load(weight + sample * weight_stride), tl.float32)
        if RULE is None:
            g = guided_prediction(u, difference, w)
        else:
            if sums is None:
                distance, own = tl.sqrt_rn(tl.sum(difference * difference)), sums_of(u, difference)
            else:
                distance, own = tl.load(gap + sample), known_sums(sums, sample, batch)
            a, b = combined(RULE, w, own, distance, size, first, second)
            g = a * u + b * difference
        tl.store(guided + sample * guided_stride + start + lanes, g, mask=mask)
    if guided is None or sums is None:
        squares = tl.sum(difference * difference)
        if partials is None:
            tl.store(gap + sample, tl.sqrt_rn(squares))
        else:
            if sums is not None:
                keep_sums(partials, sums_of(u, difference), sample, tile, batch, tiles)
            if arrive(partials, arrivals, squares, sample, tile, tiles) == tiles - 1:
                tl.store(gap + sample, norm_of(partials, sample, tiles))
                if sums is not None:
                    met = met_sums(partials, sample, batch, tiles)
                    for i in tl.static_range(4):
                        tl.store(sums + i * batch + sample, met[i])
                tl.store(arrivals + sample, 0)  # ready for the next launch


_arrivals: dict[tuple[int, int], torch.Tensor] = {}


def _arrival_counters(batch: int, device: torch.device) -> torch.Tensor:
    """(batch,) int32 zeros. The kernel puts them back to zero, so launches in one stream share a buffer.

    A stream runs its launches one after another, hence a buffer a stream. A captured graph may be replayed in any stream,
    beside anything: it gets a buffer of its own, zeroed by a node of the graph. So does the interpreter, which can be
    interrupted half-way.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(batch, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _arrivals or len(_arrivals[key]) < batch:
        _arrivals[key] = torch.zeros(triton.next_power_of_2(batch), dtype=torch.int32, device=device)
    return _arrivals[key]


def launch_guide(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    weight: float | torch.Tensor,
    guided: torch.Tensor | None,
    gap: torch.Tensor,
    rule: GuidanceRule | None = None,
    options: tuple[float, float] = (0.0, 0.0),
    sums: torch.Tensor | None = None,
) -> None:
    """Without `guided` the gap, and `sums` where a tensor is given. A rule takes two launches over tiles."""
    batch, size = len(uncond), sample_size(uncond)
    if batch == 0:
        return
    block, warps, tiles = TILES.of(size)
    with torch.cuda.device_of(uncond):
        partials = arrivals = None
        if rule is not None and tiles > 1:
            sums = empty_sums(uncond)
            launch_guide(uncond, cond, 0.0, None, gap, sums=sums)
        elif tiles > 1:
            partials = torch.empty(SUMS * batch * tiles, dtype=torch.float32, device=uncond.device)
            arrivals = _arrival_counters(batch, uncond.device)
        launch(
            guide_kernel,
            batch * tiles,
            uncond,
            cond,
            weight,
            guided,
            gap,
            sums,
            partials,
            arrivals,
            *options,
            batch,
            size,
            tiles,
            sample_stride(uncond),
            sample_stride(cond),
            weight.stride(0) if isinstance(weight, torch.Tensor) else None,
            0 if guided is None else sample_stride(guided),
            RULE=None if rule is None else rule.device,
            BLOCK=block,
            num_warps=warps,
            **OPTIONS,
        )


def guide_eager(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    weight: float | torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    rule: GuidanceRule | None = None,
    options: tuple[float, float] = (0.0, 0.0),
) -> tuple[torch.Tensor, torch.Tensor]:
    """`guide` in PyTorch operators. Takes float64 too, and then computes and returns the gap in float64."""
    wide = uncond.to(torch.promote_types(uncond.dtype, torch.float32))
    guided, gap = out or (torch.empty_like(uncond), wide.new_empty(len(uncond)))
    difference = cond - wide
    norms(in_memory_order(difference), gap)
    each = -1, *[1] * (uncond.ndim - 1)
    if rule is not None:
        weight, *options = (torch.as_tensor(value).to(gap).expand(len(gap)) for value in (weight, *options))
        a, b = combined_eager(rule, weight, sample_sums(wide, difference), gap, sample_size(uncond), *options)
        return guided.copy_(a.view(each) * wide + b.view(each) * difference), gap
    if isinstance(weight, torch.Tensor):
        weight = weight.to(wide.dtype).view(each)
    return guided_prediction_eager(wide, difference, weight, out=guided), gap


def noise_gap_eager(uncond: torch.Tensor, cond: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`noise_gap` in PyTorch operators. Takes float64 too, and then computes and returns it in float64."""
    wide = uncond.to(torch.promote_types(uncond.dtype, torch.float32))
    return norms(in_memory_order(cond - wide), out)


# As an operator it survives torch.compile and export whole. Without `guided` it is `noise_gap`.
torch.library.define(
    "basinescape::guide",
    "(Tensor uncond, Tensor cond, Tensor? weights, float scale, Tensor(a!)? guided, Tensor(b!) gap, *, "
    "str rule='cfg', float[] options=[0.0, 0.0]) -> ()",
)


@torch.library.register_fake("basinescape::guide")
def _(*operands: object, **named: object) -> None:
    """All results are written in place."""


def _guide(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    guided: torch.Tensor | None,
    gap: torch.Tensor,
    rule: str = "cfg",
    options: Sequence[float] = (0.0, 0.0),
) -> None:
    weight = scale if weights is None else weights
    if backend(uncond.device) != "eager":
        launch_guide(uncond, cond, weight, guided, gap, RULES[rule], tuple(options))
    elif guided is None:
        noise_gap_eager(uncond, cond, gap)
    else:
        guide_eager(uncond, cond, weight, (guided, gap), RULES[rule], tuple(options))


torch.library.impl("basinescape::guide", ("cpu", "cuda"), _guide)


@torch.no_grad()
def guide(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    weight: float | torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    rule: str = "cfg",
    **options: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided prediction and noise gap of each sample, in one launch; see `backend` for what runs where.

    Under another rule than "cfg" a sample of more than 16,384 elements takes two: its sums must be known before it is guided.

    Args:
        uncond, cond: (B, ...) float32, float16 or bfloat16, of one shape, dtype, device and layout. A sample must be dense
            in memory (contiguous, channels-last, ...); the samples themselves may lie apart, as in a chunk.
        weight: one finite number, or a (B,) floating-point tensor, never read back; 0 gives uncond, 1 cond, negative
            numbers opposite guidance.
        out: (guided, gap) to write to. guided may be uncond or cond itself.
        rule, options: a guidance rule of `rules.RULES` and its options; at the weights 0 and 1 each gives uncond and cond.

    Returns:
        guided (B, ...): uncond + weight * (cond - uncond), or what the rule says, computed in float32, in the inputs' dtype
            and layout.
        gap (B,) float32: the 2-norm of cond - uncond, accumulated in float32.
        A NaN or infinity stays within its sample. No gradient flows to the inputs.

    Raises:
        ValueError: an operand does not match, or the rule or an option is not known; the message names it.
    """
    check_predictions(uncond, cond)
    columns = columns_of(options_of(rule, options))
    weight = check_weight(weight, uncond)
    if out is None:
        guided, gap = empty_guided(uncond), uncond.new_empty(len(uncond), dtype=torch.float32)
    else:
        guided, gap = check_guided(out[0], uncond), check_gap(out[1], uncond)
    weights, scale = (weight, 0.0) if isinstance(weight, torch.Tensor) else (None, weight)
    torch.ops.basinescape.guide(uncond, cond, weights, scale, guided, gap, rule=rule, options=columns)
    return guided, gap


@torch.no_grad()
def noise_gap(uncond: torch.Tensor, cond: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Noise gap of each sample, || cond - uncond ||_2: the second result of `guide`, for when a weight depends on it.

    Args:
        uncond, cond: (B, ...) as for `guide`.
        out: contiguous (B,) float32 to write to.

    Returns:
        gap (B,) float32.

    Raises:
        ValueError: an operand does not match; the message names it.
    """
    check_predictions(uncond, cond)
    gap = uncond.new_empty(len(uncond), dtype=torch.float32) if out is None else check_gap(out, uncond)
    torch.ops.basinescape.guide(uncond, cond, None, 0.0, None, gap)
    return gap
