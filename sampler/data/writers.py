"""What becomes of the images of a run: files of their own, or shards that hold many; each with its line of the manifest.

A file is there whole before the manifest says so, and has the same bytes whether or not the run was stopped on the way: a shard
holds the images of a fixed range of positions, in their order, and is written once all of them are made or have failed. In a
part of a run that is each shard's share of its images; `join` makes whole ones of those.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
from PIL import Image
from torch import Tensor

from .. import checks
from ..runs.atomic import link, save_bytes, whole
from ..runs.folder import SAFE_ID
from ..runs.journal import finite
from ..runs.manifest import sound

log = logging.getLogger(__name__)
SHARD = 256  # positions a shard
FRAMES_A_SECOND = 16  # of a video, which Wan was trained for
Picture = Image.Image | Sequence[Image.Image] | Tensor  # a picture, the frames of a video, or latents
PICTURES = {  # how an image becomes bytes: the same ones each time
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95, "method": 4},
}


@dataclass(frozen=True)
class Made:
    """What came of the job at a position: its line of the manifest, and the bytes of its image, None where it failed."""

    position: int
    line: dict[str, Any]
    data: bytes | None = None

    @classmethod
    def of(cls, position: int, line: dict[str, Any], image: Picture, format: str) -> Made:
        data = encoded(image, format, line)
        return cls(position, line | {"status": "ok", "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}, data)


def encoded(image: Picture, format: str, line: dict[str, Any]) -> bytes:
    """An image as a file of its format, a video moving; latents as safetensors, the line of the manifest their metadata."""
    if format == "latents":
        text = {"line": json.dumps(finite(line))}  # one entry: several come in any order
        return safetensors.torch.save({"latents": image.contiguous().cpu()}, text)
    first, *others = image if isinstance(image, Sequence) else [image]
    moving = {"save_all": True, "append_images": others, "duration": 1000 / FRAMES_A_SECOND, "loop": 0} if others else {}
    first.save(file := io.BytesIO(), **PICTURES.get(format, PICTURES["png"]), **moving)
    return file.getvalue()


class Writer(ABC):
    """Writes what is made, in the order of positions, and tells whether what is there is as it was made."""

    def __init__(self, out: Path):
        self.out = out
        self._digests = lru_cache(maxsize=16)(self._read_digests)  # asked line by line

    @abstractmethod
    def add(self, made: Made) -> Sequence[dict[str, Any]]:
        """Take what is made; returns the lines of all whose files are there now, and of those that failed."""

    @abstractmethod
    def flush(self) -> Sequence[dict[str, Any]]:
        """Write what is still held back."""

    @abstractmethod
    def file(self, position: int, id: str) -> str:
        """The file of a job's image, in the run's folder."""

    @abstractmethod
    def image(self, file: str, id: str) -> str:
        """What messages call an image that is in a file."""

    @abstractmethod
    def contents(self, file: Path) -> Iterator[tuple[str, bytes]]:
        """The images in a file, with their ids."""

    @abstractmethod
    def join(self, parts: Sequence[Path]) -> None:
        """Put the images of `parts`, folders of the same run, into this one's files."""

    @abstractmethod
    def names(self, file: str, id: str) -> bool:
        """Whether a file is one that this writer may put an image into; such a one is nowhere but in the run's folder."""

    def holds(self, line: dict[str, Any]) -> bool:
        """Whether the image of a line of the manifest is as it was made."""
        return self.wrong(line) is None

    def wrong(self, line: dict[str, Any]) -> tuple[str, str] | None:
        """What is wrong with the image of a line of the manifest, as (where, what); None where it is as it was made.

        Raises KeyError for a line that lacks its id, file or sha256.
        """
        id, file, digest = line["id"], line["file"], line["sha256"]
        if not self.names(file, id):
            return f"image {id}", f"is said to be in {file!r}, which is no file of this run"
        found = self._digests(file)
        if isinstance(found, str):
            return file, found
        if found.get(id) == digest:
            return None
        return self.image(file, id), "is changed" if id in found else "is missing"

    def _read_digests(self, file: str) -> dict[str, str] | str:
        """The SHA-256 of each image in a file, by its id; or what is wrong with the file."""
        try:
            return {id: hashlib.sha256(data).hexdigest() for id, data in self.contents(self.out / file)}
        except FileNotFoundError:
            return "is missing"
        except Exception as error:  # whatever a library makes of a file that is damaged
            return f"cannot be read: {checks.line(error)}"


class Files(Writer):
    """A file an image: images/<id>.<suffix>."""

    def __init__(self, out: Path, format: str):
        super().__init__(out)
        self.suffix = {"latents": "safetensors"}.get(format, format)

    def add(self, made: Made) -> Sequence[dict[str, Any]]:
        if made.data is None:
            return [made.line]
        line = made.line | {"file": self.file(made.position, made.line["id"])}
        save_bytes(made.data, self.out / line["file"])
        return [line]

    def flush(self) -> Sequence[dict[str, Any]]:
        return []

    def file(self, position: int, id: str) -> str:
        return f"images/{id}.{self.suffix}"

    def names(self, file: str, id: str) -> bool:
        return bool(SAFE_ID.fullmatch(id)) and file == self.file(0, id)

    def image(self, file: str, id: str) -> str:
        return file

    def contents(self, file: Path) -> Iterator[tuple[str, bytes]]:
        yield file.name.removesuffix(f".{self.suffix}"), file.read_bytes()

    def join(self, parts: Sequence[Path]) -> None:
        for part in parts:
            there = Files(part, self.suffix)
            for line in sound(part):
                if line["status"] == "ok" and not self.holds(line) and there.holds(line):
                    link(part / line["file"], self.out / line["file"])
        self._digests.cache_clear()


