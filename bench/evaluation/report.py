"""A page about evaluations: the finding, copies against concept, the table, and each caption's training image and images.

The page is one file that needs no network: it contains styles, script, curves and images. The table is also written as CSV
and LaTeX.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from basinescape.auditing.html_images import embedded, rendered
from basinescape.calibration.baseline import STATIC
from basinescape.data.pictures import images_in
from basinescape.runs.atomic import atomic_write
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..scenario import Prompt, Scenario, prompts
from .comparison import GROUPS, Comparison
from .evaluate import RECORDED, image_path, read_run, table
from .figures import COLORS, Point, band, tradeoff

SHOWN = 64  # the worst captions, on the page: thousands would make it too large to open
INK = "#010203"  # a placeholder for the page's text colour, which differs between a light and a dark page


def report(folders: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Write the page `out`, with a section for each run folder of `evaluate`, and its tables as .csv and .tex beside it.

    Returns the files written. Raises FileNotFoundError or ValueError, before anything is written, for a folder without an
    evaluation.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"out must be a file, {str(out)!r} is a folder")
    runs = [(Path(folder), *read_run(Path(folder))) for folder in folders]
    sections = [_section(*run) for run in runs]
    files = {out: rendered(Path(__file__).with_name("report.html.jinja"), sections=sections)}
    for number, section in enumerate(sections, 1):
        stem = out.stem if len(sections) == 1 else f"{out.stem}-{number}"
        files |= {out.with_name(f"{stem}.{suffix}"): text for suffix, text in section["tables"].items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8")
    return list(files)


def _section(folder: Path, run: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The values that the template shows of a run."""
    scenario = run["scenario"]
    compared = Comparison.of(table(lines), scenario.get("transition") or STATIC)
    training = _training(run, {line["id"]: line["prompt"] for line in lines if line["group"] == "memorized"})
    tables = {"csv": compared.csv(), "tex": compared.latex()}
    return {
        "folder": folder.resolve().name,
        "finding": compared.finding(),
        "best": compared.best,
        "tradeoff": _tradeoff(compared),
        "compared": compared,
        "tables": tables,
        "links": {name: f"data:text/plain;charset=utf-8,{quote(text)}" for name, text in tables.items()},
        "judged": _judged(lines, compared),
        "quality": _quality(folder / "quality.csv"),
        "curves": _curves(lines),
        "figures": [(path.name, embedded(path, None)) for path in sorted(folder.glob("*.png"))],
        "captions": (captions := _captions(folder, lines, training)),
        "pictures": any(made["uri"] for caption in captions for made in caption["made"].values()),
        "count": len({line["id"] for line in lines if line["group"] == "memorized"}),
        "threshold": scenario.get("threshold"),
        "labels": {line.name: line.label for line in compared.lines},
        "facts": _facts(run, len(lines)),
    }


def _tradeoff(compared: Comparison) -> Markup | None:
    """The figure of copies against concept; None where no copies were counted."""
    points = []
    for line in compared.lines:
        if line.copies is not None:
            copies, concept = (
                tuple(line.memorized[f"{name}_{end}"] for end in ("share", "low", "high")) for name in ("memorized", "concept")
            )
            color = "C3" if line.name == RECORDED else "C0" if line is compared.best else "C7"
            points.append(Point(line.label, copies, None if concept[0] is None else concept, color))
    return _svg(lambda: tradeoff(points)) if points else None


def _judged(lines: Sequence[dict[str, Any]], compared: Comparison) -> list[str]:
    """A sentence for each group of each method that marks its images, as a guard does: images made again, marks, copies."""
    found = []
    for line in compared.lines:
        for group in line.rows:
            part = [each for each in lines if (each["method"], each["group"]) == (line.name, group) and "attempts" in each]
            if not part:
                continue
            attempts = Counter(each["attempts"] for each in part)
            again = len(part) - attempts[1]
            ladder = ", ".join(f"{count} from attempt {number}" for number, count in sorted(attempts.items()))
            kept = f" (kept: {ladder})" if again else ""
            unmarked = sum(bool(each["memorized"]) and not each["suspect"] for each in part)
            copies = "" if part[0]["memorized"] is None else f"; copies that are not marked: {unmarked}"
            found.append(
                f"{line.label}, {GROUPS.get(group, group)}: {again} of {len(part)} images began again{kept}; "
                f"marked suspect: {sum(each['suspect'] for each in part)}{copies}."
            )
    return found


