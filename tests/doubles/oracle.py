"""A run of one sample by `kernels/definition.py` alone: float64, one step after another."""

import torch
from basinescape.kernels import definition
from basinescape.kernels.rules import columns_of


def run(predict, step, x, timesteps, guidance):
    """(latents, transition, gaps) of one sample.

    predict: (x (1, ...), k) -> (uncond, cond). step: (x, guided, k) -> x. timesteps: of the steps, in 0..1000.
    """
    x, gaps, left = x.double(), [], -1
    criteria = [None] * len(timesteps) if guidance.until is None else guidance.until.criteria(timesteps)
    for k, ((before, after), how) in enumerate(zip(guidance.weights(timesteps), criteria, strict=True)):
        uncond, cond = predict(x, k)
        gap = definition.noise_gap(uncond, cond)
        if left < 0 and (how is None or definition.leaves(gap, gaps, how.keep, how.limit, how.fall)):
            left = k + (0 if how is None else how.wait)
        gaps.append(gap)
        weight = after if 0 <= left <= k else before
        x = step(x, definition.guided(uncond, cond, weight, guidance.rule, columns_of(dict(guidance.options))), k)
    return x, left if left < len(timesteps) else -1, gaps


def samples(predict, step, x, timesteps, guidance):
    """The same of each sample of x (B, ...), under its own guidance: latents (B, ...), transitions (B,), gaps (B, steps).

    predict: (x (1, ...), k, i) -> (uncond, cond) of sample i.
    """
    each = [run(lambda y, k, i=i: predict(y, k, i), step, x[i : i + 1], timesteps, one) for i, one in enumerate(guidance)]
    latents, transitions, gaps = zip(*each, strict=True)
    return torch.cat(latents), torch.tensor(transitions), torch.tensor(gaps)


def known(found, expected):
    """Gaps that a host computed, and those of the oracle there."""
    seen = found.isfinite()
    return found[seen].double(), expected[seen]
