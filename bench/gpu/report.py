"""A result file of `bench.gpu` as a page of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..tables import Row, aligned, tables

FIELDS = {"device", "date", "versions", "checks", "rows"}


def read(file: Path) -> dict[str, Any]:
    """The report in a file. Raises ValueError for a file that is none."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        report = None
    if not isinstance(report, dict) or not report.keys() >= FIELDS:
        raise ValueError(f"file {str(file)!r} is not one that python -m basinescape.bench.gpu wrote")
    return report


def rendered(report: dict[str, Any]) -> str:
    """Where and when it was taken, what became of each check, and the rows of the benchmarks."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    checks: list[Row] = [
        {"check": c["check"], "result": c["status"], "seconds": round(c.get("seconds", 0)), "why": _line(c.get("error", ""))}
        for c in report["checks"]
    ]
    parts = [f"{report['device']}, {report['date']} ({versions})"]
    parts += [aligned(checks)] if checks else []
    parts += [tables(report["rows"])] if report["rows"] else []
    return "\n\n".join(parts)


def _line(error: str) -> str:
    """The lines of an error as one."""
    return " ".join(error.split())
