"""How much saving pictures in files harms the basin score: how well it tells copies from latents and from pictures read back.

python -m basinescape.bench.evaluation.roundtrip --scenario flow --json FILE [--seeds 2] [--first-seed 9400]
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from basinescape import Guidance
from basinescape.data.pictures import opened
from basinescape.guidance.guard import PROBES, THRESHOLD
from PIL import Image

from ..scenario import Prompt
from . import experiment
from .metrics import roc
from .trajectories import DELAYS, Laboratory

Line = dict[str, Any]
# How pictures are saved: options of Pillow.
FILES: dict[str, dict[str, Any]] = {"png": {"format": "PNG"}, "jpeg": {"format": "JPEG", "quality": 90}}
WAYS = ("latents", *FILES)


def read_back(images: Sequence[Image.Image], **kept: Any) -> list[Image.Image]:
    """The pictures, saved with the options `kept` and read again."""
    found = []
    for image in images:
        image.save(file := io.BytesIO(), **kept)
        found.append(opened(file.getvalue(), "the picture"))
    return found


def judged(lab: Laboratory, found: Sequence[Prompt], seeds: Sequence[int], guidance: Guidance) -> list[Line]:
    """A line for each prompt and seed: whether its picture is a copy, and its basin score in each of WAYS."""
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


def separation(copies: Sequence[Line], others: Sequence[Line]) -> list[dict[str, Any]]:
    """How well the score tells `copies` from `others`, a row for each of WAYS. moved: mean change of a score from latents'."""
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
    """Return rows of `separation` under plain and delayed guidance: of copies, against ordinary pictures of two kinds."""
    rows = []
    for guidance in ("plain", "delayed"):
        copies, clean = ([line for line in lines[guidance] if bool(line["memorized"]) is wanted] for wanted in (True, False))
        for name, others in (("general", lines["general"]), ("same captions", clean)):
            if copies and others:
                rows += [{"guidance": guidance, "others_are": name, **row} for row in separation(copies, others)]
    return rows


def study(lab: Laboratory, groups: dict[str, list[Prompt]], seeds: Sequence[int]) -> dict[str, Any]:
    """How well the score tells copies, and the lines of `judged`: memorized prompts plain and delayed, general ones plain."""
    plain = Guidance.cfg(lab.scale)
    lines = {
        "plain": judged(lab, groups["memorized"], seeds, plain),
        "delayed": [line for guidance in lab.delays() for line in judged(lab, groups["memorized"], seeds, guidance)],
        "general": judged(lab, groups["general"], seeds, plain),
    }
    numbers = {"probes": PROBES, "threshold": THRESHOLD, "delays": DELAYS}
    return {**numbers, "rows": compared(lines), "pictures": lines}


if __name__ == "__main__":
    experiment.run(study, str(__doc__), first_seed=9400)
