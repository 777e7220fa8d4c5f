"""A page about evaluations: the table of methods, the noise gap's curves, and each training image beside what was made of it.

The page is one file that needs no network: styles, script, curves and images are inside.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from basinescape.folder import whole
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from ..scenario import Scenario, prompts
from .evaluate import RECORDED, image_path, read_run, table
from .figures import COLORS, band

SIDE = 256  # larger images are embedded at this size: a scenario's have half a megabyte each
INK = "#010203"  # stands for the page's own text colour, which a light and a dark page do not share
BOUNDS = ("memorized_low", "memorized_high")  # columns of the table that are shown behind the share


def report(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write the page `out` about the run folders of `evaluate`, a section each.

    Raises FileNotFoundError or ValueError, before anything is written, for a folder that holds no evaluation.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"out must be a file, {str(out)!r} is a folder")
    runs = [(Path(folder), *read_run(Path(folder))) for folder in folders]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    page = template.render(sections=[_section(*run) for run in runs]).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as part:
        part.write_bytes(page)


def _section(folder: Path, run: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template needs of a run."""
    methods = list(dict.fromkeys(line["method"] for line in lines))
    chosen = RECORDED if RECORDED in methods else methods[0]
    return {
        "folder": folder.resolve().name,
        "facts": _facts(run, len(lines)),
        "tables": {
            "methods": [
                [(name, value, _text(name, row)) for name, value in row.items() if name not in BOUNDS]
                for row in sorted(table(lines), key=_group)
            ],
            "quality": _quality(folder / "quality.csv"),
        },
        "curves": _curves(lines),
        "figures": [(path.name, _uri(path)) for path in sorted(folder.glob("*.png"))],
        "methods": methods,
        "chosen": chosen,
        "prompts": _prompts(folder, run, lines, chosen),
    }


def _group(row: dict[str, Any]) -> bool:
    """A key that sorts memorized prompts first."""
    return row["group"] != "memorized"


def _quality(path: Path) -> list[list[tuple[str, Any, str]]]:
    """The cells of the command `quality`'s table; no row where it was not run."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [[(name, _value(text), text) for name, text in row.items()] for row in sorted(csv.DictReader(file), key=_group)]


def _value(text: str) -> float | str | None:
    """What a cell of a CSV file says."""
    try:
        return float(text) if text else None
    except ValueError:
        return text


def _facts(run: dict[str, Any], images: int) -> dict[str, Any]:
    scenario = run["scenario"]
    return {
        "scenario": scenario["name"],
        "model": scenario["model"],
        "images": f"{images:,}",
        "steps": scenario["steps"],
        "scheduler": f"{scenario['scheduler']} ({run['scheduler']['class']})",
        "guidance scale": scenario["scale"],
        "memorized": f"similarity ({scenario['similarity']}) above {scenario['threshold']}",
        "dtype": run["dtype"],
        "device": run["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }


def _text(name: str, row: dict[str, Any]) -> str:
    value = row[name]
    if name == "memorized_share":
        return "{:.3f} ({:.3f} to {:.3f})".format(value, *(row[bound] for bound in BOUNDS))
    if isinstance(value, float):
        return f"{value:.1f}" if name == "network_calls" else f"{value:.3f}"
    return "" if value is None else str(value)


def _curves(lines: Sequence[dict[str, Any]]) -> Markup | None:
    """The noise gap of plain guidance against the step, median and quartiles, as SVG; None where it was not recorded."""
    found = [line for line in lines if line["method"] == RECORDED and "noise_gap" in line]
    if not found:
        return None
    inks = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with rc_context({"svg.fonttype": "none", **inks}):
        axes = (figure := Figure(figsize=(5, 3), layout="constrained")).subplots()
        for group in COLORS:
            gaps = [line["noise_gap"] for line in found if line["group"] == group]
            if gaps:
                band(axes, gaps, group)
        axes.set(xlabel="step", ylabel="noise gap  ||cond - uncond||")
        axes.legend(frameon=False)
        figure.savefig(
            file := io.StringIO(), format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = file.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))


def _prompts(folder: Path, run: dict[str, Any], lines: Sequence[dict[str, Any]], chosen: str) -> list[dict[str, Any]]:
    """A memorized prompt each, with its training image and its first seed's line and image by method, most similar first."""
    seed, training = min(line["seed"] for line in lines), _training(run)
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if (line["group"], line["seed"]) == ("memorized", seed):
            entry = found.setdefault(line["id"], {"text": line["prompt"], "made": {}})
            entry["made"][line["method"]] = line | {"uri": _uri(image_path(folder, line), SIDE)}
    for id, entry in found.items():
        image = training.get((id, entry["text"]))
        entry["training"] = _uri(image, SIDE) if image else None
    return sorted(
        found.values(), key=lambda entry: entry["made"].get(chosen, {"similarity": -math.inf})["similarity"], reverse=True
    )


def _training(run: dict[str, Any]) -> dict[tuple[str, str], Path]:
    """Training images by prompt id and text; none where the scenario's files are not, or no longer, what the run had."""
    try:
        known = prompts(Scenario(**run["scenario"]))["memorized"]
    except (OSError, TypeError, ValueError):
        return {}
    return {(prompt.id, prompt.text): prompt.image for prompt in known if prompt.image and prompt.image.is_file()}


def _uri(path: Path, side: int | None = None) -> str:
    """The image as a data URI, shrunk to fit `side` pixels."""
    with Image.open(path) as image:
        data, kind = path.read_bytes(), Image.MIME[image.format]
        if side and max(image.size) > side:
            small = image.convert("RGB")
            small.thumbnail((side, side))
            small.save(file := io.BytesIO(), format="WEBP", quality=85)
            data, kind = file.getvalue(), "image/webp"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
