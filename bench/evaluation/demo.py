"""Memorization and its cure on the small pipeline: a table, a grid of images and the noise gap's curves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from basinescape import At, FirstMinimum, Guidance, Output, Sampler
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..scenario import PRESETS, Prompt, prompts
from ..tables import aligned
from . import figures
from .measure import Measure

TINY = PRESETS["tiny"]
AT = At(TINY.transition)
METHODS = {
    "plain cfg": Guidance.cfg(TINY.scale),
    f"delayed, t <= {AT.timestep:g}": Guidance.delayed(TINY.scale, until=AT),
    "delayed, first minimum": Guidance.delayed(TINY.scale, until=FirstMinimum()),
    f"opposite -2, t <= {AT.timestep:g}": Guidance.opposite(2.0, scale=TINY.scale, until=AT),
    "guard": Guidance.guard(TINY.scale),
}
PROMPTS, SEEDS = 12, 2  # seeds a prompt; no two images of a method start from the same noise
SHOWN = 2  # one prompt in so many has a row of the grid: as they come, none of them chosen
HEADER, FONT = 44, 15  # pixels


def demo(out: Path) -> str:
    """Run every method on memorized prompts; writes table.json, grid.png and noise_gap.png to `out`, returns the table."""
    groups = prompts(TINY)
    found = groups["memorized"][:PROMPTS]
    measure = Measure(TINY, groups)
    sampler = Sampler.from_pretrained(Sampler.model_path("tiny"), dtype="float32", scheduler=TINY.scheduler)
    out.mkdir(parents=True, exist_ok=True)

    rows, made = [], {}
    columns = {"training image": [Image.open(prompt.image) for prompt in found]}
    with tqdm(total=len(METHODS) + 1, desc="methods", unit="method") as bar:
        for name, guidance in METHODS.items():
            start = time.perf_counter()
            made[name] = _sample(sampler, found, guidance)
            rows.append({"method": name, **_row(measure, found, made[name], time.perf_counter() - start)})
            columns[name] = made[name].images[: len(found)]
            bar.update()
        general = _sample(sampler, groups["general"][:PROMPTS], METHODS["plain cfg"])
        bar.update()
    _gap_plot(made["plain cfg"], general, made["delayed, first minimum"], out / "noise_gap.png")
    _grid(columns).save(out / "grid.png")
    (out / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    return aligned(rows)


def _sample(sampler: Sampler, found: list[Prompt], guidance: Guidance) -> Output:
    """All prompts with their first seeds, then all with their second."""
    texts = [prompt.text for prompt in found] * SEEDS
    return sampler(texts, range(len(texts)), TINY.steps, guidance, progress=False)


def _row(measure: Measure, found: list[Prompt], made: Output, seconds: float) -> dict[str, Any]:
    measured = measure(made.images, found * SEEDS)
    transitions = made.transition_step[made.transition_step >= 0]
    return {
        "memorized": _mean(measured, "memorized"),
        "similarity": _mean(measured, "similarity"),
        "concept right": _mean(measured, "concept_ok"),
        "median transition step": transitions.median().item() if len(transitions) else None,
        "seconds an image": round(seconds / len(measured), 3),
    }


def _mean(measured: list[dict[str, Any]], name: str) -> float:
    return round(float(np.mean([entry[name] for entry in measured])), 3)


def _grid(columns: dict[str, list[Image.Image]]) -> Image.Image:
    """A row for one prompt in SHOWN, a column a method under its name, the training image first."""
    shown = {name: column[::SHOWN] for name, column in columns.items()}
    first = next(iter(shown.values()))
    side = 2 * first[0].width + 4
    grid = Image.new("RGB", (side * len(shown), HEADER + side * len(first)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(FONT)
    for x, (name, column) in enumerate(shown.items()):
        place = side * (x + 0.5), HEADER / 2
        draw.multiline_text(place, name.replace(", ", "\n"), "black", font, anchor="mm", align="center")
        for y, image in enumerate(column):
            grid.paste(image.resize((side - 4, side - 4), Image.Resampling.NEAREST), (side * x, HEADER + side * y))
    return grid


def _gap_plot(memorized: Output, general: Output, free: Output, path: Path) -> None:
    """d_k against the step: plain guidance on both groups, and unguided up to the first minimum, which is marked."""
    figure, (plain, delayed) = figures.pair("plain guidance", "delayed guidance, memorized prompts")
    for name, made in (("memorized", memorized), ("general", general)):
        figures.band(plain, made.noise_gap.numpy(), name)
    for gaps, step in zip(free.noise_gap.numpy(), free.transition_step.tolist(), strict=True):
        delayed.plot(gaps, color=figures.COLORS["memorized"], alpha=0.3, linewidth=0.8)
        if step >= 0:
            delayed.plot(step, gaps[step], "k.", label="transition")
    figures.save(figure, path)
