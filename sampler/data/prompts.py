"""Reads prompts from a file of any format, a dataset of Hugging Face or standard input, as a stream of jobs."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..runs.jsonl_journal import Keys
from ..runs.run_folder import SAFE_ID
from .input_formats import Row, Rows
from .names import COLUMN, IDS, IMAGE, TEXT
from .rows import Faults, open_rows

log = logging.getLogger(__name__)
GUIDANCES = ("cfg", "delayed", "opposite", "guard")  # the names of guidance that a job may ask for


class Kind(NamedTuple):
    """A job's own settings; None: the run's."""

    steps: int | None = None
    scale: float | None = None
    height: int | None = None
    width: int | None = None
    guidance: str | None = None


@dataclass(frozen=True)
class Job:
    """One image to make.

    id: names its file; 1 to 128 letters, digits, '.', '_' or '-', not starting with '.' or '-'.
    negative_prompt, steps, scale, height, width (pixels): None for the run's own.
    guidance: one of GUIDANCES, as the run defines it; None for the run's own.
    more: further fields for the job's manifest line, such as other columns of the prompt: values by name that JSON can write.

    Raises ValueError for other values.
    """

    id: str
    prompt: str
    seed: int
    negative_prompt: str | None = None
    steps: int | None = None
    scale: float | None = None
    height: int | None = None
    width: int | None = None
    guidance: str | None = None
    more: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt must be a non-empty string, got {self.prompt!r}")
        if not isinstance(self.id, str) or not SAFE_ID.fullmatch(self.id):
            raise ValueError(f"id must be {IDS}; got {self.id!r}")
        seed = checks.whole_number(self.seed)
        if seed is None or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        if not isinstance(self.negative_prompt, str | None):
            raise ValueError(f"negative_prompt must be a string, got {self.negative_prompt!r}")
        if self.guidance is not None and self.guidance not in GUIDANCES:
            names = ", ".join(GUIDANCES)
            raise ValueError(f"guidance must be one of {names}, got {self.guidance!r}; its scale is called scale")
        object.__setattr__(self, "seed", seed)  # an int, also for numpy's integers
        for name in ("steps", "height", "width"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, checks.at_least_one(name, given))
        if self.scale is not None:
            object.__setattr__(self, "scale", checks.finite("scale", self.scale))

    @property
    def kind(self) -> Kind:
        return Kind(self.steps, self.scale, self.height, self.width, self.guidance)

    def again(self, k: int) -> Job:
        """The k-th further image of the same prompt: its id ends in -k, and its seed is k higher. The 0th is this one."""
        return replace(self, id=f"{self.id}-{k}", seed=self.seed + k) if k else self

    def asked(self) -> dict[str, Any]:
        """Return the fields of the manifest line that say what was asked."""
        own = {name: value for name in ALLOWED if (value := getattr(self, name)) is not None}
        return own | dict(self.more or {})


ALLOWED = tuple(field.name for field in fields(Job) if field.name != "more")
MANIFEST = {  # fields of a manifest's line that say what came out; a column of such a name could be mistaken for them
    *("transition_step", "transition_timestep", "transition_log_snr", "noise_gap", "attempts", "score", "suspect"),
    *("nsfw_content_detected", "truncated", "retried", "status", "sha256", "bytes", "file", "position", "image"),
    *("similarity", "measure", "nearest", "copy", "nearest_in_set", "similarity_in_set", "measure_in_set", "duplicate_of"),
    *("scheduler", "model", "fingerprint", "versions", "signed_sha256"),
}
KINDS = 1000  # the most kinds of jobs in a run: each takes some memory
NAMED = 5  # the most jobs that a warning names
WRONG = 20  # the most rows that an error names


Refuse = Callable[[str, str], None]  # called with a row's place and what is wrong with it


class Prompts:
    """Iterates over the jobs of a source as (position, job). Each iteration reads it anew, so it may be larger than memory.

    source:   as for `rows.open_rows`, or a list of jobs or of prompts. Columns: prompt, or caption or text in its place, and
              perhaps id, seed, count, negative_prompt, steps, scale, height, width and guidance. Other columns are copied into
              the manifest, unless the manifest uses their names for facts about the image; a warning names those.
    seed:     a row without a seed gets `seed` plus its number, counted from 0; one without an id gets its number, zero-padded.
    count:    the number of images of a row without a count. The first has the row's id and seed, the k-th after it has ID-k
              and seed + k. So a higher count adds images and changes none.
    on_error: what happens at wrong rows: "stop" raises one error about all of them before any work, "skip" leaves them out.
    later:    whether that error is raised by `check`, which must follow, so that it also names what the model cannot make.

    The source is read once to look at every row, and again for the work. A warning names jobs that ask for the same image.

    Raises ValueError naming the line for malformed, duplicate or unsafe entries; FileNotFoundError for a missing file,
    ImportError for a format whose library is missing.
    """

    def __init__(
        self,
        source: str | Path | Sequence[Job | str],
        seed: int = 0,
        on_error: str = "stop",
        count: int = 1,
        later: bool = False,
    ):
        self.seed, self._faults, self._count = seed, Faults(on_error), checks.at_least_one("count", count)
        self.name, self._read = open_rows(str(source)) if isinstance(source, str | Path) else ("jobs", partial(_listed, source))
        self._repeated: frozenset[int] = frozenset()
        self._unfit: frozenset[Kind] = frozenset()
        self._others = Others()
        self._refused, self._wrong, self._last = 0, list[str](), ""  # under "stop": how many rows, what is wrong, the last row
        same = self._look(self._refuse)
        if not later:
            self._raise()
        if left_out := ", ".join(sorted(self._others.left_out)):
            log.warning("%s: not carried into the manifest, which says this of its own images: %s", self.name, left_out)
        if same:
            log.warning("%s", self._said_twice(same))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, Job]]:
        return ((position, job) for position, _, job in self._jobs())

    @property
    def skipped(self) -> int:
        """How many rows were passed over."""
        return self._faults.skipped

    @property
    def settings(self) -> dict[str, Any]:
        """Return the fields of run.json about the prompts."""
        return {"prompts": self.count, "prompts_sha256": self.sha256}

    def check(self, fits: Callable[[Kind], object]) -> None:
        """Refuse the rows of the kinds for which `fits` raises ValueError, each by its place in the source; see `on_error`.

        An error about the run's own settings is raised unchanged.
        """
        unfit: dict[Kind, str] = {}
        for kind in self.kinds:
            try:
                fits(kind)
            except ValueError as error:
                if kind == Kind():
                    raise
                unfit[kind] = str(error)
        for _, where, job in self._jobs() if unfit else ():
            if job.kind in unfit:
                self._refuse(where, unfit[job.kind])
        self._raise()
        if unfit:
            self._unfit = frozenset(unfit)
            self._look()

    def _look(self, refuse: Refuse = lambda where, said: None) -> frozenset[int]:
        """Read all rows; returns the positions of jobs that ask for the same image as an earlier job. refuse: see `_jobs`."""
        digest, ids, images, positions = hashlib.sha256(), array("Q"), array("Q"), array("Q")
        self.kinds: Counter[Kind] = Counter()
        for position, _, job in self._jobs(refuse):
            digest.update(json.dumps([position, job.asked()], sort_keys=True).encode())
            self.kinds[job.kind] += 1
            if len(self.kinds) > KINDS:
                raise ValueError(f"{self.name} asks for more than {KINDS} different settings (steps, scale, size, guidance)")
            ids.append(Keys.digest(job.id.casefold()))  # some file systems do not tell A.png from a.png
            images.append(Keys.digest(_image(job)))
            positions.append(position)
        if again := _later(ids, positions):
            self._refuse_repeated(again)
            self._repeated |= again
            return self._look()
        if not len(ids) and not self._refused:
            raise ValueError(f"{self.name} holds no prompts")
        self.count, self.sha256 = len(ids), digest.hexdigest()
        return _later(images, positions)

    def _jobs(self, refuse: Refuse = lambda where, said: None) -> Iterator[tuple[int, str, Job]]:
        """Yield (position, place in the source, job). `refuse` is called with each fault; a wrong row has a position, too."""
        position = 0
        for number, (where, said) in enumerate(self._read()):
            try:
                first, count = self._row(number, said)
                first.again(count - 1)  # whose id is the longest, and whose seed the highest
            except ValueError as error:
                refuse(where, str(error))
                position += 1
                continue
            for k in range(count):
                job = first.again(k)
                if position not in self._repeated and job.kind not in self._unfit:
                    yield position, where, job
                position += 1

    def _row(self, number: int, said: Job | Mapping[str, Any] | str) -> tuple[Job, int]:
        """The first job of a row, and how many images it asks for."""
        if isinstance(said, Job):
            return said, self._count
        if isinstance(said, str):
            raise ValueError(said)
        if not said.keys() & set(TEXT):
            raise ValueError(f"needs {COLUMN}; it has {', '.join(said) or 'nothing'}")
        count = checks.at_least_one("count", self._count if said.get("count") is None else said["count"])
        used = next((name for name in TEXT if said.get(name) not in (None, "")), TEXT[0])
        own: dict[str, Any] = {name: said[name] for name in ALLOWED if name != TEXT[0] and said.get(name) is not None}
        known = (*ALLOWED, "count", used)
        others = {name: value for name, value in said.items() if value is not None and name not in known}
        given: dict[str, Any] = {"id": f"{number:04d}", "seed": self.seed + number, "prompt": said.get(used)} | own
        return Job(**given, more=self._others(others) or None), count

    def _refuse(self, where: str, said: str) -> None:
        """Leave a row out, or note it for `_raise`; once for all its images."""
        if where == self._last:
            return
        self._last = where
        if self._faults.on_error == "skip":
            self._faults(f"{self.name}, {where}: {said}")
            return
        self._refused += 1
        if len(self._wrong) < WRONG:
            self._wrong.append(f"{where}: {said}")

    def _raise(self) -> None:
        """Raise what was noted about wrong rows, the first WRONG of them by their places."""
        if self._refused:
            count = ", " if self._refused == 1 else f": {self._refused} rows are wrong: "
            more = f"; and {self._refused - WRONG} more" if self._refused > WRONG else ""
            self._faults(f"{self.name}{count}{'; '.join(self._wrong)}{more}")

    def _repeats(self, again: frozenset[int], key: Callable[[Job], Any]) -> Iterator[tuple[str, Job, str, Job]]:
        """Yield the jobs at these positions as (its place, job, place of the first job with the same key, that job)."""
        keys = {key(job) for position, _, job in self._jobs() if position in again}
        earlier: dict[Any, tuple[str, Job]] = {}
        for position, where, job in self._jobs():
            if key(job) in keys:
                first = earlier.setdefault(key(job), (where, job))
                if position in again:
                    yield where, job, *first

    def _refuse_repeated(self, again: frozenset[int]) -> None:
        for where, job, earlier, _ in self._repeats(again, lambda job: job.id.casefold()):
            self._refuse(where, f"id {job.id!r} is already used in {earlier}")

    def _said_twice(self, same: frozenset[int]) -> str:
        """Return the warning about jobs that ask for the same image as an earlier job. It names NAMED of them."""
        shown = self._repeats(frozenset(sorted(same)[:NAMED]), _image)
        pairs = ", ".join(f"{job.id} as {first.id}" for _, job, _, first in shown)
        asked = f"{len(same)} of {self.count} images are asked for twice, by the same prompt, seed and settings"
        more = ", ..." if len(same) > NAMED else ""
        return f"{self.name}: {asked} ({pairs}{more}): each is made all the same; give them other seeds"


def _image(job: Job) -> tuple:
    """Return all that decides a job's image."""
    return job.prompt, job.seed, job.negative_prompt, job.kind


