"""The same run on every GPU of a Ray cluster: actors hold the engine, this process reads the prompts and writes the folder.

Blocks of jobs go to the actors and come back as files, in order; few are under way at a time, so that nothing holds them all. A
worker that dies is replaced and its block made again, by Ray. What is done is known from the manifest, as without Ray.

These are actors and not Ray Data's `map_batches`: what that adds, reading and writing in blocks, this process has already for
all of its sources and formats, and it needs pandas and pyarrow on every machine.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from ..data.prompts import Job
from ..data.encoding import Made
from ..guidance.guard import Guard
from ..guidance.guidance import Guidance
from ..sampler import Sampler
from .generate import Ladders, Run, Stop
from .stages import Request

ROUNDS = 8  # times the slots of an engine: the jobs of a block
AHEAD = 2  # blocks an actor: one that it makes, one that waits for it
RETRIES = 3  # times that a block is made again whose worker died


def cluster(workers: int | None = None) -> tuple[int, bool]:
    """(the number of workers, whether each has a GPU) of the cluster that RAY_ADDRESS names, or of this machine.

    workers: default one a GPU, or one where there is none. Raises ImportError without ray.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine 'ray' needs the package ray: pip install 'basinescape[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return workers or gpus or 1, gpus > 0


class Worker:
    """An actor: a sampler and its engine. threads: for what runs on a CPU, whose last bits depend on their number."""

    def __init__(
        self,
        threads: int,
        load: Callable[[], Sampler],
        pixels: dict[str, Any],
        steps: int,
        guidance: Guidance | Guard,
        slots: int,
        format: str,
    ):
        torch.set_num_threads(threads)
        sampler = load().using(**pixels)
        self.run = Run(sampler, Ladders(sampler, steps, guidance), slots, format)

    def make(self, jobs: list[tuple[int, Job]]) -> tuple[list[Made], Counter[str]]:
        """What comes of a block of jobs, in order, and the network calls that it took."""
        before, again = Counter(self.run.calls), []
        made = list(self.run.made(jobs, Stop(), again.append if self.run.sampler.model.half else None))
        made += self.run.in_float32(again, Stop())
        return sorted(made, key=lambda one: one.position), self.run.calls - before


class RayRun:
    """A `Run` by workers, each of which calls `load` for its sampler.

    pixels: size and options, as `Sampler.using` takes them. The rest as for `Run`.
    """

    def __init__(
        self,
        load: Callable[[], Sampler],
        workers: int | None,
        pixels: dict[str, Any],
        steps: int,
        guidance: Guidance | Guard,
        slots: int,
        format: str,
    ):
        import ray

        count, gpu = cluster(workers)
        options = {"num_gpus": 1} if gpu else {"num_cpus": 1}
        actor = ray.remote(**options, max_restarts=-1, max_task_retries=RETRIES)(Worker)
        given = torch.get_num_threads(), load, pixels, steps, guidance, slots, format
        self.workers = [actor.remote(*given) for _ in range(count)]
        self.block, self.calls = ROUNDS * slots, Counter()

    def made(self, jobs: Iterable[tuple[int, Job]], stop: Stop, again: Any = None) -> Iterator[Made]:
        """What comes of the jobs, in their order; what is not finite is made again by the worker that had it."""
        jobs, under_way, turn = stop.until(jobs), deque(), 0
        while True:
            while len(under_way) < AHEAD * len(self.workers) and (block := list(islice(jobs, self.block))):
                under_way.append((self.workers[turn % len(self.workers)].make.remote(block), block))
                turn += 1
            if not under_way:
                return
            yield from self._made(*under_way.popleft())

    def _made(self, reference: Any, block: list[tuple[int, Job]]) -> list[Made]:
        import ray

        try:
            made, calls = ray.get(reference)
        except ray.exceptions.RayError as error:
            said = f"failed: its worker: {' '.join(str(error).split())[:200]}"
            return [Made(position, Request(position, job).asked() | {"status": said}) for position, job in block]
        self.calls += calls
        return made

    def in_float32(self, jobs: Any, stop: Stop) -> Iterator[Made]:
        return iter(())

    def close(self) -> None:
        """Give the workers back."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
