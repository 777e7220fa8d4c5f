"""Writes tables as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.atomic import atomic_write

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, one or more, each with the columns of the first. Text that looks like a formula is quoted; see `cell`."""
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)


def cell(value: Any) -> Any:
    """Return the value for a cell of a CSV file: text that a spreadsheet would take for a formula gets a "'" before it.

    Half a surrogate pair, which UTF-8 cannot hold, becomes "?".
    """
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "replace").decode("utf-8")
    return f"'{text}" if text.startswith(FORMULA) else text
