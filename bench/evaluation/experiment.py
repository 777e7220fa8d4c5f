"""The code that the studies of this folder share: options, a scenario's laboratory, and the file of results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ..scenario import Prompt, load, prompts
from ..tables import writable
from .trajectories import Laboratory

Study = Callable[[Laboratory, dict[str, list[Prompt]], Sequence[int]], dict[str, Any]]  # prompts are by group


def run(study: Study, about: str, first_seed: int) -> None:
    """Read the options, run `study` on the scenario that they name, and write its results as JSON."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--scenario", default="tiny")
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--seeds", type=int, default=2, help="pictures a caption")
    parser.add_argument("--first-seed", type=int, default=first_seed)
    args = parser.parse_args()
    out, scenario = writable(args.json, "--json"), load(args.scenario)
    seeds, groups = range(args.first_seed, args.first_seed + args.seeds), prompts(scenario)
    if "general" not in groups:
        parser.error(f"scenario {args.scenario!r} has no general prompts to compare with")
    lab = Laboratory.of(scenario, groups)
    found = {"scenario": scenario.name, "date": date.today().isoformat(), "seeds": list(seeds), **lab.sampler.provenance}
    out.write_text(json.dumps(found | study(lab, groups, seeds), indent=1) + "\n", encoding="utf-8")
