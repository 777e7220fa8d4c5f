"""Guidance and noise gap in one pass over the two predictions.

guided = uncond + w * (cond - uncond)     classifier-free guidance (Ho & Salimans, arXiv 2207.12598)
gap    = || cond - uncond ||_2            basin-escape statistic (Jain et al., CVPR 2025, arXiv 2411.16738)
"""

from __future__ import annotations

import math

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
from .rules import guided_prediction, guided_prediction_eager
from .tiles import OPTIONS, TILES, arrive, norm_of


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
        g = guided_prediction(u, difference, w)
        tl.store(guided + sample * guided_stride + start + lanes, g, mask=mask)
    squares = tl.sum(difference * difference)
    if partials is None:
        tl.store(gap + sample, tl.sqrt_rn(squares))
    elif arrive(partials, arrivals, squares, sample, tile, tiles) == tiles - 1:
        tl.store(gap + sample, norm_of(partials, sample, tiles))
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
) -> None:
    batch, size = len(uncond), sample_size(uncond)
    if batch == 0:
        return
    block, warps, tiles = TILES.of(size)
    with torch.cuda.device_of(uncond):
        partials = arrivals = None
        if tiles > 1:
            partials = torch.empty(batch * tiles, dtype=torch.float32, device=uncond.device)
            arrivals = _arrival_counters(batch, uncond.device)
        launch(
            guide_kernel,
            batch * tiles,
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


PART = 256  # elements whose squares are added first: rounding does not grow with the size of a sample


def norms(samples: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The 2-norm of each row of (B, n), (B,); a row's bits are the same in every batch."""
    size = samples.shape[1]
    part = math.gcd(size, PART)
    if size <= PART:
        return torch.linalg.vector_norm(samples, dim=1, out=out)
    if part < 16:  # a reduction a sample: nothing promises that a batched one adds a long row in one order
        alone = [torch.linalg.vector_norm(sample, dim=0, keepdim=True) for sample in samples]
        return torch.cat([samples.new_empty(0), *alone], out=out)
    return norms(torch.linalg.vector_norm(samples.view(len(samples), size // part, part), dim=2), out)


def guide_eager(
    uncond: torch.Tensor, cond: torch.Tensor, weight: float | torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`guide` in PyTorch operators. Takes float64 too, and then computes and returns the gap in float64."""
    wide = uncond.to(torch.promote_types(uncond.dtype, torch.float32))
    guided, gap = out or (torch.empty_like(uncond), wide.new_empty(len(uncond)))
    difference = cond - wide
    norms(in_memory_order(difference), gap)
    if isinstance(weight, torch.Tensor):
        weight = weight.to(wide.dtype).view(-1, *[1] * (uncond.ndim - 1))
    return guided_prediction_eager(wide, difference, weight, out=guided), gap


def noise_gap_eager(uncond: torch.Tensor, cond: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`noise_gap` in PyTorch operators. Takes float64 too, and then computes and returns it in float64."""
    wide = uncond.to(torch.promote_types(uncond.dtype, torch.float32))
    return norms(in_memory_order(cond - wide), out)


# As an operator it survives torch.compile and export whole. Without `guided` it is `noise_gap`.
torch.library.define(
    "basinescape::guide",
    "(Tensor uncond, Tensor cond, Tensor? weights, float scale, Tensor(a!)? guided, Tensor(b!) gap) -> ()",
)


@torch.library.register_fake("basinescape::guide")
def _(*operands: object) -> None:
    """All results are written in place."""


def _guide(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    weights: torch.Tensor | None,
    scale: float,
    guided: torch.Tensor | None,
    gap: torch.Tensor,
) -> None:
    weight = scale if weights is None else weights
    if backend(uncond.device) != "eager":
        launch_guide(uncond, cond, weight, guided, gap)
    elif guided is None:
        noise_gap_eager(uncond, cond, gap)
    else:
        guide_eager(uncond, cond, weight, (guided, gap))


torch.library.impl("basinescape::guide", ("cpu", "cuda"), _guide)


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
    weights, scale = (weight, 0.0) if isinstance(weight, torch.Tensor) else (None, weight)
    torch.ops.basinescape.guide(uncond, cond, weights, scale, guided, gap)
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
