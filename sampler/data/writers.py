"""The files of a run: one an image (formats in `image_encoding.PICTURES`), or shards that hold many (`shards.SHARDS`).

A file is whole before the manifest names it, and has the same bytes whether or not the run was stopped on the way. A shard
holds the images of a fixed range of positions, in their order. It is written when the next image is of another shard, and again
if more of its own are made later. A part of a run writes its share of each shard; `join` makes whole shards of these.
"""

from __future__ import annotations

import hashlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import checks
from ..runs.atomic import atomic_write, link, save_bytes
from ..runs.manifest import noted, read_jobs, sound
from ..runs.run_folder import SAFE_ID
from . import imagefolder
from .image_encoding import PICTURES, Made
from .shards import SHARDS

log = logging.getLogger(__name__)
SHARD = 256  # positions per shard
FORMATS = (*PICTURES, "latents", *SHARDS)
SUFFIXES = {"latents": "safetensors"}  # of the formats that are not named like their suffix
MISSING = "is missing"
Inspect = Callable[[bytes], str | None]


class Writer(ABC):
    """Writes images into a run's folder, and checks whether images there are as they were made.

    inspect: returns what else is wrong with the bytes of an image whose SHA-256 is right; None if nothing is.
    """

    index: tuple[str, ...] = ()  # the files that list all images, which `finish` writes

    def __init__(self, out: Path, inspect: Inspect | None = None):
        self.out, self._inspect = out, inspect
        self._found = lru_cache(maxsize=16)(self._read)  # `wrong` asks it for every line

    @abstractmethod
    def add(self, made: Made) -> Sequence[dict[str, Any]]:
        """Take an image; returns the lines of all images whose files are written now, and of those that failed."""

    def flush(self) -> Sequence[dict[str, Any]]:
        """Write the images that are still held back; returns as `add` does."""
        return []

    @abstractmethod
    def finish(self) -> None:
        """Write what depends on all images, once their manifest lines are written."""

    def note(self, notes: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
        """Write notes into the manifest lines that shards hold; see `manifest.noted`."""
        return

    @abstractmethod
    def file(self, position: int, id: str) -> str:
        """Return the file of a job's image, relative to the run's folder."""

    def beside(self, file: str) -> list[str]:
        """The files that belong to the image in `file`."""
        return []

    def files(self) -> Iterator[Path]:
        """Yield the files of images that exist, in the order of the jobs in the run's folder."""
        for name, _ in groupby(self.file(*job) for job in read_jobs(self.out)):
            if (self.out / name).is_file():
                yield self.out / name

    @abstractmethod
    def label(self, file: str, id: str) -> str:
        """What messages call an image that is in a file."""

    @abstractmethod
    def contents(self, file: Path) -> Iterator[tuple[str, bytes]]:
        """The images in a file, with their ids."""

    @abstractmethod
    def join(self, parts: Sequence[Path]) -> None:
        """Put the images of `parts`, folders of the same run, into this one's files."""

    @abstractmethod
    def owns(self, file: str, id: str) -> bool:
        """Whether this writer may put the image `id` into this file. If so, the file is inside the run's folder."""

    def finished(self, line: dict[str, Any]) -> str | None:
        """Return the id in a manifest line if its image is there as it was made; None if the image is to be made."""
        return line["id"] if line.get("status") == "ok" and self.wrong(line) is None else None

    def has(self, file: str, id: str) -> bool:
        """Whether an image is in a file; True also if the file exists but cannot be read, because it may hold the image."""
        images = self._found(file)
        return images != MISSING and (isinstance(images, str) or id in images)

    def wrong(self, line: dict[str, Any]) -> tuple[str, str] | None:
        """Return what is wrong with the image of a manifest line, as (where, what); None if it is as it was made.

        Raises KeyError for a line that lacks its id, file or sha256.
        """
        id, file, digest = line["id"], line["file"], line.get("signed_sha256", line["sha256"])
        if not self.owns(file, id):
            return f"image {id}", f"is said to be in {file!r}, which is no file of this run"
        images = self._found(file)
        if isinstance(images, str):
            return file, images
        sha256, fault = images.get(id, (None, MISSING))
        if sha256 not in (None, digest):
            fault = "is changed"
        return None if fault is None else (self.label(file, id), fault)

    def _read(self, file: str) -> dict[str, tuple[str, str | None]] | str:
        """Return (SHA-256, what `inspect` returns) of each image in a file, by id; or else what is wrong with the file."""
        look = self._inspect or (lambda data: None)
        try:
            return {id: (hashlib.sha256(data).hexdigest(), look(data)) for id, data in self.contents(self.out / file)}
        except FileNotFoundError:
            return MISSING
        except Exception as error:  # a library may raise anything for a damaged file
            return f"cannot be read: {checks.line(error)}"


class ImageFiles(Writer):
    """One file per image: images/<id>.<suffix>, and with `captions` images/<id>.txt, its prompt.

    A folder of pictures is an imagefolder of the library `datasets`; see `imagefolder`.
    """

    def __init__(self, out: Path, format: str, captions: bool = False, inspect: Inspect | None = None):
        super().__init__(out, inspect)
        self.suffix, self.captions = SUFFIXES.get(format, format), captions
        self.index = (imagefolder.METADATA,) if format in PICTURES else ()

    def add(self, made: Made) -> Sequence[dict[str, Any]]:
        if made.data is None:
            return [made.line]
        line = made.line | {"file": self.file(made.position, made.line["id"])}
        for file in self.beside(line["file"]):
            save_bytes(_caption(line), self.out / file)
        save_bytes(made.data, self.out / line["file"])
        return [line]

    def file(self, position: int, id: str) -> str:
        return f"images/{id}.{self.suffix}"

    def finish(self) -> None:
        if self.index:
            imagefolder.write(self.out)

    def beside(self, file: str) -> list[str]:
        return [f"{file.removesuffix(self.suffix)}txt"] if self.captions else []

    def wrong(self, line: dict[str, Any]) -> tuple[str, str] | None:
        if wrong := super().wrong(line):
            return wrong
        for file in self.beside(line["file"]):
            if not (self.out / file).is_file():
                return file, MISSING
            if (self.out / file).read_bytes() != _caption(line):
                return file, "is changed"
        return None

    def owns(self, file: str, id: str) -> bool:
        return bool(SAFE_ID.fullmatch(id)) and file == self.file(0, id)

    def label(self, file: str, id: str) -> str:
        return file

    def contents(self, file: Path) -> Iterator[tuple[str, bytes]]:
        yield file.name.removesuffix(f".{self.suffix}"), file.read_bytes()

    def join(self, parts: Sequence[Path]) -> None:
        for part in parts:
            there = ImageFiles(part, self.suffix, self.captions)
            for line in sound(part):
                if self.finished(line) is None and there.finished(line) is not None:
                    for file in (line["file"], *self.beside(line["file"])):
                        link(part / file, self.out / file)
        self._found.cache_clear()


def _caption(line: Mapping[str, Any]) -> bytes:
    return str(line["prompt"]).encode("utf-8", "replace")


class ShardFiles(Writer):
    """Files of SHARD positions each: shards/<number>.<suffix>. New images are added to those that a file already holds."""

    def __init__(self, out: Path, format: str, inspect: Inspect | None = None):
        super().__init__(out, inspect)
        self.held: list[Made] = []
        self.kind = SHARDS[format]()

    def add(self, made: Made) -> Sequence[dict[str, Any]]:
        lines = self.flush() if self.held and made.position // SHARD != self.held[0].position // SHARD else []
        self.held.append(made)
        return lines

    def flush(self) -> Sequence[dict[str, Any]]:
        held, self.held = self.held, []
        fresh = {made.position: made for made in held if made.data is not None}
        name = self.file(held[0].position, "") if held else ""
        if fresh:
            self._write(name, self._rows(self.out / name) | fresh)
        return [made.line if made.data is None else made.line | {"file": name} for made in held]

    def file(self, position: int, id: str) -> str:
        return f"shards/{position // SHARD:06d}.{self.kind.suffix}"

    def owns(self, file: str, id: str) -> bool:
        return bool(re.fullmatch(rf"shards/[0-9]{{6,}}\.{self.kind.suffix}", file))

    def contents(self, file: Path) -> Iterator[tuple[str, bytes]]:
        return ((row.line["id"], row.data) for row in self.kind.read(file.read_bytes()) if row.data is not None)

    def join(self, parts: Sequence[Path]) -> None:
        found = {f"shards/{path.name}" for part in parts for path in (part / "shards").glob("*")}
        for name in sorted(name for name in found if self.owns(name, "")):
            own = rows = self._rows(self.out / name)
            for part in parts:
                rows = rows | self._rows(part / name)
            if rows != own:
                self._write(name, rows)

    def finish(self) -> None:
        self.kind.match(list(self.files()))

    def note(self, notes: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
        for path in self.files():
            rows = self._rows(path)
            changed = {place: replace(row, line=noted(row.line, notes, names)) for place, row in rows.items()}
            if changed != rows:
                self._write(path.relative_to(self.out).as_posix(), changed)

    def label(self, file: str, id: str) -> str:
        return f"{file}, image {id}"

    def _rows(self, path: Path) -> dict[int, Made]:
        """Return what a file holds, by position: nothing if it is missing or damaged, because all of it is made again then.

        Raises OSError if it exists but cannot be read for another reason, which may be temporary.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            return {row.position: row for row in self.kind.read(data)}
        except MemoryError:
            raise
        except Exception as error:  # a library may raise anything for a damaged file
            log.warning("%s cannot be read, so its images are to be made again: %s", path, checks.line(error))
            return {}

    def _write(self, name: str, rows: dict[int, Made]) -> None:
        path = self.out / name
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as part:
            self.kind.write(part, [row for _, row in sorted(rows.items())])
        self._found.cache_clear()


def writer_of(out: Path, settings: Mapping[str, Any], inspect: Inspect | None = None) -> Writer:
    """Return the writer of a run. settings: those in run.json: format, and captions: whether prompts lie beside their pictures.

    Raises ValueError for an unknown format, or captions for a format without picture files; ImportError without its library.
    """
    format, captions = settings["format"], settings.get("captions", False)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if captions and format not in PICTURES:
        raise ValueError(f"captions lie beside pictures, so format must be one of {', '.join(PICTURES)}, got {format!r}")
    return ShardFiles(out, format, inspect) if format in SHARDS else ImageFiles(out, format, captions, inspect)
