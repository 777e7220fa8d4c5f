"""A result file of `bench.gpu` as a page of text."""

from __future__ import annotations

from typing import Any

from ..tables import Row, aligned, tables


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
