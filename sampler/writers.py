"""What becomes of the images of a run: files of their own, or shards that hold many; each with its line of the manifest.

A file is there whole before the manifest says so, and has the same bytes whether or not the run was stopped on the way: a shard
holds the images of a fixed range of positions, in their order, and is written once all of them are made or have failed.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from PIL import Image
from torch import Tensor

from .folder import finite, read_lines, read_settings, save_bytes, whole

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


class Writer(Protocol):
    """Writes what is made, in the order of positions. block: positions that share a file."""

    block: int

    def add(self, made: Made) -> Sequence[dict[str, Any]]:
        """Take what is made; returns the lines of all whose files are there now, and of those that failed."""

    def flush(self) -> Sequence[dict[str, Any]]:
        """Write what is still held back."""

    def holds(self, line: dict[str, Any]) -> bool:
        """Whether the file of a line of the manifest is there, by its size."""

    def contents(self, file: Path) -> Iterator[tuple[str, bytes]]:
        """The images in a file, with their ids."""


class Files:
    """A file an image: images/<id>.<suffix>."""

    block = 1

    def __init__(self, out: Path, format: str):
        self.out, self.suffix = out, {"latents": "safetensors"}.get(format, format)

    def add(self, made: Made) -> Sequence[dict[str, Any]]:
        if made.data is None:
            return [made.line]
        line = made.line | {"file": f"images/{made.line['id']}.{self.suffix}"}
        save_bytes(made.data, self.out / line["file"])
        return [line]

    def flush(self) -> Sequence[dict[str, Any]]:
        return []

    def holds(self, line: dict[str, Any]) -> bool:
        path = self.out / line["file"]
        return path.is_file() and path.stat().st_size == line["bytes"]

    def contents(self, file: Path) -> Iterator[tuple[str, bytes]]:
        yield file.name.removesuffix(f".{self.suffix}"), file.read_bytes()


class Shards:
    """Files of SHARD positions each: shards/<number>.<suffix>. What one held before is kept beside what is new."""

    block = SHARD

    def __init__(self, out: Path, format: str):
        self.out, self.held = out, []
        self.kind = KINDS[format]()
        self._there = lru_cache(maxsize=16)(lambda file: (self.out / file).is_file())  # asked line by line

    def add(self, made: Made) -> Sequence[dict[str, Any]]:
        lines = self.flush() if self.held and made.position // SHARD != self.held[0].position // SHARD else []
        self.held.append(made)
        return lines

    def flush(self) -> Sequence[dict[str, Any]]:
        held, self.held = self.held, []
        fresh = {made.position: made for made in held if made.data is not None}
        name = f"shards/{held[0].position // SHARD:06d}.{self.kind.suffix}" if held else ""
        if fresh:
            path = self.out / name
            path.parent.mkdir(exist_ok=True)
            rows = {row.position: row for row in self.kind.read(path)} if path.is_file() else {}
            with whole(path) as part:
                self.kind.write(part, [row for _, row in sorted((rows | fresh).items())])
        return [made.line if made.data is None else made.line | {"file": name} for made in held]

    def holds(self, line: dict[str, Any]) -> bool:
        return self._there(line["file"])

    def contents(self, file: Path) -> Iterator[tuple[str, bytes]]:
        return ((row.line["id"], row.data) for row in self.kind.read(file))


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
        self.parquet.write_table(self.arrow.table(columns), path)

    def read(self, path: Path) -> Iterator[Made]:
        for row in self.parquet.read_table(path).to_pylist():
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

    def read(self, path: Path) -> Iterator[Made]:
        with tarfile.open(path) as tar:
            data: dict[str, bytes] = {}
            for member in tar:
                key, _, kind = member.name.partition(".")
                data[kind] = tar.extractfile(member).read()
                if len(data) == 2:
                    yield Made(int(key), json.loads(data["json"]), data["png"])
                    data = {}


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


def verify(out: str | Path) -> Iterator[tuple[str, str]]:
    """What is wrong with the images of a run's folder, each checked against its SHA-256, as (file or id, what).

    Raises ValueError where the folder holds no run of `generate`.
    """
    out = Path(out)
    if not (out / "run.json").is_file() or "format" not in (settings := read_settings(out)):
        raise ValueError(f"{str(out)!r} holds no run of generate: its run.json is missing or another command's")
    writes, file, digests = writer(out, settings["format"]), None, {}
    for line in read_lines(out / "manifest.jsonl"):
        if line.get("status") != "ok":
            continue
        if line["file"] != file:
            file, digests = line["file"], None
            try:
                digests = {id: hashlib.sha256(data).hexdigest() for id, data in writes.contents(out / file)}
            except FileNotFoundError:
                yield file, "is missing"
            except Exception as error:  # whatever a library makes of a file that is damaged
                yield file, f"cannot be read: {' '.join(str(error).split())}"
        if digests is not None and digests.get(line["id"]) != line["sha256"]:
            yield (file, "is changed") if writes.block == 1 else (f"{file}, image {line['id']}", "is missing or changed")
