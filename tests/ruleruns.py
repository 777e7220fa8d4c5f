"""What the kernels make of random predictions under guidance rules, compared with the definition in float64."""

import math
from dataclasses import replace

import torch
from basinescape.kernels import definition, step
from basinescape.kernels.rules import RULES, columns_of, options_of
from basinescape.kernels.state import State
from basinescape.kernels.table import Column
from kernelruns import TOLERANCE, table_of

COMBINING = [name for name, rule in RULES.items() if rule is not None]


def exact(uncond, cond, weight, rule):
    options = columns_of(options_of(rule, {}))
    together = zip(uncond, cond, weight.tolist(), strict=True)
    return torch.stack([definition.guided(u, c, w, rule, options) for u, c, w in together])


def check(found, uncond, cond, weight, rule):
    expected, room = exact(uncond, cond, weight, rule), 5 * TOLERANCE[uncond.dtype]
    torch.testing.assert_close(found.double(), expected, atol=room, rtol=room)


def started(batch, dtype=torch.float32, shape=(4, 8, 8), device="cpu"):
    rng = torch.Generator().manual_seed(batch)
    table = table_of(rng, steps=4, multistep=True)
    table[:, [Column.BEFORE, Column.AFTER]] = torch.tensor([[-2.0, 7.5], [1.0, 3.0], [0.0, 7.5], [3.0, 0.0]])
    state = State.empty((batch, *shape), 4, dtype, device, True)
    return state.start(torch.randn((batch, *shape), generator=rng).to(dtype), table), table


def with_options(table, rule):
    table[:, Column.FIRST_OPTION :] = torch.tensor(columns_of(options_of(rule, {})))


def follow(rule, finds, shape=(4, 8, 8), device="cpu", take=step):
    """A run of three samples, step after step, against the definition. take: what takes the step."""
    (state, table), rng = started(3, shape=shape, device=device), torch.Generator().manual_seed(0)
    with_options(table, rule)
    samples = [definition.Sample(x.clone(), (math.nan,) * 4, 0, 3) for x in state.latents.x]
    if not finds:
        table[:, Column.KEEP], table[:, Column.LIMIT] = -math.inf, torch.tensor([-math.inf, -math.inf, math.inf, math.inf])
    for _ in range(4):
        uncond, noise = torch.randn((2, 3, *shape), generator=rng)
        cond = uncond + (torch.rand((3, 1, 1, 1), generator=rng) + 0.1) * noise
        take(uncond, cond, table, state, finds, rule)
        samples = [definition.step(s, u, c, table, rule) for s, u, c in zip(samples, uncond, cond, strict=True)]
        for i, sample in enumerate(samples):
            x = state.latents.x[i]
            torch.testing.assert_close(x.double(), sample.latents.double(), atol=1e-4, rtol=1e-4)
            samples[i] = replace(sample, latents=x.clone())
        assert state.transition.at.tolist() == [sample.transition for sample in samples]
