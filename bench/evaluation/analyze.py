"""Basins made visible: where guidance may start, how trajectories converge, how wide a basin is, does a rule find its edge.

`analyze` runs a scenario with the sampler's own step, opened up where a trajectory is looked at or pushed, and writes
onset.csv, convergence.csv, returns.csv, curves.json and summary.json, with a figure for each of the first four.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basinescape import FirstMinimum, Guidance, Sampler, Settled
from basinescape.folder import settings_of
from basinescape.kernels import definition
from basinescape.kernels.state import State
from basinescape.loop import Plan, fused_step
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..scenario import Prompt, Scenario, limited, prompts
from . import figures
from .evaluate import write_csv
from .measure import Measure
from .metrics import roc

Look = Callable[[State, Tensor, Tensor], None]  # sees the state and both predictions, (B, ...), before a step is taken
Push = Callable[[int, State, Tensor], None]  # sees the step, the state and the table, and may put other latents into the state
WATCHED = (1, 5, 10)  # first steps whose statistics are tried as a score of memorization


@dataclass
class Laboratory:
    """A scenario's sampler and measure, and runs whose every step can be looked at."""

    scenario: Scenario
    sampler: Sampler
    measure: Measure
    batch_size: int = 16

    @torch.inference_mode()
    def run(
        self,
        found: Sequence[Prompt],
        seeds: Sequence[int],
        guidance: Guidance,
        look: Look | None = None,
        push: Push | None = None,
    ) -> list[Image.Image]:
        """An image for each prompt and its seed; both branches run in every step."""
        model, steps = self.sampler.model, self.scenario.steps
        solver = self.sampler.solver(steps)
        plan = Plan.make(solver, guidance, model.device, model.settle)
        height, width = self.sampler.size()
        network = model.network(model.encode([prompt.text for prompt in found], height, width), plain=True)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = self.sampler.noise(generators, height, width) * solver.init_sigma
        state = plan.state(noise.to(model.device, model.dtype))

        def seen(latents: Tensor, timesteps: Tensor, branch: str) -> Tensor:
            predictions = network(latents, timesteps, branch)
            if look:
                look(state, *predictions.chunk(2))
            return predictions

        take = fused_step(seen, plan, state)
        for k in range(len(plan.branches)):
            if push:
                push(k, state, plan.table)
            take("both")
        return model.decode(state.latents.x, "pil").images

    def batches(self, found: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[list[Prompt], list[int]]]:
        """Every prompt with every seed, in batches."""
        pairs = [(prompt, seed) for seed in seeds for prompt in found]
        chunks = [pairs[i : i + self.batch_size] for i in range(0, len(pairs), self.batch_size)]
        return [([prompt for prompt, _ in chunk], [seed for _, seed in chunk]) for chunk in chunks]

    def outcomes(self, found: Sequence[Prompt], seeds: Sequence[int], guidance: Guidance, push: Push | None = None):
        """(id, seed, measured) of every prompt and seed under `guidance`."""
        for batch, drawn in self.batches(found, seeds):
            images = self.run(batch, drawn, guidance, push=push)
            for prompt, seed, measured in zip(batch, drawn, self.measure(images, batch), strict=True):
                yield prompt.id, seed, measured


def starting_at(step: int, scale: float, steps: int) -> Guidance:
    """No guidance before `step`, `scale` from there on."""
    return Guidance.cfg(scale, shape=tuple(float(k >= step) for k in range(steps)))


def onset_sweep(lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int], onsets: Sequence[int]) -> list[dict[str, Any]]:
    """What becomes of every prompt and seed if guidance starts at each of `onsets`."""
    return [
        {"id": id, "seed": seed, "onset": onset, **measured}
        for onset in tqdm(onsets, desc="onsets")
        for id, seed, measured in lab.outcomes(found, seeds, starting_at(onset, lab.scenario.scale, lab.scenario.steps))
    ]


def edges(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], int]:
    """The basin's edge of each (id, seed): the first onset of the sweep from which on no image is memorized.

    One past the last onset where even that is memorized.
    """
    onsets = sorted({row["onset"] for row in rows})
    inside: dict[tuple[str, int], list[int]] = {(row["id"], row["seed"]): [] for row in rows}
    for row in rows:
        if row["memorized"]:
            inside[row["id"], row["seed"]].append(row["onset"])
    return {
        key: next((onset for onset in onsets if onset > max(found, default=-1)), onsets[-1] + 1)
        for key, found in inside.items()
    }


