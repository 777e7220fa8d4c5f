"""Analysis of basins: where guidance may start, how trajectories converge, how wide a basin is, which rules find its edge.

`analyze` runs a scenario with the sampler's own step, and with hooks that record or push a trajectory. It writes onset.csv,
convergence.csv, returns.csv, curves.json and summary.json, and a figure for each of the first four. An analysis that needs
training images, concepts or general prompts is skipped if the scenario has none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from basinescape import FirstMinimum, Guidance, Settled, checks
from basinescape.data.tables import write_csv
from basinescape.kernels import definition

from ..scenario import Prompt, Scenario, limited, prompts
from . import figures
from .comparison import ENOUGH
from .detection import captions_told, pictures_told
from .trajectories import Laboratory, constant, convergence, curves, edges, onset_sweep, returns

log = logging.getLogger(__name__)

Rule = FirstMinimum | Settled | int  # finds the transition; a number is the same step for all samples


def transition(gaps: Sequence[float], rule: Rule) -> int | None:
    """The step at which `rule` finds the transition in a curve of gaps; None if it finds none."""
    if isinstance(rule, int):
        return rule
    found = definition.transition(gaps, rule.criteria(range(len(gaps))))  # neither rule uses the timesteps
    return None if found < 0 else found


def agreement(lines: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], rule: Rule) -> dict[str, Any]:
    """Compare the steps that `rule` finds in `lines` with the edges in the sweep's `rows`. Shares are of the nearest onsets."""
    outcome = {(row["id"], row["seed"], row["onset"]): row for row in rows}
    onsets = np.array(sorted({row["onset"] for row in rows}))
    true = edges(rows)
    found = {(line["id"], line["seed"]): transition(line["gap"], rule) for line in lines}
    steps = {key: step for key, step in found.items() if step is not None}
    given = [outcome[(*key, int(onsets[np.abs(onsets - step).argmin()]))] for key, step in steps.items()]
    both = np.array([(step, true[key]) for key, step in steps.items()], dtype=float).reshape(-1, 2)
    varied = len(both) > 2 and both.std(axis=0).all()
    return {
        "n": len(found),
        "never": len(found) - len(steps),
        "median_step": float(np.median(both[:, 0])) if steps else None,
        "median_edge": float(np.median([true[key] for key in found])),
        "too_early": _share((both[:, 0] < both[:, 1]).tolist()),
        "correlation": round(float(np.corrcoef(both.T)[0, 1]), 3) if varied else None,
        "memorized": _share([row["memorized"] for row in given]),
        "concept": _share([row["concept_ok"] for row in given]),
    }


