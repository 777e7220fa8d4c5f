"""The definition of one step of one sample, in float64 without in-place updates. All fast versions are tested against it.

u, c: the unconditional and conditional predictions; w: the guidance weight; x: the latents; d_k: the noise gap of step k.

    guided = u + w (c - u)               classifier-free guidance (Ho & Salimans, https://arxiv.org/abs/2207.12598), or another
                                         rule of `RULES`; every rule gives u at w = 0 and c at w = 1
    d_k    = || c - u ||_2               the noise gap (Jain et al., CVPR 2025, https://arxiv.org/abs/2411.16738)
    w      = BEFORE until the transition, AFTER from the transition on
    x'     = A x + B guided + h          a linear solver; h is the history that it keeps from one call to the next
    h'     = P x + Q guided

Capitals are columns of the table (`table.Column`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .table import Column


def noise_gap(uncond: Tensor, cond: Tensor) -> float:
    """|| c - u ||_2 of one sample."""
    return (cond.double() - uncond.double()).norm().item()


def cfg(u: Tensor, c: Tensor, w: float | Tensor, *_: float) -> Tensor:
    """u + w (c - u)."""
    return u + w * (c - u)


def rescale(u: Tensor, c: Tensor, w: float, phi: float, *_: float) -> Tensor:
    """cfg, partly (phi) scaled to the standard deviation of c (Lin et al., https://arxiv.org/abs/2305.08891, section 3.4)."""
    g = cfg(u, c, w)
    return (phi * c.std() / g.std() + 1 - phi) * g


def cfg_zero(u: Tensor, c: Tensor, w: float, *_: float) -> Tensor:
    """cfg from the projection of c on u, not from u (CFG-Zero*, Fan et al., https://arxiv.org/abs/2503.18886, section 4.1)."""
    return cfg((u * c).sum() / ((u * u).sum() + 1e-8) * u, c, w)


def apg(u: Tensor, c: Tensor, w: float, eta: float, norm_threshold: float) -> Tensor:
    """cfg with c - u cut to norm_threshold, its part along c times eta (Sadat et al., https://arxiv.org/abs/2410.02416)."""
    d = c - u
    d = d * (norm_threshold / d.norm()).clamp(max=1) if norm_threshold else d
    along = (d * c).sum() / (c * c).sum() * c
    return u + w * (d + (eta - 1) * along)


def tcfg(u: Tensor, c: Tensor, w: float, *_: float) -> Tensor:
    """cfg from the projection of u on the main direction of u and c (Kwon et al., https://arxiv.org/abs/2503.18137)."""
    main = torch.linalg.svd(torch.stack([c.flatten(), u.flatten()]), full_matrices=False).Vh[0].view(u.shape)
    return cfg((u * main).sum() * main, c, w)


def mambo_g(u: Tensor, c: Tensor, w: float, alpha: float, *_: float) -> Tensor:
    """cfg with a weight that falls to 1 as || c - u || / || u || grows (MAMBO-G, https://arxiv.org/abs/2508.03442)."""
    return cfg(u, c, 1 + (w - 1) * torch.exp(-alpha * (c - u).norm() / u.norm()))


def norm_cap(u: Tensor, c: Tensor, w: float, kappa: float, *_: float) -> Tensor:
    """cfg, shortened to at most kappa times the norm of c."""
    g = cfg(u, c, w)
    return (kappa * c.norm() / g.norm()).clamp(max=1) * g


RULES: dict[str, Callable[..., Tensor]] = {
    "cfg": cfg,
    "rescale": rescale,
    "cfg-zero": cfg_zero,
    "apg": apg,
    "tcfg": tcfg,
    "mambo-g": mambo_g,
    "norm-cap": norm_cap,
}


def guided(uncond: Tensor, cond: Tensor, weight: float, rule: str = "cfg", options: Sequence[float] = ()) -> Tensor:
    """The guided prediction of one sample under a rule and its options. Where the result is not finite, that of `cfg`."""
    u, c = uncond.double(), cond.double()
    found = RULES["cfg" if weight in (0, 1) else rule](u, c, weight, *options)
    return found if found.isfinite().all() else cfg(u, c, weight)


def basin_score(target: Tensor, uncond: Tensor, cond: Tensor) -> float:
    """ln(|| target - u || / || target - c ||) of one noised picture: how much nearer cond is to the target.

    target: the prediction from which exactly this picture follows. A score above 0 means that the caption leads to the picture.
    A copy at the bottom of its caption's basin scores 0.5 and more, an ordinary picture about 0.1.
    """
    return math.log(noise_gap(target, uncond) / noise_gap(target, cond))


def is_minimum(before, last, gap):
    """d_(k-2) > d_(k-1) < d_k, strictly: step k shows the first minimum (Jain et al., section 4.2). Numbers or tensors."""
    return (before > last) & (last < gap)


def leaves(gap: float, earlier: Sequence[float], keep: float, limit: float, fall: float) -> bool:
    """Whether a sample leaves its basin at step k. gap: d_k, or NaN if it was not computed.

    earlier: d_0 ... d_(k-1). A first minimum counts if it is deep enough, d_(k-1) <= keep * max(d_0 ... d_(k-1)); a gap has
    fallen if d_k < fall * max(d_0 ... d_(k-1)).
    """
    peak = max((d for d in earlier if not math.isnan(d)), default=math.nan)
    minimum = len(earlier) >= 2 and is_minimum(earlier[-2], earlier[-1], gap) and earlier[-1] <= keep * peak
    return minimum or gap < fall * peak or gap <= limit or limit == math.inf


def transition(gaps: Sequence[float], rules: Sequence[tuple[float, float, float, float]]) -> int:
    """The step of the transition in gaps d_0 ... d_(K-1), or -1 if none. rules: (KEEP, LIMIT, FALL, WAIT) of each step."""
    for k, (gap, (keep, limit, fall, wait)) in enumerate(zip(gaps, rules, strict=True)):
        if leaves(gap, gaps[:k], keep, limit, fall):
            return k + int(wait) if k + wait < len(gaps) else -1
    return -1


@dataclass(frozen=True)
class Sample:
    """The state of one sample. row: its row in the table; it is done when row > last. gaps: one entry a step, NaN at first."""

    latents: Tensor
    gaps: tuple[float, ...]
    row: int
    last: int
    transition: int = -1
    history: Tensor | float = 0.0


def look(sample: Sample, uncond: Tensor, cond: Tensor | None, table: Tensor, rule: str = "cfg") -> tuple[Sample, Tensor]:
    """(the sample with gap and transition updated, its guided prediction). cond None: `uncond` is the guided one; no gap."""
    row = table[sample.row].double().tolist()
    k, left, gaps = int(row[Column.STEP]), sample.transition, sample.gaps
    gap = math.nan if cond is None else noise_gap(uncond, cond)
    if left < 0 and leaves(gap, gaps[:k], *row[Column.KEEP : Column.WAIT]):
        left = k + int(row[Column.WAIT])
    if row[Column.FIRST] and cond is not None:
        gaps = (*gaps[:k], gap, *gaps[k + 1 :])
    weight = row[Column.AFTER if 0 <= left <= k else Column.BEFORE]
    options = row[Column.FIRST_OPTION :]
    prediction = uncond.double() if cond is None else guided(uncond, cond, weight, rule, options)
    return replace(sample, gaps=gaps, transition=left), prediction


def step(sample: Sample, uncond: Tensor, cond: Tensor | None, table: Tensor, rule: str = "cfg") -> Sample:
    """The sample after this call of the network. A sample that is done is returned unchanged."""
    if sample.row > sample.last:
        return sample
    a, b, p, q = table[sample.row, Column.A : Column.Q + 1].double().tolist()
    sample, g = look(sample, uncond, cond, table, rule)
    x = sample.latents.double()
    return replace(sample, latents=a * x + b * g + sample.history, history=p * x + q * g, row=sample.row + 1)
