"""A demonstration of memorization and of the guard, as one picture for each of the two small pipelines, "tiny" and "flow".

Each row shows a training image, four images that plain guidance makes of its caption, and the guard's images of the same
caption and seeds. Copies are framed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from basinescape import Guard, Guidance, Output, Sampler
from basinescape.runs.progress import moving
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..scenario import PRESETS, Prompt, Scenario, loaded, prompts
from ..tables import aligned
from . import figures
from .measure import Measure

# The captions shown, six for each pipeline: in stored runs on other seeds, the guard's effect is clearest on them.
ROWS = {"tiny": ("m00", "m02", "m04", "m08", "m16", "m18"), "flow": ("s04", "s07", "s12", "s14", "s15", "s20")}
SEEDS = 4  # images a caption
GENERAL = 12  # ordinary prompts, whose noise gaps are drawn beside those of the captions
WORK = {"tiny": (1.0, 2.9), "flow": (0.25, 0.75)}  # relative time of an image, plain and under the guard, for the bar
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
SIDE, GAP, LINE, FRAME = 96, 10, 17, 3  # pixels: a picture, the gap between two, the height of a text line, a frame's width
NOTES = {"flow": "This pipeline draws everything but its training images roughly, whatever the prompt."}
RED, SOFT, INK = "#d00000", "#666666", "#111111"


@dataclass(frozen=True)
class Column:
    """A method by its label, with its images (SEEDS for each caption) and the measurements of each image."""

    label: str
    output: Output
    measured: Sequence[Mapping[str, Any]]

    def count(self, name: str) -> int:
        """The number of images for which the measurement `name`, "memorized" or "concept_ok", is true."""
        return sum(bool(one[name]) for one in self.measured)


def demo(out: str | Path, progress: bool = True) -> str:
    """Make tiny.png, flow.png, noise_gap.png and table.json in the folder `out`.

    Returns the text to print: a table, the conclusions, and the paths of the pictures.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows, said = [], []
    work = sum(len(ids) * SEEDS * sum(WORK[name]) for name, ids in ROWS.items()) + GENERAL
    with tqdm(total=work, bar_format=BAR, smoothing=0, miniters=0, disable=not progress) as bar:
        for name, ids in ROWS.items():
            bar.set_description(f"{name}, loading")
            scenario, sampler = loaded(PRESETS[name], dtype="float32")
            groups = prompts(scenario)
            found = [prompt for prompt in groups["memorized"] if prompt.id in ids]
            columns = list(_columns(scenario, sampler, found, Measure(scenario, groups), bar))
            rows += [_row(name, column) for column in columns]
            said.append(_conclusion(name, *columns))
            picture(scenario, found, columns, len(groups["memorized"])).save(out / f"{name}.png")
            if name == "tiny":
                steps, scale, _ = scenario.how
                texts = [prompt.text for prompt in groups["general"][:GENERAL]]
                ordinary = sampler(texts, 0, steps, Guidance.cfg(scale), progress=moving(bar, GENERAL))
                bar.update(GENERAL)
                _gaps(columns[0].output, ordinary, out / "noise_gap.png")
    (out / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return "\n".join([aligned(rows), "", *said, f"See it in {out / 'tiny.png'} and {out / 'flow.png'}: copies are framed."])


def _columns(scenario: Scenario, sampler: Sampler, found: Sequence[Prompt], measure: Measure, bar: tqdm) -> Iterator[Column]:
    """The columns of plain guidance and of the guard, on the same captions and seeds."""
    steps, scale, _ = scenario.how
    given: dict[str, Guidance | Guard] = {"plain guidance": Guidance.cfg(scale), "with the guard": Guidance.guard(scale)}
    for (label, guidance), work in zip(given.items(), WORK[scenario.name], strict=True):
        bar.set_description(f"{scenario.name}, {label}")
        made = []
        for prompt in found:
            made.append(sampler([prompt.text] * SEEDS, 0, steps, guidance, progress=moving(bar, work * SEEDS)))
            bar.update(work * SEEDS)
        output, every = Output.joined(made), [prompt for prompt in found for _ in range(SEEDS)]
        yield Column(label, output, measure(output.images, every))


def _row(name: str, column: Column) -> dict[str, Any]:
    count = len(column.measured)
    return {
        "model": name,
        "method": column.label,
        "copies": f"{column.count('memorized')} of {count}",
        "concept right": f"{column.count('concept_ok')} of {count}",
        "mean similarity": round(fmean(one["nearest_similarity"] for one in column.measured), 2),
    }


def _conclusion(name: str, plain: Column, guard: Column) -> str:
    count = len(plain.measured)
    return (
        f"{name}: asked for memorized captions, plain guidance copies a training image {plain.count('memorized')} times in "
        f"{count}, the guard {guard.count('memorized')} times."
    )


def picture(scenario: Scenario, found: Sequence[Prompt], columns: Sequence[Column], known: int) -> Image.Image:
    """Draw one row for each caption: its training image, and the images of each column. known: captions in the scenario."""
    step, first = SIDE + GAP, SIDE + 3 * GAP
    starts = [first + i * (SEEDS * step + 2 * GAP) for i in range(len(columns))]
    row, top = LINE + FRAME + SIDE + LINE + GAP, 3 * LINE + GAP
    foot = [
        "Below each image: its similarity to the nearest training image. "
        f"Above {scenario.threshold} it counts as a copy, and is framed.",
        f"Rows: {len(found)} of the {known} captions that the pipeline “{scenario.name}” has memorized, "
        f"chosen by their similarity on other seeds; seeds 0 to {SEEDS - 1} are shown.",
        *([NOTES[scenario.name]] if scenario.name in NOTES else []),
    ]
    bottom = top + row * len(found) + GAP
    made = Image.new("RGB", (starts[-1] + SEEDS * step, bottom + len(foot) * LINE + GAP), "white")
    draw, font, small = ImageDraw.Draw(made), ImageFont.load_default(14), ImageFont.load_default(12)
    draw.text((GAP, GAP), "training image", INK, font)
    for start, column in zip(starts, columns, strict=True):
        count = len(column.measured)
        said = f"{column.label}: {column.count('memorized')} of {count} are copies"
        draw.text((start, GAP), said, RED if column.count("memorized") else INK, font)
        draw.text((start, GAP + LINE), f"{column.count('concept_ok')} of {count} show what was asked for", SOFT, small)
    for i, prompt in enumerate(found):
        y = top + i * row
        draw.text((GAP, y - FRAME), f"“{prompt.text}”", SOFT, small)
        if prompt.image is not None:
            with Image.open(prompt.image) as training:
                made.paste(_fitted(training), (GAP, y + LINE + FRAME))
        for start, column in zip(starts, columns, strict=True):
            for k in range(SEEDS):
                image, measured = column.output.images[i * SEEDS + k], column.measured[i * SEEDS + k]
                _paste(draw, made, image, measured, (start + k * step, y + LINE + FRAME), small)
    for i, text in enumerate(foot):
        draw.text((GAP, bottom + i * LINE), text, INK, small)
    return made


def _paste(
    draw: ImageDraw.ImageDraw,
    made: Image.Image,
    image: Image.Image,
    measured: Mapping[str, Any],
    place: tuple[int, int],
    font: Any,
) -> None:
    """Paste an image at `place`, with a frame if it is a copy, and write its similarity below."""
    x, y = place
    copy = bool(measured["memorized"])
    if copy:
        draw.rectangle((x - FRAME, y - FRAME, x + SIDE + FRAME - 1, y + SIDE + FRAME - 1), RED)
    made.paste(_fitted(image), place)
    text = f"{measured['nearest_similarity']:.2f}{' copy' if copy else ''}"
    draw.text((x, y + SIDE + FRAME), text, RED if copy else SOFT, font)


def _fitted(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _gaps(memorized: Output, ordinary: Output, path: Path) -> None:
    """Plot the noise gap of plain guidance against the step, memorized captions beside ordinary prompts."""
    figure, axes = figures.single(xlabel="step", ylabel="noise gap  ||cond - uncond||", title="plain guidance")
    for name, made in (("memorized", memorized), ("general", ordinary)):
        figures.band(axes, made.noise_gap.tolist(), name)
    figures.save(figure, path)
