"""The rules of `definition` on the device, each beside its eager twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import jit, tl


@jit
def guided_prediction(uncond, difference, weight):
    """uncond + w * (cond - uncond), float32."""
    return uncond + weight * difference


def guided_prediction_eager(uncond: Tensor, difference: Tensor, weight: float | Tensor, out: Tensor) -> Tensor:
    """The same; a number or a tensor as the weight gives the same bits."""
    if isinstance(weight, Tensor):
        return torch.addcmul(uncond, difference, weight, out=out)
    return torch.add(uncond, difference, alpha=weight, out=out)


@jit
def transition(step, left, gap, before, last, peak, keep, limit, fall, wait):
    """The step of the transition: `left` where it is known, step + wait if the sample leaves its basin here, else -1."""
    minimum = (before > last) & (last < gap) & (last <= keep * peak)
    leaves = minimum | (gap < fall * peak) | (gap <= limit) | (limit == float("inf"))
    return tl.where(leaves & (left < 0), step + wait.to(tl.int64), left)


def leaves_eager(
    gap: Tensor,
    before: Tensor,
    last: Tensor,
    peak: Tensor,
    keep: float | Tensor,
    limit: float | Tensor,
    fall: float | Tensor,
) -> Tensor:
    """Whether each sample leaves its basin here; of thresholds that are numbers, only what they leave open is computed."""
    found = []
    if isinstance(keep, Tensor) or keep != -torch.inf:
        minimum = last < torch.minimum(before, gap)
        found.append(minimum if not isinstance(keep, Tensor) and keep == 1 else minimum & (last <= keep * peak))
    if isinstance(fall, Tensor) or fall:
        found.append(gap < fall * peak)
    if isinstance(limit, Tensor) or limit != -torch.inf:
        found.append((gap <= limit) | (limit == torch.inf))
    return reduce(torch.logical_or, found) if found else torch.zeros_like(gap, dtype=torch.bool)


class Option(NamedTuple):
    """A number of a guidance rule: what it is unless given, and between which numbers it may lie."""

    default: float
    least: float = -math.inf
    most: float = math.inf


@dataclass(frozen=True)
class GuidanceRule:
    """guided = a uncond + b (cond - uncond), a and b from a sample's weight and sums.

    device, eager: (weight, u, d, uu, ud, dd, size, first option, second option) -> (a, b), float32, a number a sample each: the
    sums of uncond u, of the difference d, and of their products; the size of a sample; the rule's options (at most two). At
    weight 1 it must give the conditional prediction; at weight 0 it is not asked.
    """

    device: Any
    eager: Callable[..., tuple[Tensor, Tensor]]
    options: Mapping[str, Option] = field(default_factory=dict)


@jit
def rescale(weight, u, d, uu, ud, dd, size, phi, unused):
    """Factor phi std(cond) / std(guided) + 1 - phi on the guided prediction (Lin et al., arXiv 2305.08891, section 3.4)."""
    uu, ud, dd = uu - u * u / size, ud - u * d / size, dd - d * d / size
    ratio = (uu + 2 * ud + dd) / (uu + 2 * weight * ud + weight * weight * dd)
    factor = phi * tl.sqrt_rn(ratio) + (1 - phi)
    return factor, factor * weight


def rescale_eager(weight, u, d, uu, ud, dd, size, phi, unused):
    """The same."""
    uu, ud, dd = uu - u * u / size, ud - u * d / size, dd - d * d / size
    ratio = (uu + 2 * ud + dd) / (uu + 2 * weight * ud + weight * weight * dd)
    factor = phi * ratio.sqrt() + (1 - phi)
    return factor, factor * weight


@jit
def cfg_zero(weight, u, d, uu, ud, dd, size, unused, other):
    """uncond times its optimal scale (CFG-Zero*, Fan et al., arXiv 2503.18886, section 4.1; its zeroed steps are not done)."""
    scale = (uu + ud) / (uu + 1e-8)
    return scale + weight * (1 - scale), weight


def cfg_zero_eager(weight, u, d, uu, ud, dd, size, unused, other):
    """The same."""
    scale = (uu + ud) / (uu + 1e-8)
    return scale + weight * (1 - scale), weight


RULES: dict[str, GuidanceRule | None] = {
    "cfg": None,  # a = 1, b = weight: no sums
    "rescale": GuidanceRule(rescale, rescale_eager, {"phi": Option(0.7, 0, 1)}),
    "cfg-zero": GuidanceRule(cfg_zero, cfg_zero_eager),
}


def options_of(rule: str, given: Mapping[str, float]) -> dict[str, float]:
    """All options of a guidance rule. Raises ValueError for an unknown rule or option, or a number that is not allowed."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    known = RULES[rule].options if RULES[rule] else {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"rule {rule!r} has no option {name!r}; it has {', '.join(known) or 'none'}")
        _, least, most = known[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"{name} must be a finite number from {least:g} to {most:g}, got {value!r}")
    return {name: float(given.get(name, option.default)) for name, option in known.items()}


def columns_of(options: Mapping[str, float]) -> tuple[float, float]:
    """The two columns that hold a rule's options."""
    first, second, *_ = (*options.values(), 0.0, 0.0)
    return first, second


@jit
def combined(rule, weight, sums, gap, size, first, second):
    """(a, b) of a sample; at weight 0, uncond."""
    a, b = rule(weight, sums[0], sums[1], sums[2], sums[3], gap * gap, size, first, second)
    return tl.where(weight == 0, 1.0, a), tl.where(weight == 0, 0.0, b)


def combined_eager(
    rule: GuidanceRule, weight: Tensor, sums: tuple[Tensor, ...], gap: Tensor, size: int, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, of (B,) tensors."""
    a, b = rule.eager(weight, *sums, gap * gap, size, first, second)
    return torch.where(weight == 0, 1.0, a), torch.where(weight == 0, 0.0, b)
