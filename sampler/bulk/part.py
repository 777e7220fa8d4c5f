"""Which jobs of a run are this process's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..data.prompts import Job, Prompts
from ..runs.atomic import whole
from ..runs.jsontext import json_bytes
from ..runs.manifest import JOBS, belongs, read_jobs


class Part:
    """What is to be done of the jobs of a run: all of them, or shard (i, n), as (position, job).

    fault: what broke the source of the jobs, None where nothing did. Those before it are done all the same.
    """

    def __init__(self, prompts: Prompts, shard: tuple[int, int] | None):
        self.prompts, self.shard, self.fault = prompts, shard, None
        self.count = len(prompts) if shard is None else sum(1 for _ in self)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, Job]]:
        return ((position, job) for position, job in self._asked() if belongs(position, self.shard))

    def _asked(self) -> Iterator[tuple[int, Job]]:
        try:
            yield from self.prompts
        except Exception as error:  # whatever a source raises: nobody can list it
            self.fault = error

    def record(self, out: Path) -> None:
        """Write the ids of all jobs of the run into its folder, so that what is missing there can be named."""
        if sum(1 for _ in read_jobs(out)) == len(self.prompts):
            return
        with whole(out / JOBS) as part, part.open("wb") as file:
            for position, job in self._asked():
                file.write(json_bytes({"position": position, "id": job.id}) + b"\n")
