"""Prompts: a file of any format, a dataset of Hugging Face or standard input, as a stream of the jobs they ask for."""

from __future__ import annotations

import hashlib
import json
import logging
import numbers
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks
from ..runs.folder import SAFE_ID
from ..runs.journal import Keys
from .formats import Row, Rows
from .names import COLUMN, IDS, IMAGE, TEXT
from .rows import Faults, opened

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One image to make.

    id: names its file; 1 to 128 letters, digits, '.', '_' or '-', not starting with '.' or '-'.
    negative_prompt, steps, scale: None for the run's own.
    more: what else is known of the prompt, for its line of the manifest: values by names, which JSON can write.

    Raises ValueError for anything that is not so.
    """

    id: str
    prompt: str
    seed: int
    negative_prompt: str | None = None
    steps: int | None = None
    scale: float | None = None
    more: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt must be a non-empty string, got {self.prompt!r}")
        if not isinstance(self.id, str) or not SAFE_ID.fullmatch(self.id):
            raise ValueError(f"id must be {IDS}; got {self.id!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        if not isinstance(self.negative_prompt, str | None):
            raise ValueError(f"negative_prompt must be a string, got {self.negative_prompt!r}")
        object.__setattr__(self, "seed", int(self.seed))  # of numpy's integers too
        if self.steps is not None:
            object.__setattr__(self, "steps", checks.at_least_one("steps", self.steps))
        if self.scale is not None:
            object.__setattr__(self, "scale", checks.finite("scale", self.scale))

    @property
    def kind(self) -> tuple[int | None, float | None]:
        """(steps, scale), None for the run's own."""
        return self.steps, self.scale

    def asked(self) -> dict[str, Any]:
        """What a line of the manifest says of it."""
        own = {name: value for name in ALLOWED if (value := getattr(self, name)) is not None}
        return own | dict(self.more or {})

    def digested(self) -> tuple:
        """What counts of it for the digest of a run's prompts."""
        own = tuple(getattr(self, name) for name in ALLOWED)
        own = own if self.kind != OWN else own[:4]  # whose digest is that of before there were kinds
        return (*own, json.dumps(self.more, sort_keys=True)) if self.more else own


ALLOWED = tuple(field.name for field in fields(Job) if field.name != "more")
LATER = ("height", "width", "count", "guidance")  # columns that a run has one value of
MANIFEST = {  # fields of a manifest's line that say what came out, which a column of that name would pass for
    *("transition_step", "transition_timestep", "transition_log_snr", "noise_gap", "attempts", "score", "suspect"),
    *("nsfw_content_detected", "truncated", "retried", "status", "sha256", "bytes", "file", "position", "image"),
    *("similarity", "measure", "nearest", "copy"),
}
KINDS = 1000  # of jobs, by steps and scale: each takes some memory
OWN = (None, None)  # the run's own steps and scale


