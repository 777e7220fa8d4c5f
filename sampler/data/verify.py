"""Whether a run's folder holds what its run.json promises: every image as it was made and marked, and nothing else."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ..runs.jsonl_journal import Keys, texts
from ..runs.manifest import JOBS, MANIFEST, belongs, lacks, read_jobs
from ..runs.run_folder import leftover, read_settings
from . import imagefolder, signing, xmp
from .writers import Writer, writer_of

log = logging.getLogger(__name__)
IMAGES = ("images", "shards")  # the folders that hold nothing but a run's images
NOT_YET = "is not made yet: start the run again"
Wrong = tuple[str, str]  # (file, image or line, what is wrong with it)


def verify(out: str | Path) -> Iterator[Wrong]:
    """Yield what is wrong with a run's folder, as (where, what): images that are missing, changed, failed or not made yet,
    damaged lines of its manifest, and files that are not the run's. Running `generate` again as before makes these images.

    An image is missing if the manifest has a line about it but its file is gone; it is not made yet if there is neither.

    Each image is checked against its SHA-256. Each picture must say in its XMP that a machine made it and, if the run signed
    its pictures, have a C2PA manifest with a valid signature. If the library for that is missing, a warning says so.

    Raises ValueError if the folder holds no run of `generate`.
    """
    out = Path(out)
    settings = read_settings(out) if (out / "run.json").is_file() else {}
    if not {"format", "prompts"} <= settings.keys():
        raise ValueError(f"{str(out)!r} holds no run of generate: its run.json is missing or another command's")
    writes, jobs = writer_of(out, settings, _inspection(settings)), Jobs(out, settings.get("shard"))
    total = sum(1 for _ in read_jobs(out))
    if total != settings["prompts"]:
        yield JOBS, f"names {total} of {settings['prompts']} jobs" if (out / JOBS).is_file() else "is missing"
    listed, files = array("Q"), array("Q")  # digests of the ids and files that the manifest names
    sound = True
    for wrong in chain(_lines(out, writes, jobs, listed, files), _unlisted(writes, jobs, listed)):
        sound = False
        yield wrong
    indexed = bool(writes.index) and "prompt_metadata" in settings  # runs of older versions have no index
    if sound and indexed and (fault := imagefolder.fault(out)):  # after other faults it would only follow from them
        yield imagefolder.METADATA, fault
    expected = (name for job in jobs for name in _with_beside(writes, writes.file(*job)))
    yield from _foreign(out, Keys(chain(files, map(Keys.digest, chain(writes.index, expected)))))


def _with_beside(writes: Writer, file: str) -> list[str]:
    return [file, *writes.beside(file)]


def _unlisted(writes: Writer, jobs: Jobs, listed: Iterable[int]) -> Iterator[Wrong]:
    """Yield the images of jobs that have no line in the manifest."""
    known = Keys(listed)
    for position, id in jobs:
        if id not in known:
            file = writes.file(position, id)
            yield writes.label(file, id), f"has no line in {MANIFEST}" if writes.has(file, id) else NOT_YET


def _inspection(settings: Mapping[str, Any]) -> Callable[[bytes], str | None]:
    """Return a function that checks the XMP and the signature of a run's picture, and returns what is wrong, or None."""
    format, signed = settings["format"], "c2pa_certificate" in settings
    marked = "prompt_metadata" in settings  # older versions marked no picture, and latents have no marks
    if signed:
        try:
            signing.c2pa_library()
        except ImportError as error:
            log.warning("whether the pictures' signatures hold is not looked at: %s", error)
            signed = False

    def fault(data: bytes) -> str | None:
        return (xmp.fault_of(data) if marked else None) or (signing.fault_of(data, format) if signed else None)

    return fault


class Jobs:
    """The jobs of a folder, as (position, id), read anew each time."""

    def __init__(self, out: Path, shard: tuple[int, int] | None):
        self._out, self._shard = out, shard
        self._ids = Keys(Keys.digest(id) for _, id in self)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((position, id) for position, id in read_jobs(self._out) if belongs(position, self._shard))

    def __contains__(self, id: str) -> bool:
        """Whether a job has this id; True if the folder lists no jobs, because then that cannot be known."""
        return not len(self._ids) or id in self._ids


def _lines(out: Path, writes: Writer, jobs: Jobs, listed: array, files: array) -> Iterator[Wrong]:
    """Yield what is wrong with the manifest and its images. Each fault comes once, also that of a file with many images."""
    if not (out / MANIFEST).is_file():
        yield MANIFEST, "is missing"
    said: set[Wrong] = set()
    for number, (_, line) in enumerate(texts(out / MANIFEST), 1):
        if line is not None and isinstance(id := line.get("id"), str):
            listed.append(Keys.digest(id))
        wrong = _line(f"{MANIFEST}, line {number}", line, writes, jobs)
        if line is not None and wrong is None:
            files.extend(map(Keys.digest, _with_beside(writes, line["file"])))
        if wrong is not None and wrong not in said:
            said.add(wrong)
            yield wrong
    if twice := len(listed) - len(Keys(listed)):
        yield MANIFEST, f"has {twice} lines about images that others are about too"


def _line(where: str, line: dict[str, Any] | None, writes: Writer, jobs: Jobs) -> Wrong | None:
    """Return what is wrong with a line of the manifest or with its image; None if nothing is."""
    if line is None:
        return where, "is no JSON object"
    if lacking := lacks(line):
        return where, f"lacks {', '.join(lacking)}"
    if line["id"] not in jobs:
        return where, f"is about image {line['id']}, which is not of this run"
    return writes.wrong(line) if line["status"] == "ok" else (f"image {line['id']}", line["status"])


def _foreign(out: Path, known: Keys) -> Iterator[Wrong]:
    for folder in IMAGES:
        for home, _, names in os.walk(out / folder):
            for path in (Path(home, name) for name in sorted(names)):
                file = path.relative_to(out).as_posix()
                if file not in known and not leftover(path):
                    yield file, "is no file of this run"
