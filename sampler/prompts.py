"""Files of prompts: JSON Lines, CSV or Parquet, as the jobs they ask for."""

from __future__ import annotations

import csv
import io
import json
import numbers
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Job:
    """One image to make.

    id: names its file; 1 to 128 letters, digits, '.', '_' or '-', not starting with '.' or '-'.
    negative_prompt: None for the run's own.

    Raises ValueError for anything that is not so.
    """

    id: str
    prompt: str
    seed: int
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt must be a non-empty string, got {self.prompt!r}")
        if not isinstance(self.id, str) or not SAFE_ID.fullmatch(self.id):
            raise ValueError(
                f"id must be 1 to 128 letters, digits, '.', '_' or '-', not starting with '.' or '-'; got {self.id!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        if not isinstance(self.negative_prompt, str | None):
            raise ValueError(f"negative_prompt must be a string, got {self.negative_prompt!r}")
        object.__setattr__(self, "seed", int(self.seed))  # of numpy's integers too


ALLOWED = tuple(field.name for field in fields(Job))
Rows = Iterator[tuple[str, Mapping[str, Any]]]  # where a row stands, as "line 3", and what it says


def read_prompts(path: str | Path, seed: int = 0) -> list[Job]:
    """Read JSON Lines, `{"prompt": "...", "id"?, "seed"?, "negative_prompt"?}`, or a .csv or .parquet file with those columns.

    path: "-" reads JSON Lines from standard input; a pipe is read once.

    A prompt without an id gets its position, zero-padded; one without a seed gets `seed` plus its position.

    Raises ValueError naming the line for malformed, duplicate or unsafe entries; FileNotFoundError for a missing file,
    ImportError for a .parquet file without pyarrow.
    """
    path = Path(path)
    name = "standard input" if str(path) == "-" else f"prompts file {str(path)!r}"
    if str(path) != "-" and not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        rows = list(READERS.get(path.suffix.lower(), _json_lines)(data))
        digits = max(4, len(str(len(rows) - 1)))
        jobs = [_job(where, row, f"{i:0{digits}d}", seed + i) for i, (where, row) in enumerate(rows)]
        first: dict[str, str] = {}
        for (where, _), job in zip(rows, jobs, strict=True):
            if first.setdefault(job.id.casefold(), where) != where:  # some file systems do not tell A.png from a.png
                raise ValueError(f"{where}: id {job.id!r} is already used in {first[job.id.casefold()]}")
    except ValueError as error:
        raise ValueError(f"{name}, {error}") from error
    if not jobs:
        raise ValueError(f"{name} holds no prompts")
    return jobs


def _job(where: str, row: Mapping[str, Any], id: str, seed: int) -> Job:
    given = {name: value for name, value in row.items() if value is not None}
    unknown = given.keys() - set(ALLOWED)
    if unknown:
        raise ValueError(f"{where}: unknown key {min(unknown)!r}; allowed are {', '.join(ALLOWED)}")
    try:
        return Job(**{"id": id, "prompt": None, "seed": seed} | given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start}: not UTF-8 text") from error


def _json_lines(data: bytes) -> Rows:
    for number, line in enumerate(_text(data).replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f'line {number}: must be an object such as {{"prompt": "a cat"}}, got {line.strip()[:60]}')
        yield f"line {number}", row


def _csv(data: bytes) -> Rows:
    reader = csv.DictReader(io.StringIO(_text(data), newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        if columns and ("prompt" not in columns or len(set(columns)) < len(columns)):
            raise ValueError(f"line 1: must name the column prompt, and each column once; got {', '.join(columns)}")
        for row in reader:
            where = f"line {reader.line_num}"
            if None in row:
                raise ValueError(f"{where}: more cells than columns; quote a cell that holds a comma")
            seed = row.get("seed")
            number = {"seed": int(seed)} if seed and seed.isascii() and seed.isdigit() else {}
            yield where, {name: cell or None for name, cell in row.items()} | number
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: not CSV: {error}") from error


def _parquet(data: bytes) -> Rows:
    try:
        from pyarrow import BufferReader, parquet
    except ImportError as error:
        raise ImportError("a .parquet file of prompts needs the package pyarrow: pip install pyarrow") from error
    try:
        rows = parquet.read_table(BufferReader(data)).to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's own are kinds of these
        raise ValueError(f"which is no Parquet file: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


READERS = {".csv": _csv, ".parquet": _parquet}