def _quality(path: Path) -> list[list[tuple[str, float | str | None, str]]]:
    """The rows of quality.csv, each a list of cells (name, value, text). Empty if the command `quality` was not run."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["group"] != "memorized")
    return [[(name, *_value(text)) for name, text in row.items()] for row in rows]


def _value(text: str) -> tuple[float | str | None, str]:
    """(value, text to show) of a cell of a CSV file. A number from 100 on is shown without decimals, others in three digits."""
    try:
        value = float(text)
    except ValueError:
        return text or None, text
    return value, f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _facts(run: dict[str, Any], images: int) -> dict[str, Any]:
    scenario = run["scenario"]
    return {
        "scenario": scenario["name"],
        "model": scenario["model"],
        "images": f"{images:,}, seeds counted up from {run.get('first_seed', 0)}",
        "steps": scenario["steps"],
        "scheduler": f"{scenario['scheduler'] or 'as calibrated, else the own'} ({run['scheduler']['class']})",
        "guidance scale": scenario["scale"],
        "a copy": Scenario.read(scenario).copy,
        "intervals": "95%, by bootstrap over prompts",
        "dtype": run["dtype"],
        "device": run["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }


def _curves(lines: Sequence[dict[str, Any]]) -> Markup | None:
    """A figure of plain guidance's noise gap against the step, median and quartiles; None if no gap was recorded."""
    found = [line for line in lines if line["method"] == RECORDED and "noise_gap" in line]
    if not found:
        return None

    def draw() -> Figure:
        axes = (figure := Figure(figsize=(5, 3), layout="constrained")).subplots()
        for group in COLORS:
            gaps = [line["noise_gap"] for line in found if line["group"] == group]
            if gaps:
                band(axes, gaps, group)
        axes.set(xlabel="step", ylabel="noise gap  ||cond - uncond||")
        axes.legend(frameon=False)
        return figure

    return _svg(draw)


def _svg(draw: Callable[[], Figure]) -> Markup:
    """A figure as SVG, drawn in the page's own text colour."""
    inks: dict[Any, Any] = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "basinescape", **inks}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw().savefig(file := io.StringIO(), format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))


def _captions(folder: Path, lines: Sequence[dict[str, Any]], training: dict[str, Path]) -> list[dict[str, Any]]:
    """The captions with the largest share of copies, at most SHOWN, sorted by that share and then by mean similarity.

    Each has its training image and, by method, the line and image of its most similar seed and the number of copies.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        if line["group"] == "memorized":
            found.setdefault(line["id"], {}).setdefault(line["method"], []).append(line)

    def badness(made: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
        every = [line for part in made.values() for line in part]
        return fmean(bool(line["memorized"]) for line in every), fmean(_alike(line) for line in every)

    shown = sorted(found.items(), key=lambda entry: badness(entry[1]), reverse=True)[:SHOWN]
    return [
        {
            "id": id,
            "text": next(iter(made.values()))[0]["prompt"],
            "training": id in training and embedded(training[id]),
            "made": {method: _worst(folder, id, part, training) for method, part in made.items()},
        }
        for id, made in shown
    ]


def _worst(folder: Path, id: str, lines: Sequence[dict[str, Any]], training: dict[str, Path]) -> dict[str, Any]:
    """The most similar seed of a caption under a method. other: the training image it copies, if that is another caption's."""
    line = max(lines, key=_alike)
    other = line.get("nearest") if line["memorized"] and line.get("nearest") not in (None, id) else None
    return line | {
        "uri": embedded(image_path(folder, line)),
        "copies": sum(bool(each["memorized"]) for each in lines),
        "seeds": len(lines),
        "alike": None if line["similarity"] is None else _alike(line),
        "other": other and (Path(other).name, other in training and embedded(training[other])),
    }


def _alike(line: dict[str, Any]) -> float:
    """Similarity to the nearest training image; to the caption's own in runs of earlier versions, which have no other."""
    return line.get("nearest_similarity", line["similarity"]) or 0.0


def _training(run: dict[str, Any], asked: dict[str, str]) -> dict[str, Path]:
    """Training images by prompt id and, for those in the scenario's folder, by their path in it.

    Images whose caption has changed since the run have no id. Empty if the scenario's files are gone.
    """
    try:
        scenario = Scenario.read(run["scenario"])
        known: list[Prompt] = prompts(scenario)["memorized"]
        folder = scenario.folder
        others = {str(path.relative_to(folder)): path for path in images_in(folder)} if folder else {}
    except (OSError, TypeError, ValueError):
        return {}
    own = {prompt.id: prompt.image for prompt in known if prompt.image and asked.get(prompt.id, prompt.text) == prompt.text}
    return others | own
