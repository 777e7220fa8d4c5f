"""What a file costs the basin score: how well it tells copies by the latents, and by pictures read back from files.

python -m basinescape.bench.evaluation.roundtrip --scenario flow --json FILE [--seeds 2] [--first-seed 9400]
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

from basinescape import At, Guidance
from basinescape.data.pictures import opened
from basinescape.guidance.guard import PROBES, THRESHOLD
from PIL import Image

from ..scenario import Prompt, load, prompts
from .detection import DELAYS
from .metrics import roc
from .trajectories import Laboratory

Line = dict[str, Any]
# How pictures are kept in files.
FILES: dict[str, dict[str, Any]] = {"png": {"format": "PNG"}, "jpeg": {"format": "JPEG", "quality": 90}}
WAYS = ("latents", *FILES)


def read_back(images: Sequence[Image.Image], **kept: Any) -> list[Image.Image]:
    """The pictures as they come out of files."""
    found = []
    for image in images:
        image.save(file := io.BytesIO(), **kept)
        found.append(opened(file.getvalue(), "the picture"))
    return found


def judged(lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int], guidance: Guidance) -> list[Line]:
    """A line for each prompt and seed: whether its picture is a copy, and its score by each of WAYS."""
    lines = []
    for batch, drawn in lab.bar(lab.batches(found, seeds), repr(guidance)):
        texts = [prompt.text for prompt in batch]
        out = lab.sampler(texts, drawn, lab.steps, guidance, progress=False)
        kept = {name: read_back(out.images, **options) for name, options in FILES.items()}
        scores = {name: lab.sampler.judge(one, texts, drawn).score for name, one in {"latents": out.latents, **kept}.items()}
        copies = lab.measure(out.images, batch)
        for i, (prompt, seed) in enumerate(zip(batch, drawn, strict=True)):
            line = {"id": prompt.id, "seed": seed, "memorized": copies[i]["memorized"]}
            lines.append(line | {name: round(score[i].item(), 4) for name, score in scores.items()})
    return lines


def told(copies: Sequence[Line], others: Sequence[Line]) -> list[dict[str, Any]]:
    """How well the score tells `copies` from `others`, by each of WAYS."""
    rows = []
    for way in WAYS:
        positive = [True] * len(copies) + [False] * len(others)
        area, hits = roc([line[way] for line in (*copies, *others)], positive)
        moved = fmean(abs(line[way] - line["latents"]) for line in (*copies, *others))
        row = {"judged": way, "copies": len(copies), "others": len(others), "auc": round(area, 4)}
        row |= {"tpr_at_1pct_fpr": round(hits, 4)}
        row |= {"suspect_copies": _suspect(copies, way), "suspect_others": _suspect(others, way), "moved": round(moved, 4)}
        rows.append(row)
    return rows


def _suspect(lines: Sequence[Line], way: str) -> float:
    return round(fmean(not line[way] <= THRESHOLD for line in lines), 4)


def compared(lines: dict[str, list[Line]]) -> list[dict[str, Any]]:
    """`told` of the copies under plain and delayed guidance, from general pictures and from others of the same captions."""
    rows = []
    for guidance in ("plain", "delayed"):
        copies, clean = ([line for line in lines[guidance] if bool(line["memorized"]) is wanted] for wanted in (True, False))
        for name, others in (("general", lines["general"]), ("same captions", clean)):
            if copies and others:
                rows += [{"guidance": guidance, "others_are": name, **row} for row in told(copies, others)]
    return rows


def roundtrip(lab: Laboratory, groups: dict[str, list[Prompt]], seeds: Sequence[int]) -> dict[str, list[Line]]:
    """Lines of `judged`: plain and delayed pictures of memorized captions, and plain ones of general captions."""
    scale = lab.scale
    delays = [Guidance.delayed(scale, until=At(log_snr=log_snr)) for log_snr in DELAYS]
    return {
        "plain": judged(lab, groups["memorized"], seeds, Guidance.cfg(scale)),
        "delayed": [line for guidance in delays for line in judged(lab, groups["memorized"], seeds, guidance)],
        "general": judged(lab, groups["general"], seeds, Guidance.cfg(scale)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="tiny")
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--seeds", type=int, default=2, help="pictures a caption")
    parser.add_argument("--first-seed", type=int, default=9400)
    args = parser.parse_args()
    scenario = load(args.scenario)
    groups, seeds = prompts(scenario), range(args.first_seed, args.first_seed + args.seeds)
    lab = Laboratory.of(scenario, groups)
    lines = roundtrip(lab, groups, seeds)
    found = {"scenario": scenario.name, "date": date.today().isoformat(), "seeds": list(seeds), "probes": PROBES}
    found |= {"threshold": THRESHOLD, "delays": DELAYS, **lab.sampler.provenance, "rows": compared(lines), "pictures": lines}
    text = ",\n".join(f" {json.dumps(name)}: {_indented(value)}" for name, value in found.items())
    args.json.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


def _indented(value: Any) -> str:
    """JSON with a line for each object of a list."""
    if isinstance(value, dict) and all(isinstance(inner, list) for inner in value.values()):
        return "{\n" + ",\n".join(f"  {json.dumps(name)}: {_indented(inner)}" for name, inner in value.items()) + "\n }"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"   {json.dumps(one)}" for one in value) + "\n  ]"
    return json.dumps(value)


if __name__ == "__main__":
    main()