def _share(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None without any."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 3) if known else None


def at(step: int, steps: int) -> int:
    """`step` of 50 scaled to `steps` steps."""
    return round(step * steps / 50)


def rules(ordinary: Sequence[float], steps: int) -> dict[str, Rule]:
    """The rules to compare: the paper's, its options, this project's (if `ordinary`, the usual gaps, is known), fixed steps."""
    earliest = max(2, at(8, steps))
    found: dict[str, Rule] = {
        "first minimum": FirstMinimum(),
        f"first minimum, earliest {earliest}": FirstMinimum(earliest=earliest),
    }
    found |= {f"first minimum, drop {drop}": FirstMinimum(drop=drop) for drop in (0.1, 0.3)}
    if ordinary:
        found |= {
            f"settled {factor}, wait {wait}": Settled(tuple(ordinary), factor, wait, latest=at(24, steps))
            for factor in (1.2, 1.5, 1.8)
            for wait in (at(4, steps), at(6, steps), at(8, steps))
        }
    return found | {f"step {step}": step for step in (at(step, steps) for step in (8, 10, 12, 14, 16))}


def halves(found: Sequence[Prompt]) -> dict[str, set[str]]:
    """The ids of the prompts on which a rule's numbers are chosen, and of those held out. A single prompt is held out."""
    middle = len(found) // 2
    parts = {"chosen on": {p.id for p in found[:middle]}, "held out": {p.id for p in found[middle:]}}
    return {name: ids for name, ids in parts.items() if ids}


def analyze(
    scenario: Scenario,
    out: str | Path,
    seeds: int = 2,
    limit: int | None = None,
    onsets: Sequence[int] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run every analysis on `scenario`, write the files into the folder `out`, new or empty, and return the summary.

    onsets: steps at which guidance starts in the sweep; None: every second step (of 50) in the first two thirds.

    Raises ValueError, before any work, for a bad number or folder.
    """
    out = Path(out)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise ValueError(f"output folder {str(out)!r} is {'a file' if out.is_file() else 'not empty'}: choose another")
    for name, value in (("seeds", seeds), ("limit", 1 if limit is None else limit)):
        checks.at_least_one(name, value)
    every = prompts(scenario)
    groups = limited(every, limit)
    lab = Laboratory.of(scenario, every, device, dtype, progress)
    drawn, steps, general, copies = range(seeds), lab.steps, "general" in groups, lab.measure.tells_copies
    onsets = range(0, 2 * steps // 3 + 1, max(1, steps // 25)) if onsets is None else onsets
    _warn(general, copies, min(len(found) for found in groups.values()) * seeds)
    checks.at_least("steps", steps, 2)  # a trajectory
    lab.sampler.solver(steps)  # raises for steps that the scheduler cannot take
    out.mkdir(parents=True, exist_ok=True)

    plain = {name: curves(lab, found, drawn, Guidance.cfg(lab.scale)) for name, found in groups.items()}
    free, opposed = (curves(lab, groups["memorized"], drawn, constant(w, steps)) for w in (0.0, -lab.scale))
    (out / "curves.json").write_text(json.dumps({"plain": plain, "unguided": free, "opposed": opposed}))
    figures.curves(plain, out / "curves.png")
    separated = _separated(lab, groups, drawn, plain)
    shown = copies or lab.measure.knows_concepts(groups["memorized"])
    sweep = onset_sweep(lab, groups["memorized"], drawn, onsets) if shown else []
    _basins(lab, groups, sweep, out)
    summary = {
        "scenario": scenario.name,
        "seeds": seeds,
        **lab.sampler.provenance,
        "prompts": {name: len(part) for name, part in groups.items()},
        "onset": [_at_onset(sweep, onset) for onset in onsets if sweep],
        **separated,
        "agreement": [
            {"rule": name, "prompts": half, **agreement([line for line in free if line["id"] in ids], sweep, rule)}
            for name, rule in rules(separated["ordinary"], steps).items()
            for half, ids in halves(groups["memorized"]).items()
            if copies
        ],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if sweep:
        figures.onset(summary["onset"], out / "onset.png")
    return summary


def _warn(general: bool, copies: bool, pictures: int) -> None:
    """Warn of missing general prompts or training images, and of too few pictures. pictures: those of the smallest group."""
    for there, what, without in (
        (general, "general prompts", "what tells memorized prompts apart, and what is ordinary"),
        (copies, "training images", "where copying ends, and how wide a basin is"),
    ):
        if not there:
            log.warning("the scenario has no %s: left out is %s", what, without)
    if pictures < ENOUGH:
        log.warning("rates of %d pictures a group cannot tell much; those of %d or more can begin to", pictures, ENOUGH)


def _separated(
    lab: Laboratory, groups: dict[str, list[Prompt]], seeds: Sequence[int], plain: dict[str, list[dict[str, Any]]]
) -> dict[str, list[Any]]:
    """How well memorized captions and copies are detected, and the usual unguided gaps. All empty without general prompts."""
    if "general" not in groups:
        return {"detection": [], "copies": [], "ordinary": []}
    free = curves(lab, groups["general"], seeds, constant(0.0, lab.steps))
    return {
        "detection": captions_told(lab, groups, seeds, plain),
        "copies": pictures_told(lab, groups, seeds, plain),
        "ordinary": [round(gap, 4) for gap in np.median([line["gap"] for line in free], axis=0).tolist()],
    }


def _basins(lab: Laboratory, groups: dict[str, list[Prompt]], sweep: Sequence[dict[str, Any]], out: Path) -> None:
    """Write files and figures of the sweep, the convergence of trajectories and, with training images, returns after a push."""
    if sweep:
        write_csv(out / "onset.csv", sweep)
    converging = convergence(lab, {name: found[:8] for name, found in groups.items()}, range(8))
    write_csv(out / "convergence.csv", converging)
    figures.convergence(converging, out / "convergence.png")
    if lab.measure.tells_copies:
        pushes = dict.fromkeys(at(step, lab.steps) for step in (0, 5, 10, 15, 20, 30))
        returning = returns(lab, groups["memorized"][:16], [0], list(pushes), (0.4, 0.8, 1.6, 3.2))
        write_csv(out / "returns.csv", returning)
        figures.returns(returning, out / "returns.png")


def _at_onset(sweep: Sequence[dict[str, Any]], onset: int) -> dict[str, Any]:
    """The shares of copies and of right concepts, and the mean similarity, where guidance starts at one step."""
    rows = [row for row in sweep if row["onset"] == onset]
    fields = {"memorized": "memorized", "similarity": "similarity", "concept": "concept_ok"}
    return {"onset": onset} | {name: _share([row[field] for row in rows]) for name, field in fields.items()}
