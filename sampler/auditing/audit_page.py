"""The page of an audit: the findings, the record that a person can sign, and for each caption its training image and pictures.

It is one file, with the images inside. Captions whose pictures are copies come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..runs.atomic import atomic_write
from .heat import TOP, overlaid
from .html_images import embedded, inside, rendered
from .verification import HEAT, PICTURE, PREDICTION

SHOWN = 200  # captions on the page beside those that were verified: audit.csv has them all


def write(
    out: Path,
    record: Mapping[str, Any],
    images: Mapping[str, Path | None],
    rows: Sequence[Mapping[str, Any]],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Write `audit.html` into the folder `out`.

    images: the training image of each caption, by its id. rows: of audit.csv, in its order. found: lines about pictures, by id.
    """
    ranked = [{**row, "rank": rank} for rank, row in enumerate(rows, 1)]
    # Captions that are reproduced come first, the rest by rank.
    shown = [row for row in ranked if row["n"] is not None or row["rank"] <= SHOWN]
    shown.sort(key=lambda row: (-(row["copies"] or 0), -(row["suspects"] or 0)))
    entries = [
        {
            **row,
            "training": embedded(image) if (image := images[row["id"]]) else "",
            "prediction": embedded(out / PREDICTION.format(**row)) if row["n"] else "",
            "made": [_made(out, line, images[row["id"]]) for line in found.get(row["id"], ())],
        }
        for row in shown
    ]
    template = Path(__file__).with_name("audit.html.jinja")
    text = rendered(template, record=record, rows=rows, entries=entries, top=TOP)
    with atomic_write(out / "audit.html") as part:
        part.write_text(text, encoding="utf-8")


def _made(out: Path, line: Mapping[str, Any], own: Path | None) -> dict[str, Any]:
    """Return a picture's fields for the template. other: the training image nearest to it, if that is not the caption's own."""
    path = out / PICTURE.format(**line)
    with Image.open(path) as picture, Image.open(out / HEAT.format(**line)) as heat:
        where = inside(overlaid(picture, heat))
    nearest = Path(line["nearest"]) if "nearest" in line else None
    other = embedded(nearest) if nearest is not None and nearest != own else ""
    return {**line, "uri": embedded(path), "where": where, "other": other, "name": nearest.name if nearest else ""}