class Shards(Writer):
    """Files of SHARD positions each: shards/<number>.<suffix>. What one held before is kept beside what is new."""

    def __init__(self, out: Path, format: str):
        super().__init__(out)
        self.held: list[Made] = []
        self.kind = KINDS[format]()

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

    def names(self, file: str, id: str) -> bool:
        return bool(re.fullmatch(rf"shards/[0-9]{{6,}}\.{self.kind.suffix}", file))

    def contents(self, file: Path) -> Iterator[tuple[str, bytes]]:
        return ((row.line["id"], row.data) for row in self.kind.read(file.read_bytes()))

    def join(self, parts: Sequence[Path]) -> None:
        found = {f"shards/{path.name}" for part in parts for path in (part / "shards").glob("*")}
        for name in sorted(name for name in found if self.names(name, "")):
            own = rows = self._rows(self.out / name)
            for part in parts:
                rows = rows | self._rows(part / name)
            if rows != own:
                self._write(name, rows)

    def image(self, file: str, id: str) -> str:
        return f"{file}, image {id}"

    def _rows(self, path: Path) -> dict[int, Made]:
        """What a file holds, by position: nothing where it is missing or damaged, for all of it is made again then.

        Raises OSError where it is there and cannot be read for another reason, which may pass.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            return {row.position: row for row in self.kind.read(data)}
        except MemoryError:
            raise
        except Exception as error:  # whatever a library makes of a file that is damaged
            log.warning("%s cannot be read, so its images are to be made again: %s", path, checks.line(error))
            return {}

    def _write(self, name: str, rows: dict[int, Made]) -> None:
        path = self.out / name
        path.parent.mkdir(exist_ok=True)
        with whole(path) as part:
            self.kind.write(part, [row for _, row in sorted(rows.items())])
        self._digests.cache_clear()


class Parquet:
    """A row an image: the fields of its line, its position, and `image`, {bytes, path}, as `datasets` has images."""

    suffix = "parquet"

    def __init__(self) -> None:
        self.arrow, self.parquet = (library(name, "pyarrow", "parquet") for name in ("pyarrow", "pyarrow.parquet"))

    def _types(self) -> dict[str, Any]:
        text, whole, real, truth = self.arrow.string(), self.arrow.int64(), self.arrow.float64(), self.arrow.bool_()
        types = dict.fromkeys(("id", "prompt", "negative_prompt", "truncated", "retried", "status", "sha256"), text)
        types |= dict.fromkeys(("seed", "transition_step", "attempts", "bytes", "position"), whole)
        types |= dict.fromkeys(("transition_timestep", "score"), real) | {"noise_gap": self.arrow.list_(real)}
        types |= dict.fromkeys(("suspect", "nsfw_content_detected"), truth)
        return types | {"image": self.arrow.struct([("bytes", self.arrow.binary()), ("path", text)])}

    def write(self, path: Path, rows: Sequence[Made]) -> None:
        types = self._types()
        found = [
            finite(row.line) | {"position": row.position, "image": {"bytes": row.data, "path": f"{row.line['id']}.png"}}
            for row in rows
        ]
        names = dict.fromkeys((*types, *(name for row in found for name in row)))
        columns = {name: self.arrow.array([row.get(name) for row in found], types.get(name)) for name in names}
        self.parquet.write_table(self.arrow.table(columns), path, write_page_checksum=True)

    def read(self, data: bytes) -> Iterator[Made]:
        for row in self.parquet.read_table(io.BytesIO(data), page_checksum_verification=True).to_pylist():
            line = {name: value for name, value in row.items() if value is not None}
            image, position = line.pop("image"), line.pop("position")
            yield Made(position, line, image["bytes"])


class WebDataset:
    """Two members an image: <position>.png and <position>.json, its line."""

    suffix = "tar"

    def __init__(self) -> None:
        self.writer = library("webdataset", "webdataset", "webdataset").TarWriter

    def write(self, path: Path, rows: Sequence[Made]) -> None:
        with path.open("wb") as stream, self.writer(stream, user="", group="", mtime=0, encoder=False) as tar:
            for row in rows:
                tar.write({"__key__": f"{row.position:012d}", "png": row.data, "json": json.dumps(finite(row.line)).encode()})

    def read(self, data: bytes) -> Iterator[Made]:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            found: dict[str, bytes] = {}
            for member in tar:
                key, _, kind = member.name.partition(".")
                found[kind] = tar.extractfile(member).read()
                if len(found) == 2:
                    yield Made(int(key), json.loads(found["json"]), found["png"])
                    found = {}


def library(name: str, package: str, format: str) -> Any:
    """A module that a format needs. Raises ImportError naming the package where it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"format {format!r} needs the package {package}: pip install {package}") from error


KINDS = {"parquet": Parquet, "webdataset": WebDataset}
FORMATS = (*PICTURES, "latents", *KINDS)


def writer(out: Path, format: str) -> Writer:
    """The writer of a format. Raises ValueError for an unknown one, ImportError where its library is missing."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return (Shards if format in KINDS else Files)(out, format)
