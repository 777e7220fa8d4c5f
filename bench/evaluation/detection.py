"""What tells memorized prompts from others: statistics of the two predictions, how well each does, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from basinescape import Calibration, Guidance
from basinescape.guard import Ladder
from basinescape.guidance import Rung
from torch import Tensor

from ..scenario import Prompt
from .metrics import roc
from .trajectories import Laboratory

WATCHED = (1, 5, 10)  # first steps whose statistics are tried as a score of memorization
ALIGNED = {"v_prediction": 0.1}  # weight of the cosine beside the norm, 2 for any other prediction: SD 2's and SD 1's
SIZE = 4 * 64 * 64  # numbers in the latents that those weights are for; a norm grows with the root of their number


@torch.inference_mode()
def anisotropy(lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int]) -> list[dict[str, float]]:
    """What the initial noise alone says of every prompt with every seed, by two pairs of predictions.

    norm: || cond - uncond || at the first timestep. cosine: of uncond and cond - uncond over the channels, at the third last
    timestep on the same noise, the mean over places. both: norm + weight * cosine.

    Asthana & Belagiannis, ICLR 2026, https://arxiv.org/abs/2601.20642, as in its authors' scripts; here always of the raw
    predictions, and with the norm as it would be in latents of 4 x 64 x 64.
    """
    sampler, model, solver = lab.sampler, lab.sampler.model, lab.sampler.solver(lab.scenario.steps)
    weight = ALIGNED.get(sampler.scheduler.config.get("prediction_type"), 2.0)
    height, width = sampler.size()
    rows = []
    for batch, drawn in lab.bar(lab.batches(found, seeds), "noise alone"):
        network = model.network(model.encode([prompt.text for prompt in batch], height, width, **sampler.options), plain=True)
        noise = sampler.noise([torch.Generator("cpu").manual_seed(seed) for seed in drawn], height, width) * solver.init_sigma

        def pair(call: int, noise: Tensor = noise, network: Any = network) -> tuple[Tensor, Tensor]:
            inputs = (noise * solver.input_scale[call]).to(model.device, model.dtype)
            timesteps = solver.timesteps[call].repeat(2 * len(noise)).to(model.device)
            return network(torch.cat([inputs, inputs]), timesteps, "both").float().chunk(2)

        uncond, cond = pair(0)
        norms = (cond - uncond).flatten(1).norm(dim=1) * (SIZE / uncond[0].numel()) ** 0.5
        uncond, cond = pair(max(len(solver.timesteps) - 3, 0))
        cosines = F.cosine_similarity(uncond, cond - uncond, dim=1).flatten(1).mean(dim=1)
        rows += [
            {"norm": norm, "cosine": cosine, "both": norm + weight * cosine}
            for norm, cosine in zip(norms.tolist(), cosines.tolist(), strict=True)
        ]
    return rows


def usual(lab: Laboratory, general: Sequence[dict[str, Any]]) -> Rung:
    """What is ordinary under plain guidance: the calibration says it, where one fits, else the median of these curves."""
    scenario = lab.scenario
    if scenario.calibration:
        try:
            guard = Guidance.guard(scenario.scale, Calibration.load(scenario.calibration))
            Ladder.make(lab.sampler.solver(scenario.steps), guard, torch.device("cpu"))
            return guard.rungs[0]
        except ValueError:  # of other steps, or another scale
            pass
    gaps = torch.tensor([line["gap"] for line in general]).median(dim=0).values.tolist()
    fifth = max(1, len(gaps) // 5)
    return Rung(Guidance.cfg(scenario.scale), tuple(gaps), max(1, fifth // 2), math.inf, fifth, fifth, math.inf)


def detection(
    memorized: Sequence[dict[str, Any]],
    general: Sequence[dict[str, Any]],
    noise: tuple[Sequence[dict[str, float]], Sequence[dict[str, float]]],
    ordinary: Rung,
) -> list[dict[str, Any]]:
    """How well each statistic tells memorized prompts from general ones, and the network calls that it takes a sample.

    memorized, general: lines of `curves` under plain guidance. noise: `anisotropy` of both. ordinary: what is usual.

    Statistics of `Curves` are their means over the first steps. product: the mean of the first tenth of the gaps times the last
    one; score: the guard's; largest: of all. They are of gaps relative to what is usual, and cost nothing where the image is
    made anyhow.
    """
    lines = [*memorized, *general]
    steps = len(lines[0]["gap"])
    gaps = torch.tensor([line["gap"] for line in lines])
    found: list[tuple[str, int, int, Sequence[float]]] = [
        (name, k, 2 * k, [fmean(line[name][:k]) for line in lines])
        for name in ("gap", "relative", "alignment", "update")
        for k in WATCHED
        if k < steps
    ]
    product = ordinary.look(gaps) * gaps[:, -1] / ordinary.gap[-1]
    whole = {"product": product, "score": ordinary.score(gaps), "largest": ordinary.largest(gaps)}
    found += [(name, steps, 2 * steps, values.tolist()) for name, values in whole.items()]
    alone = [*noise[0], *noise[1]]
    found += [(f"noise alone, {name}", 1, calls, [row[name] for row in alone]) for name, calls in (("cosine", 2), ("both", 4))]
    positive = [True] * len(memorized) + [False] * len(general)
    rows = []
    for name, k, calls, scores in found:
        area, hits = roc(scores, positive)
        row = {"statistic": name, "steps": k, "network_calls": calls}
        rows.append(row | {"auc": round(area, 4), "tpr_at_1pct_fpr": round(hits, 4)})
    return rows
