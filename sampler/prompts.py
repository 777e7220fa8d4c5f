"""Prompts: JSON Lines, CSV, Parquet, a dataset of Hugging Face or standard input, as a stream of the jobs they ask for."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import numbers
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import arguments
from .folder import SAFE_ID, Keys

log = logging.getLogger(__name__)
HUB = "hf:"
ON_ERROR = ("stop", "skip")
TEXT, IMAGE = ("prompt", "caption", "text"), ("image", "file_name", "path")  # columns, the first that says something counts
COLUMN = "prompt, caption or text"
BESIDE = {*TEXT, *IMAGE, "concept"}  # what captions of training images have too, and a job needs no more of
SAVED = ("state.json", "dataset_dict.json")  # one of them is in a folder that `datasets` saved


@dataclass(frozen=True)
class Job:
    """One image to make.

    id: names its file; 1 to 128 letters, digits, '.', '_' or '-', not starting with '.' or '-'; no device of Windows, as "con".
    negative_prompt, steps, scale: None for the run's own.

    Raises ValueError for anything that is not so.
    """

    id: str
    prompt: str
    seed: int
    negative_prompt: str | None = None
    steps: int | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt must be a non-empty string, got {self.prompt!r}")
        if not isinstance(self.id, str) or not SAFE_ID.fullmatch(self.id):
            raise ValueError(
                "id must be 1 to 128 letters, digits, '.', '_' or '-', not starting with '.' or '-' and no device of Windows, "
                f"as con or nul; got {self.id!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        if not isinstance(self.negative_prompt, str | None):
            raise ValueError(f"negative_prompt must be a string, got {self.negative_prompt!r}")
        object.__setattr__(self, "seed", int(self.seed))  # of numpy's integers too
        if self.steps is not None:
            object.__setattr__(self, "steps", arguments.at_least_one("steps", self.steps))
        if self.scale is not None:
            object.__setattr__(self, "scale", arguments.finite("scale", self.scale))

    @property
    def kind(self) -> tuple[int | None, float | None]:
        """(steps, scale), None for the run's own."""
        return self.steps, self.scale


ALLOWED, NUMBERS = tuple(field.name for field in fields(Job)), ("seed", "steps", "scale")
KINDS = 1000  # of jobs, by steps and scale: each takes some memory
OWN = (None, None)  # the run's own steps and scale


class Row(NamedTuple):
    """Where it stands, as "line 3", and what it says, or what is wrong with it."""

    where: str
    said: Mapping[str, Any] | str


Rows = Iterator[Row]


class Prompts:
    """The jobs of a source that may be larger than memory: each iteration reads it anew, as (position, job).

    source:   JSON Lines, `{"prompt": "...", "id"?, "seed"?, "negative_prompt"?, "steps"?, "scale"?}`, a .csv or .parquet file
              with those columns, "caption" or "text" in the place of "prompt"; images and concepts beside them do not count;
              "-", JSON Lines on standard input, or a pipe, which is first copied to a temporary file; a folder that the
              `datasets` library saved, or "hf:NAME" or "hf:NAME:SPLIT", a dataset of its hub (split "train"); a list of jobs.
    seed:     a prompt without an id gets its position, zero-padded; one without a seed gets `seed` plus its position.
    on_error: "stop": a row that is wrong ends everything before any work; "skip": it is passed over with a warning.

    The source is read once to look at every row, and again for the work.

    Raises ValueError naming the line for malformed, duplicate or unsafe entries; FileNotFoundError for a missing file,
    ImportError for a format whose library is missing.
    """

    def __init__(self, source: str | Path | Sequence[Job], seed: int = 0, on_error: str = "stop"):
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        self.seed, self.on_error, self.skipped = seed, on_error, 0
        self.name, self._read = opened(str(source)) if isinstance(source, str | Path) else ("jobs", partial(_listed, source))
        self._digits = max(4, len(str(sum(1 for _ in self._rows()) - 1)))
        self._repeated: frozenset[int] = frozenset()
        digest, ids, positions = hashlib.sha256(), array("Q"), array("Q")
        self.kinds: dict[tuple[int | None, float | None], str] = {}  # of steps and scale; where the first of each stands
        for position, where, job in self._jobs(self._refuse):
            asked = astuple(job) if job.kind != OWN else astuple(job)[:4]  # whose digest is that of before there were kinds
            digest.update(repr((position, *asked)).encode("utf-8", "surrogatepass"))
            self.kinds.setdefault(job.kind, where)
            if len(self.kinds) > KINDS:
                raise ValueError(f"{self.name} asks for more than {KINDS} different pairs of steps and scale")
            ids.append(Keys.digest(job.id.casefold()))  # some file systems do not tell A.png from a.png
            positions.append(position)
        _, first = np.unique(np.frombuffer(ids, np.uint64), return_index=True)
        if len(first) < len(ids):
            again = frozenset(np.delete(np.frombuffer(positions, np.uint64), first).tolist())
            self._refuse_repeated(again)
            self._repeated = again
        if not len(first):
            raise ValueError(f"{self.name} holds no prompts")
        self.count, self.sha256 = len(first), digest.hexdigest()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, Job]]:
        return ((position, job) for position, _, job in self._jobs(lambda error: None))

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's settings say of its prompts."""
        return {"prompts": self.count, "prompts_sha256": self.sha256}

    def _rows(self) -> Rows:
        try:
            yield from self._read()
        except ValueError as error:
            raise ValueError(f"{self.name}, {error}") from error

    def _jobs(self, refuse: Callable[[str], None]) -> Iterator[tuple[int, str, Job]]:
        """(position, where it stands, job); `refuse` is told what is wrong with the others."""
        for position, (where, said) in enumerate(self._rows()):
            if position in self._repeated:
                continue
            try:
                yield position, where, self._job(position, said)
            except ValueError as error:
                refuse(f"{where}: {error}")

    def _job(self, position: int, said: Mapping[str, Any] | str) -> Job:
        if isinstance(said, str):
            raise ValueError(said)
        if not said.keys() & set(TEXT):
            raise ValueError(f"needs {COLUMN}; it has {', '.join(map(str, said)) or 'nothing'}")
        given = {name: value for name, value in said.items() if value is not None and name not in BESIDE}
        prompt = next((said[name] for name in TEXT if said.get(name) is not None), None)
        unknown = given.keys() - set(ALLOWED)
        if unknown:
            raise ValueError(f"unknown key {min(unknown)!r}; allowed are {', '.join(ALLOWED)}")
        return Job(**{"id": f"{position:0{self._digits}d}", "prompt": prompt, "seed": self.seed + position} | given)

    def _refuse(self, said: str) -> None:
        if self.on_error == "stop":
            raise ValueError(f"{self.name}, {said}")
        self.skipped += 1
        log.warning("%s, %s: skipped", self.name, said)

    def _refuse_repeated(self, again: frozenset[int]) -> None:
        ids = {job.id.casefold() for position, _, job in self._jobs(lambda error: None) if position in again}
        first: dict[str, str] = {}
        for position, where, job in self._jobs(lambda error: None):
            if job.id.casefold() in ids:
                earlier = first.setdefault(job.id.casefold(), where)
                if position in again:
                    self._refuse(f"{where}: id {job.id!r} is already used in {earlier}")


