"""Rows printed as tables of aligned text, and the file that they are written to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def aligned(rows: Sequence[Row]) -> str:
    """Rows of equal keys as text: a heading, then one line for each row."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def tables(rows: Sequence[Row]) -> str:
    """The rows of benchmarks, with numbers shortened: a table for each sequence of rows of one bench with the same keys.

    Those of what was left out come last.
    """

    def kind(row: Row) -> tuple[str, tuple[str, ...]]:
        return row["bench"], tuple(row)

    grouped = groupby(sorted(rows, key=lambda row: "left out" in row), key=kind)
    return "\n\n".join(aligned([{key: _short(value) for key, value in row.items()} for row in group]) for _, group in grouped)


def writable(path: Path, name: str) -> Path:
    """`path`, a file to write after the work, whose folder is made now. Raises ValueError if it is a folder itself."""
    if path.is_dir():
        raise ValueError(f"{name} must be a file, {str(path)!r} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _short(value: Any) -> Any:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return value
    return f"{value:.4g}" if abs(value) < 1e4 else round(value)