class Prompts:
    """The jobs of a source that may be larger than memory: each iteration reads it anew, as (position, job).

    source:   as for `rows.opened`, or a list of jobs. Columns: prompt, or caption or text in its place, and perhaps id, seed,
              negative_prompt, steps and scale. Others are carried into the manifest, unless they are named as what that says
              of an image itself, which a warning tells.
    seed:     a prompt without an id gets its position, zero-padded; one without a seed gets `seed` plus its position.
    on_error: of a row that is wrong, which "stop" lets end everything before any work; see `Faults`.

    The source is read once to look at every row, and again for the work.

    Raises ValueError naming the line for malformed, duplicate or unsafe entries; FileNotFoundError for a missing file,
    ImportError for a format whose library is missing.
    """

    def __init__(self, source: str | Path | Sequence[Job], seed: int = 0, on_error: str = "stop"):
        self.seed, self._faults = seed, Faults(on_error)
        self.name, self._read = opened(str(source)) if isinstance(source, str | Path) else ("jobs", partial(_listed, source))
        self._digits = max(4, len(str(sum(1 for _ in self._read()) - 1)))
        self._repeated: frozenset[int] = frozenset()
        self._others = Others()
        digest, ids, positions = hashlib.sha256(), array("Q"), array("Q")
        self.kinds: dict[tuple[int | None, float | None], str] = {}  # of steps and scale; where the first of each stands
        for position, where, job in self._jobs(self._refuse):
            digest.update(repr((position, *job.digested())).encode("utf-8", "surrogatepass"))
            self.kinds.setdefault(job.kind, where)
            if len(self.kinds) > KINDS:
                raise ValueError(f"{self.name} asks for more than {KINDS} different pairs of steps and scale")
            ids.append(Keys.digest(job.id.casefold()))  # some file systems do not tell A.png from a.png
            positions.append(position)
        _, earliest = np.unique(np.frombuffer(ids, np.uint64), return_index=True)
        if len(earliest) < len(ids):
            again = frozenset(np.delete(np.frombuffer(positions, np.uint64), earliest).tolist())
            self._refuse_repeated(again)
            self._repeated = again
        if not len(earliest):
            raise ValueError(f"{self.name} holds no prompts")
        if self._others.left_out:
            names = ", ".join(sorted(self._others.left_out))
            log.warning("%s: not carried into the manifest, which says this of its own images: %s", self.name, names)
        self.count, self.sha256 = len(earliest), digest.hexdigest()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, Job]]:
        return ((position, job) for position, _, job in self._jobs(lambda error: None))

    @property
    def skipped(self) -> int:
        """How many rows were passed over."""
        return self._faults.skipped

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's settings say of its prompts."""
        return {"prompts": self.count, "prompts_sha256": self.sha256}

    def _jobs(self, refuse: Callable[[str], None]) -> Iterator[tuple[int, str, Job]]:
        """(position, where it stands, job); `refuse` is told what is wrong with the others."""
        for position, (where, said) in enumerate(self._read()):
            if position in self._repeated:
                continue
            try:
                yield position, where, self._job(position, said)
            except ValueError as error:
                refuse(f"{where}: {error}")

    def _job(self, position: int, said: Job | Mapping[str, Any] | str) -> Job:
        if isinstance(said, Job):
            return said
        if isinstance(said, str):
            raise ValueError(said)
        if not said.keys() & set(TEXT):
            raise ValueError(f"needs {COLUMN}; it has {', '.join(said) or 'nothing'}")
        late = next((name for name in LATER if said.get(name) is not None), None)
        if late:
            raise ValueError(f"{late} cannot be a prompt's own, only the whole run's: leave the column out or rename it")
        used = next((name for name in TEXT if said.get(name) not in (None, "")), TEXT[0])
        own = {name: said[name] for name in ALLOWED if name != TEXT[0] and said.get(name) is not None}
        others = {name: value for name, value in said.items() if value is not None and name not in (*ALLOWED, used)}
        given = {"id": f"{position:0{self._digits}d}", "seed": self.seed + position} | own
        return Job(**given, prompt=said.get(used), more=self._others(others) or None)

    def _refuse(self, said: str) -> None:
        self._faults(f"{self.name}, {said}")

    def _refuse_repeated(self, again: frozenset[int]) -> None:
        ids = {job.id.casefold() for position, _, job in self._jobs(lambda error: None) if position in again}
        places: dict[str, str] = {}
        for position, where, job in self._jobs(lambda error: None):
            if job.id.casefold() in ids:
                earlier = places.setdefault(job.id.casefold(), where)
                if position in again:
                    self._refuse(f"{where}: id {job.id!r} is already used in {earlier}")


class Others:
    """What a manifest's lines have of the other columns of prompts: values that JSON can write, of one kind a column.

    left_out: columns that are named as what a line says of its image.
    """

    def __init__(self) -> None:
        self.left_out: set[str] = set()
        self._kinds: dict[str, str] = {}

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        self.left_out |= row.keys() & MANIFEST - set(IMAGE)
        return {name: self._value(name, value) for name, value in row.items() if name not in MANIFEST}

    def _value(self, name: str, value: Any) -> Any:
        """Once a column's values are known to be of several kinds, which no Parquet file holds, they are text."""
        value = value if isinstance(value, str | int | float) else json.loads(json.dumps(value, default=str))
        if value == []:
            return value
        kind = _kind(value)
        if kind is None or self._kinds.setdefault(name, kind) != kind:
            self._kinds[name] = "text"
        return value if kind == self._kinds[name] else json.dumps(value)


def _kind(value: Any) -> str | None:
    """The kind of a value that a column of a table may have, a list of one kind among them; None for others."""
    if isinstance(value, list):
        kinds = {_kind(one) for one in value}
        kind = kinds.pop() if len(kinds) == 1 else None
        return kind and f"list, {kind}"
    if isinstance(value, int) and not isinstance(value, bool):
        return "number" if -(2**63) <= value < 2**63 else None
    return {str: "text", bool: "truth", float: "number"}.get(type(value))


def read_prompts(path: str | Path, seed: int = 0, on_error: str = "stop") -> list[Job]:
    """All jobs of a source that fits into memory; see `Prompts`."""
    return [job for _, job in Prompts(path, seed, on_error)]


def _listed(jobs: Sequence[Job]) -> Rows:
    return (Row(f"job {number}", job) for number, job in enumerate(jobs, 1))
