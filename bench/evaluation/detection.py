"""Statistics that tell memorized captions from others, and copies from other pictures: how well each does, what it costs.

python -m basinescape.bench.evaluation.detection --scenario flow --json FILE [--seeds 2] [--first-seed 0]
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from basinescape import Guidance
from basinescape.guidance.guard import PROBES
from torch import Tensor

from ..scenario import Prompt
from . import experiment
from .metrics import roc
from .trajectories import Laboratory, curves

WATCHED = (1, 5, 10)  # numbers of first steps over which a statistic is averaged
ALIGNED = {"v_prediction": 0.1}  # weight of the cosine beside the norm, for SD 2; any other prediction type has SD 1's, 2
Lines = list[dict[str, Any]]
Groups = dict[str, list[Prompt]]
SIZE = 4 * 64 * 64  # elements of the latents for which these weights were chosen; a norm grows with the root of the number


@torch.inference_mode()
def anisotropy(lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int]) -> list[dict[str, float]]:
    """Statistics of the initial noise of every prompt with every seed, from two pairs of predictions.

    norm: || cond - uncond || at the first timestep. cosine: that of uncond and cond - uncond over the channels, at the third
    last timestep on the same noise, averaged over positions. both: norm + weight * cosine.

    Asthana & Belagiannis, ICLR 2026, https://arxiv.org/abs/2601.20642, as in its authors' scripts. Differences: predictions are
    always raw, and the norm is scaled to latents of 4 x 64 x 64.
    """
    sampler, model, solver = lab.sampler, lab.sampler.model, lab.sampler.solver(lab.steps)
    weight = ALIGNED.get(sampler.scheduler.config.get("prediction_type"), 2.0)
    height, width = sampler.size()
    rows = []
    for batch, drawn in lab.bar(lab.batches(found, seeds), "noise alone"):
        network = model.network(model.encode([prompt.text for prompt in batch], height, width, **sampler.options), plain=True)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in drawn]
        noise = model.noise(generators, height, width, **sampler.options) * solver.init_sigma

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


def detection(
    lines: Sequence[dict[str, Any]],
    positive: Sequence[bool],
    usual: Sequence[float],
    noise: Sequence[dict[str, float]] = (),
) -> list[dict[str, Any]]:
    """How well each statistic tells the positive `lines` from the others, and its network calls for each sample.

    lines: of `curves`. usual: the noise gap of ordinary prompts at each step. noise: `anisotropy` of each line; () for none.

    Statistics of `Curves` are averaged over the first steps; they cost nothing if the picture is made anyhow. Four use the gaps
    divided by `usual`. last: the last step's. product: the mean of the first tenth, times the last. collapse: log(last * the
    first fifth's geometric mean / the second fifth's). largest: the maximum. turn: how far the conditional prediction moves
    from the first step to the second. basin score: see `basinescape.detection.basin_score`.
    """
    gaps = torch.tensor([line["gap"] for line in lines]) / torch.tensor(usual)
    steps, tenth, fifth = gaps.shape[1], max(1, gaps.shape[1] // 10), max(1, gaps.shape[1] // 5)
    found: list[tuple[str, int, int, Sequence[float]]] = [
        (name, k, 2 * k, [fmean(line[name][:k]) for line in lines])
        for name in ("gap", "relative", "alignment", "update")
        for k in WATCHED
        if k < steps
    ]
    logs = gaps.log()
    whole = {
        "last": gaps[:, -1],
        "product": gaps[:, :tenth].mean(dim=1) * gaps[:, -1],
        "collapse": logs[:, :fifth].mean(dim=1) - logs[:, fifth : 2 * fifth].mean(dim=1) + logs[:, -1],
        "largest": gaps.amax(dim=1),
    }
    found += [(name, steps, 2 * steps, values.tolist()) for name, values in whole.items()]
    found += [("turn", 2, 4, [line["turn"] for line in lines])]
    found += [("basin score", steps, 2 * (steps + PROBES), [line["score"] for line in lines])]
    if noise:
        of = (("norm", 2), ("cosine", 2), ("both", 4))
        found += [(f"noise alone, {name}", 1, calls, [row[name] for row in noise]) for name, calls in of]
    rows = []
    for name, k, calls, scores in found:
        area, hits = roc(scores, positive)
        row = {"statistic": name, "steps": k, "network_calls": calls}
        rows.append(row | {"auc": round(area, 4), "tpr_at_1pct_fpr": round(hits, 4)})
    return rows


def captions_told(lab: Laboratory, groups: Groups, seeds: Sequence[int], plain: dict[str, Lines]) -> Lines:
    """`detection` of the memorized captions among all captions, under plain guidance. plain: lines of `curves` by group."""
    noise = [row for name in ("memorized", "general") for row in anisotropy(lab, groups[name], seeds)]
    positive = [True] * len(plain["memorized"]) + [False] * len(plain["general"])
    return detection([*plain["memorized"], *plain["general"]], positive, _usual(plain), noise)


def pictures_told(lab: Laboratory, groups: Groups, seeds: Sequence[int], plain: dict[str, Lines]) -> Lines:
    """`detection` of copies among delayed attempts at memorized captions: the captions are alike, so only the picture tells.

    Empty if all pictures or none are copies, or without training images.
    """
    if not lab.measure.tells_copies:
        return []
    lines = [line for guidance in lab.delays() for line in curves(lab, groups["memorized"], seeds, guidance)]
    positive = [line["memorized"] for line in lines]
    return detection(lines, positive, _usual(plain)) if len(set(positive)) == 2 else []


def _usual(plain: dict[str, Lines]) -> list[float]:
    return np.median([line["gap"] for line in plain["general"]], axis=0).tolist()


def study(lab: Laboratory, groups: Groups, seeds: Sequence[int]) -> dict[str, Lines]:
    """The rows of `captions_told` and of `pictures_told`."""
    plain = {name: curves(lab, found, seeds, Guidance.cfg(lab.scale)) for name, found in groups.items()}
    return {"captions": captions_told(lab, groups, seeds, plain), "pictures": pictures_told(lab, groups, seeds, plain)}


if __name__ == "__main__":
    experiment.run(study, str(__doc__), first_seed=0)