class Curves:
    """Statistics of every step of a batch: {name: (steps, B)}.

    gap: ||cond - uncond||. relative: the gap over ||uncond||. alignment: the cosine of cond - uncond and uncond (Asthana &
    Belagiannis, ICLR 2026). update: ||x_(k+1) - x_k|| (Huang et al., KDD 2026).
    """

    def __init__(self) -> None:
        self.series: dict[str, list[list[float]]] = {"gap": [], "relative": [], "alignment": [], "update": []}
        self._latents: Tensor | None = None

    def __call__(self, state: State, uncond: Tensor, cond: Tensor) -> None:
        u = uncond.float().flatten(1)
        d = cond.float().flatten(1) - u
        latents = state.latents.x.float().flatten(1).clone()
        if self._latents is not None:
            self.series["update"].append((latents - self._latents).norm(dim=1).tolist())
        self._latents = latents
        gap = d.norm(dim=1)
        self.series["gap"].append(gap.tolist())
        self.series["relative"].append((gap / u.norm(dim=1)).tolist())
        self.series["alignment"].append(torch.cosine_similarity(d, u, dim=1).tolist())


def curves(lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int], weight: float) -> list[dict[str, Any]]:
    """`Curves` along trajectories under a constant `weight`, a line for each prompt and seed."""
    lines = []
    constant = Guidance.cfg(1.0, shape=(weight,) * lab.scenario.steps)
    for batch, drawn in lab.batches(found, seeds):
        look = Curves()
        lab.run(batch, drawn, constant, look)
        for i, (prompt, seed) in enumerate(zip(batch, drawn, strict=True)):
            own = {name: [round(step[i], 5) for step in series] for name, series in look.series.items()}
            lines.append({"id": prompt.id, "seed": seed, **own})
    return lines


class Spread:
    """Root mean square distance of a batch's latents to their mean, a number a step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, state: State, uncond: Tensor, cond: Tensor) -> None:
        latents = state.latents.x.float().flatten(1)
        self.values.append((latents - latents.mean(dim=0)).square().mean().sqrt().item())


def convergence(lab: Laboratory, groups: dict[str, list[Prompt]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """How far apart the plainly guided trajectories of one prompt's seeds are, over time."""
    rows = []
    for group, found in groups.items():
        for prompt in tqdm(found, desc=f"convergence, {group}"):
            look = Spread()
            lab.run([prompt] * len(seeds), seeds, Guidance.cfg(lab.scenario.scale), look)
            rows += [{"group": group, "id": prompt.id, "step": k, "spread": round(v, 5)} for k, v in enumerate(look.values)]
    return rows


def pushed(at: int, size: float) -> Push:
    """Noise on the latents before step `at`, `size` times their standard deviation."""

    def push(k: int, state: State, table: Tensor) -> None:
        if k == at:
            latents = state.latents.x.float()
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(at)).to(latents.device)
            deviation = latents.flatten(1).std(dim=1).view(-1, *[1] * (latents.ndim - 1))
            state.put((latents + size * deviation * noise).to(state.latents.x.dtype), table)

    return push


def returns(
    lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int], steps: Sequence[int], sizes: Sequence[float]
) -> list[dict[str, Any]]:
    """Whether a plainly guided trajectory that is pushed still ends in the memorized image: the basin's width."""
    plain = Guidance.cfg(lab.scenario.scale)
    return [
        {"step": at, "size": size, "id": id, "seed": seed, "returned": measured["memorized"]}
        for at in tqdm(steps, desc="returns")
        for size in sizes
        for id, seed, measured in lab.outcomes(found, seeds, plain, pushed(at, size))
    ]


def transition(gaps: Sequence[float], until: FirstMinimum | Settled) -> int | None:
    """The transition that `until` finds in a curve of gaps, None for none."""
    found = definition.transition(gaps, until.leaving(range(len(gaps))))  # neither looks at the timesteps
    return None if found < 0 else found


def agreement(
    lines: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], rule: Callable[[dict[str, Any]], int | None]
) -> dict[str, Any]:
    """Does `rule` (a line of curves -> step) find the edge that the sweep saw? What it would give, by the nearest onset."""
    outcome = {(row["id"], row["seed"], row["onset"]): row for row in rows}
    onsets = np.array(sorted({row["onset"] for row in rows}))
    true = edges(rows)
    found = {(line["id"], line["seed"]): rule(line) for line in lines}
    steps = {key: step for key, step in found.items() if step is not None}
    given = [outcome[(*key, int(onsets[np.abs(onsets - step).argmin()]))] for key, step in steps.items()]
    both = np.array([(step, true[key]) for key, step in steps.items()], dtype=float).reshape(-1, 2)
    varied = len(both) > 2 and both.std(axis=0).all()
    return {
        "n": len(found),
        "never": len(found) - len(steps),
        "median_step": float(np.median(both[:, 0])) if steps else None,
        "median_edge": float(np.median([true[key] for key in found])),
        "too_early": _share(both[:, 0] < both[:, 1]),
        "correlation": round(float(np.corrcoef(both.T)[0, 1]), 3) if varied else None,
        "memorized": _share([row["memorized"] for row in given]),
        "concept": _share([row["concept_ok"] for row in given]),
    }