def _later(digests: array, positions: array) -> frozenset[int]:
    """Return the positions of the digests that also come earlier."""
    _, earliest = np.unique(np.frombuffer(digests, np.uint64), return_index=True)
    return frozenset(np.delete(np.frombuffer(positions, np.uint64), earliest).tolist())


class Others:
    """Makes manifest fields of the prompts' other columns: values that JSON can write, of one kind per column.

    left_out: the columns that are left out because a manifest line uses their names for facts about its image.
    """

    def __init__(self) -> None:
        self.left_out: set[str] = set()
        self._kinds: dict[str, str] = {}

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        self.left_out |= row.keys() & MANIFEST - set(IMAGE)
        return {name: self._value(name, value) for name, value in row.items() if name not in MANIFEST}

    def _value(self, name: str, value: Any) -> Any:
        """Return a value for JSON: as text once its column has had values of several kinds, which no Parquet file holds."""
        value = value if isinstance(value, str | int | float) else json.loads(json.dumps(value, default=str))
        if value == [] and self._kinds.get(name, "list").startswith("list"):  # an empty list fits lists of any kind
            return value
        kind = _kind(value)
        if kind is None or self._kinds.setdefault(name, kind) != kind:
            self._kinds[name] = "text"
        return value if kind == self._kinds[name] else json.dumps(value)


def _kind(value: Any) -> str | None:
    """Return the kind of a value, or of a list whose values have one kind; None if no column of a table may hold it."""
    if isinstance(value, list):
        kinds = {_kind(one) for one in value}
        kind = kinds.pop() if len(kinds) == 1 else None
        return kind and f"list, {kind}"
    if isinstance(value, int) and not isinstance(value, bool):
        return "number" if -(2**63) <= value < 2**63 else None
    return {str: "text", bool: "truth", float: "number"}.get(type(value))


def read_prompts(path: str | Path, seed: int = 0, on_error: str = "stop", count: int = 1) -> list[Job]:
    """All jobs of a source that fits into memory; see `Prompts`."""
    return [job for _, job in Prompts(path, seed, on_error, count)]


def _listed(jobs: Sequence[Job | str]) -> Rows:
    return (Row(f"job {number}", {"prompt": job} if isinstance(job, str) else job) for number, job in enumerate(jobs, 1))
