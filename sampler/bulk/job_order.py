"""Which jobs of a run are to be made here, in which order, and whether a folder's earlier ones are still among them."""

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

WINDOW = 1024  # jobs that are put into order together, and so are in memory
END = 4  # times the slots: so many jobs at the end are begun longest first
Placed = tuple[int, Job]  # a job and its position in the run


class JobShare:
    """What is to be done of the jobs of a run: all of them, or shard (i, n), as (position, job).

    fault: what broke the source of the jobs, None where nothing did. Those before it are done all the same.
    """

    def __init__(self, prompts: Prompts, shard: tuple[int, int] | None):
        self.prompts, self.shard = prompts, shard
        self.fault: Exception | None = None
        self.count = len(prompts) if shard is None else sum(1 for _ in self)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Placed]:
        return ((position, job) for position, job in self._asked() if belongs(position, self.shard))

    def _asked(self) -> Iterator[Placed]:
        try:
            yield from self.prompts
        except Exception as error:  # whatever a source raises: nobody can list it
            self.fault = error

    def record(self, out: Path) -> None:
        """Write all jobs of the run into its folder, so that what is missing or changed there can be named."""
        if sum(1 for _ in read_jobs(out)) == len(self.prompts):
            return
        with atomic_write(out / JOBS) as part, part.open("wb") as file:
            for position, job in self._asked():
                file.write(json_bytes(_line(position, job)) + b"\n")


def by_size(jobs: Iterable[Placed], size: Callable[[Kind], tuple[int, int]]) -> Iterator[Placed]:
    """The jobs, those of one size together in every WINDOW: a batch has one size, and runs empty before the next.

    Each window begins with the size that the one before ended with.
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
    """The jobs; at the end those of one size by the network's calls that they take, so that all slots run empty together."""
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
        if line != (now := json.loads(json_bytes(_line(position, job)))):
            raise ValueError(f"{str(out)!r} holds another run: {_changed(line, now)}")
    if (line := next(earlier, None)) is not None:
        left = 1 + sum(1 for _ in earlier)
        raise ValueError(f"{str(out)!r} holds a run of {left} more images, {line['id']!r} the first: choose another folder")


def _line(position: int, job: Job) -> dict[str, Any]:
    return {"position": position, **job.asked()}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What to say of a job that is not what it was."""
    if before["id"] == now["id"]:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        what = ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)
        return f"{now['id']!r} was asked for with {what}: choose another folder, or add it under another id behind the others"
    return (
        f"image {before['position']} was {before['id']!r} ({before.get('prompt')!r}), now {now['id']!r} ({now['prompt']!r}): "
        "add new prompts behind the others"
    )