def _share(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 3) if len(values) else None


def rules(ordinary: Sequence[float]) -> dict[str, Callable[[dict[str, Any]], int | None]]:
    """The rules that are compared: the paper's, its options, this project's, and a step that is the same for all."""
    minima = {"first minimum": FirstMinimum(), "first minimum, earliest 8": FirstMinimum(earliest=8)}
    minima |= {f"first minimum, drop {drop}": FirstMinimum(drop=drop) for drop in (0.1, 0.3)}
    waits = {
        f"settled {factor}, wait {wait}": Settled(tuple(ordinary), factor, wait, latest=24)
        for factor in (1.2, 1.5, 1.8)
        for wait in (4, 6, 8)
    }
    found = {name: lambda line, until=until: transition(line["gap"], until) for name, until in (minima | waits).items()}
    return found | {f"step {step}": lambda line, step=step: step for step in (8, 10, 12, 14, 16)}


def halves(found: Sequence[Prompt]) -> dict[str, set[str]]:
    """Prompts to choose a rule's numbers on, and prompts held out."""
    middle = len(found) // 2
    return {"chosen on": {p.id for p in found[:middle]}, "held out": {p.id for p in found[middle:]}}


def detection(memorized: Sequence[dict[str, Any]], general: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How well the mean of each statistic over the first steps of plain guidance tells memorized prompts from general ones."""
    positive = [True] * len(memorized) + [False] * len(general)
    rows = []
    for name in ("gap", "relative", "alignment", "update"):
        for steps in WATCHED:
            scores = [float(np.mean(line[name][:steps])) for line in [*memorized, *general]]
            area, hits = roc(scores, positive)
            rows.append({"statistic": name, "steps": steps, "auc": round(area, 4), "tpr_at_1pct_fpr": round(hits, 4)})
    return rows


def analyze(
    scenario: Scenario,
    out: str | Path,
    seeds: int = 2,
    limit: int | None = None,
    onsets: Sequence[int] = tuple(range(0, 34, 2)),
    dtype: str = "float32",
    device: str | None = None,
) -> dict[str, Any]:
    """Run every analysis on `scenario` into the folder `out`, which must be new or empty; returns the summary."""
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"output folder {str(out)!r} is not empty: choose another")
    groups = limited(prompts(scenario), limit)
    if "general" not in groups:
        raise ValueError(f"scenario {scenario.name!r} has no general prompts to compare with")
    model = Sampler.model_path("tiny") if scenario.model == "tiny" else scenario.model
    lab = Laboratory(scenario, Sampler.from_pretrained(model, device, dtype, scenario.scheduler), Measure(scenario, groups))
    out.mkdir(parents=True, exist_ok=True)
    drawn, few = range(seeds), {name: found[:8] for name, found in groups.items()}

    plain = {name: curves(lab, found, drawn, scenario.scale) for name, found in groups.items()}
    free = curves(lab, groups["memorized"], drawn, 0.0)
    opposed = curves(lab, groups["memorized"], drawn, -scenario.scale)
    (out / "curves.json").write_text(json.dumps({"plain": plain, "unguided": free, "opposed": opposed}))
    sweep = onset_sweep(lab, groups["memorized"], drawn, onsets)
    write_csv(out / "onset.csv", sweep)
    converging = convergence(lab, few, range(8))
    write_csv(out / "convergence.csv", converging)
    returning = returns(lab, groups["memorized"][:16], [0], (0, 5, 10, 15, 20, 30), (0.4, 0.8, 1.6, 3.2))
    write_csv(out / "returns.csv", returning)

    ordinary = np.median([line["gap"] for line in curves(lab, groups["general"], drawn, 0.0)], axis=0).tolist()
    summary = {
        "scenario": scenario.name,
        "seeds": seeds,
        **settings_of(lab.sampler),
        "prompts": {name: len(part) for name, part in groups.items()},
        "onset": [
            {
                "onset": onset,
                "memorized": _share([row["memorized"] for row in sweep if row["onset"] == onset]),
                "similarity": _share([row["similarity"] for row in sweep if row["onset"] == onset]),
                "concept": _share([row["concept_ok"] for row in sweep if row["onset"] == onset]),
            }
            for onset in onsets
        ],
        "detection": detection(plain["memorized"], plain["general"]),
        "ordinary": [round(gap, 4) for gap in ordinary],
        "agreement": [
            {"rule": name, "prompts": half, **agreement([line for line in free if line["id"] in ids], sweep, rule)}
            for name, rule in rules(ordinary).items()
            for half, ids in halves(groups["memorized"]).items()
        ],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    figures.onset(summary["onset"], out / "onset.png")
    figures.convergence(converging, out / "convergence.png")
    figures.returns(returning, out / "returns.png")
    figures.curves(plain, out / "curves.png")
    return summary
