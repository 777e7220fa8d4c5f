"""Checks before a launch: kernels accept dense samples of one layout. The errors name the operand that is refused."""

from __future__ import annotations

import math
from numbers import Real

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sample_size(x: torch.Tensor) -> int:
    """Elements in one sample of `x` (B, ...)."""
    return math.prod(x.shape[1:])


def sample_stride(x: torch.Tensor) -> int:
    """Elements from the start of one sample of `x` (B, ...) to the next; a single sample counts as packed."""
    return x.stride(0) if len(x) > 1 else sample_size(x)


def in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """`x` (B, ...) as (B, elements of a sample): a view in memory order if the samples are packed, else `x.flatten(1)`."""
    size = sample_size(x)
    return x.as_strided((len(x), size), (size, 1)) if sample_stride(x) == size else x.flatten(1)


def _layout(x: torch.Tensor) -> list[tuple[int, int]]:
    """(stride, size) of each dimension of a sample whose size is not 1. They decide the order of its elements."""
    return [(stride, size) for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True) if size != 1]


def same_layout(x: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether the elements of a sample have the same memory order in both tensors."""
    return not x.numel() or _layout(x) == _layout(like)


def arranged(prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`prediction`, or a copy of it if its samples do not have the memory layout of `like`."""
    return prediction if same_layout(prediction, like) else torch.empty_like(like, dtype=prediction.dtype).copy_(prediction)


def is_dense(x: torch.Tensor) -> bool:
    """Whether each sample is dense in memory, with nothing skipped."""
    layout, expected = _layout(x), 1
    for _ in layout:  # torch.compile cannot sort sizes that vary
        found = [size for stride, size in layout if stride == expected]
        if len(found) != 1:
            return False
        expected *= found[0]
    return True


def _check_like(name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    check_tensor(name, x)
    for what in ("shape", "dtype", "device"):
        given, wanted = getattr(x, what), getattr(like, what)
        if given != wanted:
            raise ValueError(f"{name} has {what} {given}; it must match uncond's {wanted}")
    if not same_layout(x, like):
        raise ValueError(f"{name} has strides {x.stride()}; within a sample they must match uncond's {like.stride()}")


def check_tensor(name: str, x: object) -> None:
    """ValueError unless `x` is a tensor."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")


def check_predictions(uncond: torch.Tensor, cond: torch.Tensor) -> None:
    """ValueError unless both are (B, ...) of one shape, dtype, device and layout, every sample dense in memory."""
    check_tensor("uncond", uncond)
    if uncond.ndim == 0:
        raise ValueError("uncond has no dimension; it must be (B, ...)")
    if uncond.dtype not in DTYPES:
        raise ValueError(f"uncond has dtype {uncond.dtype}; allowed are float32, float16, bfloat16")
    if uncond.numel() and not is_dense(uncond):
        raise ValueError(
            f"uncond has strides {uncond.stride()} for shape {tuple(uncond.shape)}; each sample must be dense in memory "
            "(contiguous, channels-last or another permutation, with nothing skipped)"
        )
    _check_like("cond", cond, uncond)


def check_weight(weight: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """The weight as a float, or the given (B,) tensor, whose values are not read; ValueError for anything else."""
    if isinstance(weight, torch.Tensor):
        if weight.shape != like.shape[:1]:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; allowed are a float or shape ({len(like)},)")
        if not weight.is_floating_point():
            raise ValueError(f"weight has dtype {weight.dtype}; allowed are floating-point dtypes")
        if weight.device != like.device:
            raise ValueError(f"weight is on {weight.device}; it must be on uncond's {like.device}")
        return weight
    if not isinstance(weight, Real) or not abs(weight) <= torch.finfo(torch.float32).max:
        raise ValueError(f"weight is {weight!r}; allowed are a finite float32 number or a ({len(like)},) tensor")
    return float(weight)


def check_guided(guided: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """`guided` itself; ValueError unless it can hold the guided prediction of `uncond`."""
    _check_like("out guided", guided, uncond)
    if len(guided) > 1 and guided.stride(0) < sample_size(guided):
        raise ValueError(f"out guided has strides {guided.stride()}; its samples must not overlap")
    return guided


def check_gap(gap: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """`gap` itself; ValueError unless it is a contiguous (B,) float32 tensor on the device of `uncond`."""
    check_tensor("out gap", gap)
    if gap.shape != uncond.shape[:1] or gap.dtype != torch.float32 or gap.device != uncond.device or not gap.is_contiguous():
        raise ValueError(
            f"out gap is {tuple(gap.shape)} {gap.dtype} on {gap.device} with strides {gap.stride()}; "
            f"it must be a contiguous ({len(uncond)},) torch.float32 tensor on {uncond.device}"
        )
    return gap


def empty_guided(uncond: torch.Tensor) -> torch.Tensor:
    """An empty output like `uncond` (B, ...): packed samples, with the same order of elements within a sample."""
    return torch.empty_strided(
        uncond.shape, (sample_size(uncond), *uncond.stride()[1:]), dtype=uncond.dtype, device=uncond.device
    )
