"""Guidance and noise gap from the two predictions. Plain guidance reads each of them once.

guided = uncond + w * (cond - uncond)     classifier-free guidance (Ho & Salimans, arXiv 2207.12598)
gap    = || cond - uncond ||_2            basin-escape statistic (Jain et al., CVPR 2025, arXiv 2411.16738)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .dispatch import backend, jit, launch, tl
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
from .sums import SUMS, gap_kernel, launch_sums, norms, sample_sums, sums_of, total_gap, total_sums
from .tiles import OPTIONS, TILES, read, tile_of


@jit
def guide_kernel(
    uncond,
    cond,
    weight,  # float, or pointer to one number a sample
    guided,  # None: the noise gap alone
    gap,
    partials,  # (SUMS, B, tiles) float32: read by a rule, written by plain guidance; None where one program holds a sample
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
    sample, tile, start = tile_of(tiles, BLOCK)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < size - start
    u = read(uncond + sample * uncond_stride + start, lanes, mask)
    d = read(cond + sample * cond_stride + start, lanes, mask) - u
    if guided is not None:
        w = tl.cast(weight if weight_stride is None else tl.load(weight + sample * weight_stride), tl.float32)
        if RULE is None:
            g = guided_prediction(u, d, w)
        else:
            if partials is None:
                distance, sums = tl.sqrt_rn(tl.sum(d * d)), sums_of(u, d)
            else:
                distance, sums = total_gap(partials, sample, tiles), total_sums(partials, sample, batch, tiles)
            a, b = combined(RULE, w, sums, distance, size, first, second)
            g = a * u + b * d
        tl.store(guided + sample * guided_stride + start + lanes, g, mask=mask)
    if partials is None:
        tl.store(gap + sample, tl.sqrt_rn(tl.sum(d * d)))
    elif RULE is None:
        tl.store(partials + sample * tiles + tile, tl.sum(d * d))
    else:
        tl.store(gap + sample, distance, mask=tile == 0)


def launch_guide(
    uncond: torch.Tensor,
    cond: torch.Tensor,
    weight: float | torch.Tensor,
    guided: torch.Tensor | None,
    gap: torch.Tensor,
    rule: GuidanceRule | None = None,
    options: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Launch `guide`, or `noise_gap` if `guided` is None. With tiles: a rule's sums first, plain guidance's gap last."""
    batch, size = len(uncond), sample_size(uncond)
    if batch == 0:
        return
    block, warps, tiles = TILES.of(size)
    with torch.cuda.device_of(uncond):
        partials = None if tiles == 1 else torch.empty((SUMS, batch, tiles), dtype=torch.float32, device=uncond.device)
        if partials is not None and rule is not None:
            launch_sums(uncond, cond, partials, True)
        operands = uncond, cond, weight, guided, gap, partials, *options, batch, size, tiles
        of_weight = weight.stride(0) if isinstance(weight, torch.Tensor) else None
        strides = sample_stride(uncond), sample_stride(cond), of_weight, 0 if guided is None else sample_stride(guided)
        named = {"RULE": None if rule is None else rule.device, "BLOCK": block, "num_warps": warps, **OPTIONS}
        launch(guide_kernel, batch * tiles, *operands, *strides, **named)
        if partials is not None and rule is None:
            launch(gap_kernel, batch, partials, gap, tiles, num_warps=1, **OPTIONS)


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
        own, first, second = (torch.as_tensor(value).to(gap).expand(len(gap)) for value in (weight, *options))
        a, b = combined_eager(rule, own, sample_sums(wide, difference), gap, sample_size(uncond), first, second)
        return guided.copy_(a.view(each) * wide + b.view(each) * difference), gap
    if isinstance(weight, torch.Tensor):
        weight = weight.to(wide.dtype).view(each)
    return guided_prediction_eager(wide, difference, weight, out=guided), gap


def noise_gap_eager(uncond: torch.Tensor, cond: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`noise_gap` in PyTorch operators. Takes float64 too, and then computes and returns it in float64."""
    wide = uncond.to(torch.promote_types(uncond.dtype, torch.float32))
    return norms(in_memory_order(cond - wide), out)


# A registered operator, which torch.compile and export do not take apart. With `guided` None it is `noise_gap`.
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
    weight, (first, second) = scale if weights is None else weights, options
    if backend(uncond.device) != "eager":
        launch_guide(uncond, cond, weight, guided, gap, RULES[rule], (first, second))
    elif guided is None:
        noise_gap_eager(uncond, cond, gap)
    else:
        guide_eager(uncond, cond, weight, (guided, gap), RULES[rule], (first, second))


torch.library.impl("basinescape::guide", "default", _guide)


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

    Samples of more than 16,384 elements take two launches: "cfg" adds up the gap last, the other rules add up their sums first.

    Args:
        uncond, cond: (B, ...) float32, float16 or bfloat16, of one shape, dtype, device and layout. Each sample must be
            dense in memory (contiguous, channels-last, ...). There may be gaps between samples, as in a chunk.
        weight: one finite number, or a (B,) floating-point tensor, which the host does not read. 0 gives uncond, 1 cond,
            a negative number opposite guidance.
        out: (guided, gap) to write to. guided may be uncond or cond itself, but must not overlap them otherwise (not checked).
        rule, options: a guidance rule of `rules.RULES` and its options. Every rule gives uncond at weight 0, cond at 1.

    Returns:
        guided (B, ...): uncond + weight * (cond - uncond), or what the rule defines. Computed in float32, stored in the
            inputs' dtype and layout.
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
    """Noise gap of each sample, || cond - uncond ||_2, the second result of `guide`. Use it if the weight depends on the gap.

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
