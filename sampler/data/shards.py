"""Files that hold many pictures with their lines of the manifest: a class a format, which writes and reads them."""

from __future__ import annotations

import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from ..runs.atomic import atomic_write
from ..runs.environment import library
from ..runs.jsontext import finite, json_bytes
from .image_encoding import Made


class Shard(ABC):
    """A format of files that hold many pictures. Raises ImportError if its library is missing."""

    suffix: ClassVar[str]

    @abstractmethod
    def write(self, path: Path, rows: Sequence[Made]) -> None:
        """Write pictures that were made into a file."""

    @abstractmethod
    def read(self, data: bytes) -> Iterator[Made]:
        """Yield the pictures in the bytes of a file. For a damaged file the exception depends on the library."""

    def match(self, paths: Sequence[Path]) -> None:
        """Make the files of a set consistent with each other, once all are written."""
        return


class Parquet(Shard):
    """One row per picture: its line's fields, its position, and `image`, {bytes, path}, which `datasets` reads as an Image."""

    suffix = "parquet"

    def __init__(self) -> None:
        self.arrow, self.parquet = (
            library(name, "format 'parquet' needs", "pyarrow") for name in ("pyarrow", "pyarrow.parquet")
        )

    def _types(self) -> dict[str, Any]:
        """Return the types of the columns that every file has; they must be the same in all files of a set."""
        text, integer, real, truth = self.arrow.string(), self.arrow.int64(), self.arrow.float64(), self.arrow.bool_()
        kinds = {
            text: "id prompt negative_prompt truncated retried status sha256 scheduler guidance model fingerprint",
            integer: "seed steps height width transition_step attempts bytes position",
            real: "scale transition_timestep transition_log_snr score",
            self.arrow.list_(real): "noise_gap",
            truth: "suspect nsfw_content_detected",
            self.arrow.struct([("bytes", self.arrow.binary()), ("path", text)]): "image",
        }
        return {name: kind for kind, names in kinds.items() for name in names.split()}

    def write(self, path: Path, rows: Sequence[Made]) -> None:
        types = self._types()
        found = [
            finite(row.line) | {"position": row.position, "image": {"bytes": row.data, "path": f"{row.line['id']}.png"}}
            for row in rows
        ]
        names = dict.fromkeys((*types, *(name for row in found for name in row)))
        columns = {name: self.arrow.array([row.get(name) for row in found], types.get(name)) for name in names}
        features = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})  # others follow from their types
        table = self.arrow.table(columns).replace_schema_metadata({"huggingface": features})
        self.parquet.write_table(table, path, write_page_checksum=True)

    def read(self, data: bytes) -> Iterator[Made]:
        # In this thread alone: a thread of pyarrow that still holds `data` while Python ends would abort the process.
        with self.parquet.ParquetFile(io.BytesIO(data), pre_buffer=False, page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
        for row in table.to_pylist():
            line = {name: value for name, value in row.items() if value is not None}
            image, position = line.pop("image"), line.pop("position")
            yield Made(position, line, image["bytes"])

    def match(self, paths: Sequence[Path]) -> None:
        """Give all files the same columns, as `datasets` requires: some columns of the prompts may be in some files only."""
        schemas: dict[Path, Any] = {}
        for path in paths:
            with suppress(self.arrow.ArrowInvalid):  # a damaged file is made again when the run is resumed
                schemas[path] = self.parquet.read_schema(path)
        if not schemas:
            return
        common = self.arrow.unify_schemas(schemas.values(), promote_options="permissive")
        for path, schema in schemas.items():
            if not schema.equals(common):
                table = self.parquet.read_table(path, page_checksum_verification=True)
                nulls = {field.name: self.arrow.nulls(len(table), field.type) for field in common}
                found = {name: table[name].cast(common.field(name).type) for name in table.column_names}
                with atomic_write(path) as part:
                    table = self.arrow.table(nulls | found, schema=common)
                    self.parquet.write_table(table, part, write_page_checksum=True)


class WebDataset(Shard):
    """Three members per picture: <position>.png; <position>.txt, its prompt; and <position>.json, its manifest line.

    The line has no fields that are null: if the first pictures had one, `datasets` would refuse later ones with a value.
    """

    suffix = "tar"

    def __init__(self) -> None:
        self.writer = library("webdataset", "format 'webdataset' needs").TarWriter

    def write(self, path: Path, rows: Sequence[Made]) -> None:
        with path.open("wb") as stream, self.writer(stream, user="", group="", mtime=0, encoder=False) as tar:
            for row in rows:
                line = {name: value for name, value in finite(row.line).items() if value is not None}
                texts = {"txt": line["prompt"].encode("utf-8", "replace"), "json": json_bytes(line)}
                tar.write({"__key__": f"{row.position:012d}", "png": row.data, **texts})

    def read(self, data: bytes) -> Iterator[Made]:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for key, members in groupby(tar, lambda member: member.name.partition(".")[0]):
                found = {member.name.partition(".")[2]: contents(tar, member) for member in members}
                yield Made(int(key), json.loads(found["json"]), found["png"])


def contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a member. Raises tarfile.ReadError if it is no file, such as a folder."""
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name!r} is no file")
    return file.read()


SHARDS: dict[str, type[Shard]] = {"parquet": Parquet, "webdataset": WebDataset}
