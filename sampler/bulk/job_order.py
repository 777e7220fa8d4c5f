"""Selects and orders the jobs of a run that are made here, and checks that a folder's earlier jobs are still the first ones."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ..data.prompts import Job, Kind, Prompts
from ..runs.atomic import atomic_write
from ..runs.jsontext import json_bytes
from ..runs.manifest import JOBS, belongs, job_lines, read_jobs

WINDOW = 1024  # jobs that are sorted together, and so are in memory
END = 4  # times the slots: the number of last jobs that are begun longest first
Placed = tuple[int, Job]  # a job and its position in the run


class JobShare:
    """The jobs to make here: all jobs of a run, or those of shard (i, n).

    fault: the exception that ended the source of the jobs, or None. The jobs before it are yielded all the same.
    """

    def __init__(self, prompts: Prompts, shard: tuple[int, int] | None):
        self.prompts, self.shard = prompts, shard
        self.fault: Exception | None = None
        self.count = len(prompts) if shard is None else sum(belongs(position, shard) for position, _ in self._asked())

    def __len__(self) -> int:
        return self.count

    def recorded(self, out: Path) -> Iterator[Placed]:
        """Yield the jobs that `record` has written into the folder. A job that the source no longer has is a fault."""
        asked = self._asked()
        for line in job_lines(out):
            placed = next(asked, None)
            if placed is None or line != _line(*placed):
                self.fault = self.fault or ValueError(
                    f"{self.prompts.name} was changed during the run, and {line['id']!r} is not there as it was: the images "
                    "before it are kept; undo the change and start the run again, or choose another folder"
                )
                return
            if belongs(placed[0], self.shard):
                yield placed

    def _asked(self) -> Iterator[Placed]:
        try:
            yield from self.prompts
        except Exception as error:  # a source may raise anything
            self.fault = error

    def record(self, out: Path) -> None:
        """Write all jobs of the run into its folder, so that missing or changed images can be named later."""
        if sum(1 for _ in read_jobs(out)) == len(self.prompts):
            return
        with atomic_write(out / JOBS) as part, part.open("wb") as file:
            for position, job in self._asked():
                file.write(json_bytes(_line(position, job)) + b"\n")


def by_size(jobs: Iterable[Placed], size: Callable[[Kind], tuple[int, int]]) -> Iterator[Placed]:
    """Yield the jobs, grouped by size in every WINDOW, because a batch has one size and runs empty before the next size.

    Each window begins with the size that the window before ended with.
    """
    jobs, last = iter(jobs), None
    while some := list(islice(jobs, WINDOW)):
        groups: dict[tuple[int, int] | None, list[Placed]] = {last: []}
        for placed in some:
            groups.setdefault(size(placed[1].kind), []).append(placed)
        for last, group in groups.items():  # noqa: B007 (the last of them stays open)
            yield from group


def longest_first(
    jobs: Iterable[Placed], slots: int, size: Callable[[Kind], tuple[int, int]], calls: Callable[[Kind], int]
) -> Iterator[Placed]:
    """Yield the jobs. The last ones of each size come by falling cost (`calls`), so that all slots run empty together."""
    ahead: deque[Placed] = deque()
    for placed in jobs:
        ahead.append(placed)
        if len(ahead) > END * slots:
            yield ahead.popleft()
    for _, group in groupby(ahead, key=lambda placed: size(placed[1].kind)):
        yield from sorted(group, key=lambda placed: -calls(placed[1].kind))


def grown(out: Path, known: Mapping[str, Any], prompts: Prompts) -> None:
    """Raises ValueError unless the jobs of a folder are the first of these prompts, unchanged. known: the folder's run.json."""
    if sum(1 for _ in read_jobs(out)) < known["prompts"]:
        raise ValueError(
            f"{str(out)!r} holds a run of other prompts, and its {JOBS}, which says which, is missing or cut off: start it "
            "with those once more, or choose another folder"
        )
    earlier = job_lines(out)
    for position, job in prompts:
        line = next(earlier, None)
        if line is None:
            return
        if line != (now := _line(position, job)):
            raise ValueError(f"{str(out)!r} holds another run: {_changed(line, now)}")
    if (line := next(earlier, None)) is not None:
        left = 1 + sum(1 for _ in earlier)
        raise ValueError(f"{str(out)!r} holds a run of {left} more images, {line['id']!r} the first: choose another folder")


def _line(position: int, job: Job) -> dict[str, Any]:
    """Return a job's line of `jobs.jsonl`, as JSON reads it back."""
    return json.loads(json_bytes({"position": position, **job.asked()}))


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the message about a job that differs from the folder's earlier one."""
    if before["id"] == now["id"]:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        what = ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)
        return f"{now['id']!r} was asked for with {what}: choose another folder, or add it under another id behind the others"
    return (
        f"image {before['position']} was {before['id']!r} ({before.get('prompt')!r}), now {now['id']!r} ({now['prompt']!r}): "
        "add new prompts behind the others"
    )