def read_prompts(path: str | Path, seed: int = 0) -> list[Job]:
    """All jobs of a source that fits into memory; see `Prompts`."""
    return [job for _, job in Prompts(path, seed)]


def opened(source: str) -> tuple[str, Callable[[], Rows]]:
    """What messages call a source, and what reads its rows anew each time."""
    path = Path(source)
    if source.startswith(HUB):
        return f"dataset {source!r}", partial(_dataset, source)
    name = "standard input" if source == "-" else f"prompts file {source!r}"
    if source != "-" and not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if path.is_dir():
        if not any((path / name).is_file() for name in SAVED):
            raise ValueError(f"{name} is a folder that the package datasets did not save: give a file, as its metadata.jsonl")
        return f"dataset {source!r}", partial(_dataset, source)
    if source == "-" or not path.is_file():  # can be read once only: copied to where it can be read again
        kept = tempfile.NamedTemporaryFile(prefix="prompts-")  # noqa: SIM115 (gone with the last that refers to it)
        with nullcontext(sys.stdin.buffer) if source == "-" else path.open("rb") as stream:
            shutil.copyfileobj(stream, kept)
        kept.flush()
        return name, lambda: _json_lines(Path(kept.name))
    return name, partial(READERS.get(path.suffix.lower(), _json_lines), path)


def _unreadable(text: str) -> bool:
    """Whether text that was read with "surrogateescape" holds bytes that are not UTF-8."""
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


def _listed(jobs: Sequence[Job]) -> Rows:
    return (Row(f"job {number}", vars(job)) for number, job in enumerate(jobs, 1))


def _json_lines(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row(f"line {number}", _object(line))


def _object(line: str) -> dict[str, Any] | str:
    if _unreadable(line):
        return "not UTF-8 text"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f'must be an object such as {{"prompt": "a cat"}}, got {line.strip()[:60]}'


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = reader.fieldnames or []
        except csv.Error as error:
            raise ValueError(f"line 1: not CSV: {error}") from error
        if columns and (not set(TEXT) & set(columns) or len(set(columns)) < len(columns)):
            raise ValueError(f"line 1: must name {COLUMN}, and each column once; got {', '.join(columns)}")
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield Row(f"line {reader.line_num}", f"not CSV: {error}")
                continue
            if row is None:
                return
            yield Row(f"line {reader.line_num}", _cells(row))


def _cells(row: dict[str | None, Any]) -> dict[str, Any] | str:
    if None in row:
        return "more cells than columns; quote a cell that holds a comma"
    if any(cell and _unreadable(cell) for cell in row.values()):
        return "not UTF-8 text"
    return {name: _number(cell) if name in NUMBERS and cell else cell or None for name, cell in row.items()}


def _number(cell: str) -> int | float | str:
    """What a cell says, if that is a number."""
    if cell.isascii() and cell.isdigit():
        return int(cell)
    try:
        return float(cell)
    except ValueError:
        return cell


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("a .parquet file of prompts needs the package pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", row)
    except (ValueError, OSError) as error:  # pyarrow's own are kinds of these
        raise ValueError(f"which is no Parquet file: {error}") from error


def _dataset(source: str) -> Rows:
    """The rows of a dataset, of which other columns are left alone."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source!r} is a dataset, which needs the package datasets: pip install datasets") from error
    name, _, split = source.removeprefix(HUB).partition(":")
    if source.startswith(HUB):
        data = datasets.load_dataset(name, split=split or "train", streaming=True)
    else:
        data = datasets.load_from_disk(source)
        if isinstance(data, dict):
            raise ValueError(f"which holds the splits {', '.join(data)}: give the folder of one")
    if not set(TEXT) & set(columns := data.column_names or []):
        raise ValueError(f"must have {COLUMN}; got {', '.join(columns)}")
    data = data.select_columns([column for column in columns if column in (*ALLOWED, *TEXT)])
    for number, row in enumerate(data, 1):
        yield Row(f"row {number}", row)


READERS = {".csv": _csv, ".parquet": _parquet}
