"""The lists in a run's folder: `jobs.jsonl`, the images that are asked for, and `manifest.jsonl`, what came of each.

A line of the manifest is composed in the order in which a picture is made: `Job.asked`, `Plans.facts`, `bulk.encode_decode`,
`bulk.executor` (copies), `data.image_encoding` (digest). `runs.jsonl_journal` writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import atomic_write
from .jsonl_journal import read_lines
from .jsontext import json_bytes

MANIFEST, JOBS = "manifest.jsonl", "jobs.jsonl"
NEEDED = {"id": str, "prompt": str, "seed": int, "status": str}  # fields of every line of the manifest
NEEDED_OF_IMAGES = {"file": str, "sha256": str}  # further fields of a line whose image is there


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
    """The sound lines about the jobs of a run: position, id and what was asked; none where the file is missing."""
    for line in read_lines(out / JOBS):
        if isinstance(line.get("position"), int) and isinstance(line.get("id"), str):
            yield line


def read_jobs(out: Path) -> Iterator[tuple[int, str]]:
    """Positions and ids of all jobs of a run, as `job_lines` has them."""
    return ((line["position"], line["id"]) for line in job_lines(out))


def noted(line: dict[str, Any], notes: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """A line with the note about its image, by id, in the place of what it said of `names`."""
    return {name: value for name, value in line.items() if name not in names} | dict(notes.get(line.get("id", ""), {}))


def note(out: Path, notes: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Write notes into the lines of a folder's manifest; see `noted`."""
    with atomic_write(out / MANIFEST) as part, part.open("wb") as file:
        for line in read_lines(out / MANIFEST):
            file.write(json_bytes(noted(line, notes, names)) + b"\n")
