"""The lists in a run's folder: `jobs.jsonl` has the images to make, and `manifest.jsonl` the result of each.

A line of the manifest gets its fields in this order, while a picture is made: `Job.asked`, `Plans.facts`, `bulk.encode_decode`,
`bulk.executor` (copies), `data.image_encoding` (digest). `runs.jsonl_journal` writes the line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import atomic_write
from .jsonl_journal import read_lines
from .jsontext import json_bytes

MANIFEST, JOBS = "manifest.jsonl", "jobs.jsonl"
NEEDED = {"id": str, "prompt": str, "seed": int, "status": str}  # fields of every line of the manifest
NEEDED_OF_IMAGES = {"file": str, "sha256": str}  # further fields of a line with status "ok"


def lacks(line: dict[str, Any]) -> list[str]:
    """The needed fields that a line of a manifest lacks, or has with another type."""
    needed = NEEDED | (NEEDED_OF_IMAGES if line.get("status") == "ok" else {})
    return [name for name, kind in needed.items() if not isinstance(line.get(name), kind)]


def sound(out: Path) -> Iterator[dict[str, Any]]:
    """The lines of a folder's manifest that lack no field; `verify` names the others."""
    return (line for line in read_lines(out / MANIFEST) if not lacks(line))


def belongs(position: int, shard: tuple[int, int] | None) -> bool:
    """Whether the job at a position is in shard (i, n) of a run. None is the whole run."""
    return shard is None or position % shard[1] == shard[0]


def job_lines(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the sound lines of `jobs.jsonl`: position, id and settings of each job. A missing file has no lines."""
    for line in read_lines(out / JOBS):
        if isinstance(line.get("position"), int) and isinstance(line.get("id"), str):
            yield line


def read_jobs(out: Path) -> Iterator[tuple[int, str]]:
    """Positions and ids of all jobs of a run, as `job_lines` has them."""
    return ((line["position"], line["id"]) for line in job_lines(out))


def noted(line: dict[str, Any], notes: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return a line without the fields `names`, but with the fields that `notes` has for its id."""
    return {name: value for name, value in line.items() if name not in names} | dict(notes.get(line.get("id", ""), {}))


def note(out: Path, notes: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Rewrite a folder's manifest with `noted` applied to each line."""
    with atomic_write(out / MANIFEST) as part, part.open("wb") as file:
        for line in read_lines(out / MANIFEST):
            file.write(json_bytes(noted(line, notes, names)) + b"\n")
