"""What is ordinary on the small pipeline, as `tiny/ordinary.json` has it.

python -m basinescape.bench.evaluation.ordinary --out FILE.json

gap:    the median noise gap of each unguided step, for the rule `Settled`; every general prompt with the seed FIRST.
stable: mean and standard deviation of the norms of each plainly guided step, for `methods.update`; the general prompts with
        seeds counted up from FIRST, one each, because all that share a seed share the norm of its noise.

The evaluation's own seeds are counted up from 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basinescape import Sampler
from basinescape.folder import whole

from ..methods import update
from ..scenario import PRESETS, prompts
from .analyze import Laboratory, curves
from .measure import Measure

FIRST = 100
BATCH = 16


def ordinary(dtype: str, count: int | None = None) -> dict[str, Any]:
    """Both, over the first `count` general prompts, and how they were measured."""
    scenario, groups = PRESETS["tiny"], prompts(PRESETS["tiny"])
    general = groups["general"][:count]
    sampler = Sampler.from_pretrained(Sampler.model_path("tiny"), "cpu", dtype, scenario.scheduler)
    lab = Laboratory(scenario, sampler, Measure(scenario, groups), BATCH)
    gaps = [line["gap"] for line in curves(lab, general, [FIRST], 0.0)]
    parts = [
        update.measured(
            sampler,
            [prompt.text for prompt in general[i : i + BATCH]],
            list(range(FIRST + i, FIRST + i + len(general[i : i + BATCH]))),
            scenario.steps,
            scenario.scale,
        )
        for i in range(0, len(general), BATCH)
    ]
    norms = torch.cat(parts, dim=2)
    region = torch.stack([norms.mean(dim=2), norms.std(dim=2)], dim=2)
    return {
        "steps": scenario.steps,
        "scheduler": scenario.scheduler,
        "dtype": dtype,
        "prompts": len(general),
        "seed": FIRST,
        "weight": 0.0,
        "gap": [round(float(gap), 4) for gap in np.median(gaps, axis=0)],
        "scale": scenario.scale,
        "stable": {
            name: [[round(value, 4) for value in pair] for pair in rows]
            for name, rows in zip(update.NORMS, region.tolist(), strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--dtype", default="bfloat16", help="float32 or bfloat16, as in the evaluation")
    args = parser.parse_args()
    with whole(args.out) as part:
        part.write_text(json.dumps(ordinary(args.dtype)) + "\n")


if __name__ == "__main__":
    main()
