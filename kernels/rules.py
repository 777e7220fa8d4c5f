"""The rules of `definition` as device code, each followed by its eager version."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from numbers import Real
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import jit, tl


@jit
def guided_prediction(uncond, difference, weight):
    """uncond + w * (cond - uncond), float32."""
    return uncond + weight * difference


def guided_prediction_eager(uncond: Tensor, difference: Tensor, weight: float | Tensor, out: Tensor) -> Tensor:
    """The same in PyTorch. A number and a tensor as the weight give the same bits."""
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
    """(B,) bool, whether each sample leaves its basin here. A criterion that a number switches off is not computed."""
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
    """An option of a guidance rule: its default, and its smallest and largest allowed value."""

    default: float
    least: float = -math.inf
    most: float = math.inf


def on_tensors(rule: Any) -> Callable[..., Any]:
    """The device function `rule` for tensors: the same code, with PyTorch functions in place of those of triton.language."""
    language = SimpleNamespace(sqrt_rn=torch.sqrt, exp=torch.exp, where=torch.where)
    return FunctionType(getattr(rule, "fn", rule).__code__, {"tl": language, "__builtins__": __builtins__})


@dataclass(frozen=True)
class GuidanceRule:
    """guided = a uncond + b (cond - uncond), a and b from a sample's weight and sums.

    device: (weight, u, d, uu, ud, dd, size, first option, second option) -> (a, b), float32 numbers: the sums of uncond u,
            of the difference d, and of their products; the size of a sample; the rule's options (at most two). Its result is
            not used at the weights 0 and 1, which give uncond and cond under every rule.
    eager:  the same on (B,) tensors.
    """

    device: Any
    options: Mapping[str, Option] = field(default_factory=dict)

    @cached_property
    def eager(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return on_tensors(self.device)


@jit
def rescale(weight, u, d, uu, ud, dd, size, phi, unused):
    """The guided prediction times phi std(cond) / std(guided) + 1 - phi (Lin et al., arXiv 2305.08891, section 3.4).

    A prediction that is constant apart from rounding is not scaled, because its deviation is 0.
    """
    power = uu + 2 * weight * ud + weight * weight * dd
    uu, ud, dd = uu - u * u / size, ud - u * d / size, dd - d * d / size
    variance = uu + 2 * weight * ud + weight * weight * dd
    ratio = tl.where(variance > 1e-6 * power, (uu + 2 * ud + dd) / variance, 1.0)
    factor = phi * tl.sqrt_rn(ratio) + (1 - phi)
    return factor, factor * weight


@jit
def norm_cap(weight, u, d, uu, ud, dd, size, kappa, unused):
    """The guided prediction, shortened to at most kappa times the norm of cond."""
    ratio = (uu + 2 * ud + dd) / (uu + 2 * weight * ud + weight * weight * dd)
    factor = kappa * tl.sqrt_rn(tl.where(ratio < 0, 0.0, ratio))  # rounding can make it negative
    factor = tl.where(factor < 1, factor, 1.0)
    return factor, factor * weight


@jit
def cfg_zero(weight, u, d, uu, ud, dd, size, unused, other):
    """Plain guidance from uncond times its optimal scale (CFG-Zero*, Fan et al., arXiv 2503.18886, 4.1; no zeroed steps)."""
    scale = (uu + ud) / (uu + 1e-8)
    return scale + weight * (1 - scale), weight


@jit
def apg(weight, u, d, uu, ud, dd, size, eta, norm_threshold):
    """Plain guidance with the difference shortened to norm_threshold (0: any length) and its part along cond times eta
    (adaptive projected guidance, Sadat et al., arXiv 2410.02416; without momentum)."""
    factor = norm_threshold / tl.sqrt_rn(dd)
    w = weight * tl.where((norm_threshold > 0) & (factor < 1), factor, 1.0)
    along = w * (eta - 1) * (ud + dd) / (uu + 2 * ud + dd)
    return 1 + along, w + along


@jit
def tcfg(weight, u, d, uu, ud, dd, size, unused, other):
    """Plain guidance from the projection of uncond on the main direction of both predictions, their first right singular
    vector, by way of their Gram matrix (tangential damping, Kwon et al., arXiv 2503.18137)."""
    cross, half = uu + ud, ud + dd / 2
    root = tl.sqrt_rn(half * half + cross * cross)
    of_cond, of_uncond = cross / root / 2, (1 - half / root) / 2
    return weight + (1 - weight) * (of_cond + of_uncond), weight + (1 - weight) * of_cond


@jit
def mambo_g(weight, u, d, uu, ud, dd, size, alpha, unused):
    """Plain guidance with a weight that falls to 1 as || difference || / || uncond || grows (MAMBO-G, arXiv 2508.03442)."""
    return weight * 0 + 1, 1 + (weight - 1) * tl.exp(-alpha * tl.sqrt_rn(dd / uu))


RULES: dict[str, GuidanceRule | None] = {
    "cfg": None,  # a = 1, b = weight: no sums
    "rescale": GuidanceRule(rescale, {"phi": Option(0.7, 0, 1)}),
    "cfg-zero": GuidanceRule(cfg_zero),
    "apg": GuidanceRule(apg, {"eta": Option(1.0), "norm_threshold": Option(15.0, 0)}),
    "tcfg": GuidanceRule(tcfg),
    "mambo-g": GuidanceRule(mambo_g, {"alpha": Option(8.0, 0)}),
    "norm-cap": GuidanceRule(norm_cap, {"kappa": Option(1.0, 0)}),
}


def options_of(rule: str, given: Mapping[str, float]) -> dict[str, float]:
    """All options of a guidance rule, given or default. Raises ValueError for an unknown rule or option, or a bad number."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    found = RULES[rule]
    known = {} if found is None else found.options
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"rule {rule!r} has no option {name!r}; it has {', '.join(known) or 'none'}")
        _, least, most = known[name]
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"{name} must be a finite number from {least:g} to {most:g}, got {value!r}")
    return {name: float(given.get(name, option.default)) for name, option in known.items()}


def columns_of(options: Mapping[str, float]) -> tuple[float, float]:
    """The values of the columns FIRST_OPTION and SECOND_OPTION; 0 for an option that the rule does not have."""
    first, second, *_ = (*options.values(), 0.0, 0.0)
    return first, second


@jit
def combined(rule, weight, sums, gap, size, first, second):
    """(a, b) of a sample. At the weights 0 and 1, and where the rule's result is not finite, those of plain guidance."""
    a, b = rule(weight, sums[0], sums[1], sums[2], sums[3], gap * gap, size, first, second)
    plain = (weight == 0) | (weight == 1) | (a - a != 0) | (b - b != 0)
    return tl.where(plain, 1.0, a), tl.where(plain, weight, b)


def combined_eager(
    rule: GuidanceRule, weight: Tensor, sums: tuple[Tensor, ...], gap: Tensor, size: int, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, of (B,) tensors."""
    a, b = rule.eager(weight, *sums, gap * gap, size, first, second)
    plain = (weight == 0) | (weight == 1) | (a - a != 0) | (b - b != 0)
    return torch.where(plain, 1.0, a), torch.where(plain, weight, b)
