"""Guidance and noise gap in one pass over the two predictions.

guided = uncond + w * (cond - uncond)     classifier-free guidance (Ho & Salimans, arXiv 2207.12598)
gap    = || cond - uncond ||_2            basin-escape statistic (Jain et al., CVPR 2025, arXiv 2411.16738)
"""

from __future__ import annotations

import torch

from .dispatch import backend, jit, tl, triton
from .operands import (
    check_gap,
    check_guided,
    check_predictions,
    check_weight,
    empty_guided,
    sample_size,
    sample_stride,
)

# Samples up to the last block live in one program: (elements, warps), the smallest that fits. Larger ones are cut into
# tiles. Both depend on a sample's size alone, so a sample's bits do not depend on its batch.
BLOCKS = ((1024, 4), (4096, 8), (16384, 16))
TILE = (4096, 8)

# No fused multiply-add: the guided prediction has the bits of the eager definition, whatever the compiler's default.
OPTIONS = {"enable_fp_fusion": False}


@jit
def guided_prediction(uncond, difference, weight):
    """uncond + w * (cond - uncond), float32."""
    return uncond + weight * difference


@jit
def store_gap(squares, gap, partials, arrivals, sample, tile, tiles, BLOCK: tl.constexpr):
    """Store sqrt(sum of `squares` over a sample's tiles) in gap[sample]; one call a program, from every tile.

    The last program to arrive adds the tiles' sums in a fixed order: the result does not depend on who was last.
    """
    if partials is None:
        tl.store(gap + sample, tl.sqrt_rn(squares))
    else:
        row = partials + sample.to(tl.int64) * tiles
        tl.store(row + tile, squares)
        # acq_rel: our partial is visible before our arrival, and the others' partials are once we see theirs.
        tl.debug_barrier()
        if tl.atomic_add(arrivals + sample, 1, sem="acq_rel") == tiles - 1:
            lanes = tl.arange(0, BLOCK)
            sums = tl.zeros((BLOCK,), tl.float32)
            start = 0
            while start < tiles:
                sums += tl.load(row + start + lanes, mask=lanes < tiles - start, other=0.0, cache_modifier=".cg")
                start += BLOCK
            tl.store(gap + sample, tl.sqrt_rn(tl.sum(sums)))
            tl.store(arrivals + sample, 0)  # ready for the next launch


@jit
def guide_kernel(
    uncond,
    cond,
    weight,  # float, or pointer to one number a sample
    guided,  # None: the noise gap alone
    gap,
    partials,  # (B, tiles) float32; None where one program holds a whole sample
    arrivals,  # (B,) int32, zero between launches
    size,
    tiles,
    uncond_stride,
    cond_stride,
    weight_stride,  # None for a float
    guided_stride,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    start = tile.to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < size - start
    u = tl.load(uncond + sample.to(tl.int64) * uncond_stride + start + lanes, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cond + sample.to(tl.int64) * cond_stride + start + lanes, mask=mask, other=0.0).to(tl.float32)
    difference = c - u
    if guided is not None:
        if weight_stride is None:
            w = tl.cast(weight, tl.float32)
        else:
            w = tl.load(weight + sample.to(tl.int64) * weight_stride).to(tl.float32)
        g = guided_prediction(u, difference, w)
        tl.store(guided + sample.to(tl.int64) * guided_stride + start + lanes, g, mask=mask)
    store_gap(tl.sum(difference * difference), gap, partials, arrivals, sample, tile, tiles, BLOCK)


def tiling(size: int) -> tuple[int, int, int]:
    """(block, warps, programs) for one sample of `size` elements."""
    for block, warps in BLOCKS:
        if size <= block:
            return block, warps, 1
    block, warps = TILE
    return block, warps, -(-size // block)


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


def _launch(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    weight: float | torch.Tensor,
    guided: torch.Tensor | None,
    gap: torch.Tensor,
) -> None:
    batch, size = len(uncond), sample_size(uncond)
    if batch == 0:
        return
    block, warps, tiles = tiling(size)
    with torch.cuda.device_of(uncond):
        partials = arrivals = None
        if tiles > 1:
            partials = torch.empty(batch * tiles, dtype=torch.float32, device=uncond.device)
            arrivals = _arrival_counters(batch, uncond.device)
        guide_kernel[(batch * tiles,)](
            uncond,
            cond,
            weight,
            guided,
            gap,
            partials,
            arrivals,
            size,
            tiles,
            sample_stride(uncond),
            sample_stride(cond),
            weight.stride(0) if isinstance(weight, torch.Tensor) else None,
            0 if guided is None else sample_stride(guided),
            BLOCK=block,
            num_warps=warps,
            **OPTIONS,
        )


def _difference(uncond: torch.Tensor, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(uncond, cond - uncond) in the arithmetic's dtype: float32, or float64 for float64."""
    dtype = torch.promote_types(uncond.dtype, torch.float32)
    uncond = uncond.to(dtype)
    return uncond, cond.to(dtype) - uncond


def _norms(difference: torch.Tensor) -> torch.Tensor:
    # A reduction a sample: nothing promises that a batched one adds in the same order for every batch.
    norms = [torch.linalg.vector_norm(sample).view(1) for sample in difference]
    return torch.cat([difference.new_empty(0), *norms])


def guide_eager(uncond: torch.Tensor, cond: torch.Tensor, weight: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `guide`, in PyTorch. Takes float64 too, and then computes and returns the gap in float64."""
    dtype = uncond.dtype
    uncond, difference = _difference(uncond, cond)
    if isinstance(weight, torch.Tensor):
        weight = weight.to(uncond.dtype).view(-1, *[1] * (uncond.ndim - 1))
    return (uncond + weight * difference).to(dtype), _norms(difference)


def noise_gap_eager(uncond: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """The definition of `noise_gap`, in PyTorch. Takes float64 too, and then computes and returns it in float64."""
    return _norms(_difference(uncond, cond)[1])


@torch.no_grad()
def guide(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    weight: float | torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided prediction and noise gap of each sample, in one launch; see `backend` for what runs where.

    Args:
        uncond, cond: (B, ...) float32, float16 or bfloat16, of one shape, dtype, device and layout. A sample must be dense
            in memory (contiguous, channels-last, ...); the samples themselves may lie apart, as in a chunk.
        weight: one finite number, or a (B,) floating-point tensor, never read back; 0 gives uncond, 1 cond, negative
            numbers opposite guidance.
        out: (guided, gap) to write to. guided may be uncond or cond itself.

    Returns:
        guided (B, ...): uncond + weight * (cond - uncond), computed in float32, in the inputs' dtype and layout.
        gap (B,) float32: the 2-norm of cond - uncond, accumulated in float32.
        A NaN or infinity stays within its sample. No gradient flows to the inputs.

    Raises:
        ValueError: an operand does not match; the message names it.
    """
    check_predictions(uncond, cond)
    weight = check_weight(weight, uncond)
    if out is None:
        guided, gap = empty_guided(uncond), uncond.new_empty(len(uncond), dtype=torch.float32)
    else:
        guided, gap = check_guided(out[0], uncond), check_gap(out[1], uncond)
    if backend(uncond.device) == "eager":
        eager_guided, eager_gap = guide_eager(uncond, cond, weight)
        guided.copy_(eager_guided)
        gap.copy_(eager_gap)
    else:
        _launch(uncond, cond, weight, guided, gap)
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
    if backend(uncond.device) == "eager":
        gap.copy_(noise_gap_eager(uncond, cond))
    else:
        _launch(uncond, cond, 0.0, None, gap)
    return gap
