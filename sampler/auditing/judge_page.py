"""The page of judged pictures, the most suspect first. It is one file, with the images inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import ceil, log1p
from pathlib import Path
from typing import Any

from ..runs.atomic import atomic_write
from .html_images import rendered

WIDTH = 0.1  # of the histogram's bars
BARS = range(-8, 18)  # counted from the threshold; the bars at the ends hold what is beyond them
FAILED = 50  # the most failed pictures that the page names


def write(
    out: Path, run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], shown: Mapping[str, str], threshold: float
) -> None:
    """Write `judge.html` into the folder `out`.

    run: the settings, and `images`, the source. rows: those of judge.csv. shown: pictures as data URIs, by id.
    """
    failed = [row for row in rows if row["status"] != "ok"]
    text = rendered(
        Path(__file__).with_name("judge.html.jinja"),
        run=run,
        date=datetime.now(UTC).date().isoformat(),
        threshold=threshold,
        pictures=sum(row["suspect"] is not None for row in rows),
        suspect=sum(bool(row["suspect"]) for row in rows),
        failed=failed[:FAILED],
        failures=len(failed),
        bars=bars([row["score"] for row in rows if row["score"] is not None], threshold),
        entries=[{**row, "uri": shown[row["id"]], "name": Path(row["file"]).name} for row in rows if row["id"] in shown],
    )
    with atomic_write(out / "judge.html") as part:
        part.write_text(text, encoding="utf-8")


def bars(scores: Sequence[float], threshold: float) -> list[dict[str, Any]]:
    """Return a histogram's bars: the score where each begins, its count, its height in 0..1 (logarithmic), and if suspect."""
    counts = Counter(min(max(ceil((score - threshold) / WIDTH) - 1, BARS[0]), BARS[-1]) for score in scores)
    most = log1p(max(counts.values(), default=1))
    return [
        {"low": threshold + k * WIDTH, "count": counts[k], "height": log1p(counts[k]) / most, "suspect": k >= 0} for k in BARS
    ]
