"""The page of an audit: each caption's training image beside what came out, the worst first. One file, images inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from basinescape import Rung
from basinescape.folder import whole
from jinja2 import Environment, StrictUndefined

from ..scenario import Prompt
from .embedding import embedded

SHOWN = 200  # captions on the page beside those that were verified: audit.csv has them all


def page(
    out: Path,
    model: str,
    captions: Sequence[Prompt],
    rows: Sequence[Mapping[str, Any]],
    verified: Mapping[str, Sequence[Mapping[str, Any]]],
    look: Rung,
    thresholds: Mapping[str, float],
) -> None:
    """Write `audit.html` into the folder `out`. captions, rows: of audit.csv, in its order; verified: lines of images."""
    checked = [row for row in rows if row["copies"] is not None]
    # What is known to be reproduced comes first; the rest as it is ranked.
    shown = [i for i, row in enumerate(rows) if row["copies"] is not None or i < SHOWN]
    shown.sort(key=lambda i: -(rows[i]["copies"] or 0))
    entries = [
        {
            **rows[i],
            "rank": i + 1,
            "training": embedded(captions[i].image) if captions[i].image else "",
            "made": [_made(out, line, captions[i].image) for line in verified.get(captions[i].id, ())],
        }
        for i in shown
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("audit.html.jinja").read_text(encoding="utf-8"))
    text = template.render(
        model=model,
        entries=entries,
        captions=len(rows),
        flagged=sum(row["flagged"] for row in rows),
        checked=len(checked),
        copied=sum(bool(row["copies"]) for row in checked),
        steps=look.steps,
        threshold=look.early,
        thresholds=thresholds,
    )
    with whole(out / "audit.html") as part:
        part.write_text(text, encoding="utf-8")


def _made(out: Path, line: Mapping[str, Any], own: Path | None) -> dict[str, Any]:
    """An image that came out; `other` is the training image that it is nearest to where that is not the caption's own."""
    nearest = Path(line["image"])
    other = embedded(nearest) if own is None or nearest != own else ""
    path = out / "images" / f"{line['id']}-{line['seed']}.png"
    return {**line, "uri": embedded(path), "other": other, "nearest": nearest.name}
