"""The same run on every GPU of a Ray cluster: workers make pictures, this process reads the prompts and writes the folder.

Blocks of jobs go to the workers, and their files come back in the order of the blocks. Few blocks are under way at a time, so
that memory never holds all. If a worker dies, Ray replaces it and makes its block again. The manifest says what is done.

Workers are Ray's actors. Ray Data's `map_batches` would add reading and writing in blocks, which this process does for all
sources and formats, and needs pandas and pyarrow on every machine.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch

from ..data.image_encoding import Made
from ..runs.environment import library
from ..sampler import Sampler
from .executor import LocalExecutor, Stepped, unwatched
from .job_order import Placed
from .job_plans import Plans
from .settings import Files, Placement, Recipe
from .stop import Stop

ROUNDS = 8  # a block has this many jobs per slot of an engine, fewer if some workers would get none
AHEAD = 2  # blocks per worker: one in the making, one in its queue
LOOK = 0.5  # seconds between two polls for a finished block
RETRIES = 3  # times that a block is made again after its worker died


def cluster(workers: int | None = None) -> tuple[int, bool]:
    """Return (the number of workers, whether each has a GPU) for the cluster that RAY_ADDRESS names, or for this machine.

    workers: None: one per GPU, or a single one without GPUs. Raises ImportError without ray, ValueError for more workers than
    the cluster has GPUs, or CPUs if it has no GPU.
    """
    ray = library("ray", "engine 'ray' needs", install="'basinescape[ray]'")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    if workers is not None and workers > (gpus or cpus):
        raise ValueError(
            f"workers is {workers}, and the cluster has {gpus or cpus} {'GPUs' if gpus else 'CPUs'}: ask for fewer"
        )
    return workers or gpus or 1, gpus > 0


class Worker:
    """A sampler and its engine, as a Ray actor. threads: torch's threads, whose number decides the last bits of CPU work.

    options: for every call of the sampler.
    """

    def __init__(
        self,
        threads: int,
        load: Callable[[], Sampler],
        options: dict[str, Any],
        recipe: Recipe,
        model: str,
        slots: int,
        files: Files,
    ):
        torch.set_num_threads(threads)
        sampler = load().using(recipe.height, recipe.width, **options)
        self.executor = LocalExecutor(Plans(sampler, recipe, model), slots, files)

    def ready(self) -> None:
        """Returns once the sampler is loaded."""

    def make(self, jobs: list[Placed]) -> tuple[list[Made], Counter[str]]:
        """Return what came of a block of jobs, in the order of their positions, and the network calls that it took."""
        before = Counter(self.executor.calls)
        made = sorted(self.executor.made(jobs, Stop()), key=lambda one: one.position)
        return made, self.executor.calls - before


class RayExecutor:
    """An `Executor` on Ray workers. Each of them calls `placement.load` to load its sampler.

    Raises RuntimeError if a worker cannot load it.
    """

    def __init__(self, plans: Plans, slots: int, files: Files, placement: Placement):
        import ray

        count, gpu = cluster(placement.workers)
        resources = {"num_gpus": 1} if gpu else {"num_cpus": 1}
        actor = ray.remote(**resources, max_restarts=-1, max_task_retries=RETRIES)(Worker)
        here = replace(files, signer=None, duplicates=None)  # this process signs and finds duplicates
        given = torch.get_num_threads(), placement.load, plans.sampler.options, plans.recipe, plans.model, slots, here
        self.workers = [actor.remote(*given) for _ in range(count)]
        self.slots, self.calls = slots, Counter[str]()
        try:
            ray.get([worker.ready.remote() for worker in self.workers])
        except ray.exceptions.RayError as error:
            self.close()
            raise RuntimeError(f"a worker of the cluster cannot begin: {_last(error)}") from error

    def made(self, jobs: Iterable[Placed], stop: Stop, stepped: Stepped = unwatched) -> Iterator[Made]:
        """Yield what came of the jobs, block by block. The worker of a block makes again what is not finite.

        `stepped` is never called, because the workers take the steps.
        """
        jobs, turn, count = stop.until(jobs), 0, len(self.workers)
        first = list(islice(jobs, ROUNDS * self.slots * count))
        block = math.ceil(len(first) / count / self.slots) * self.slots  # jobs for each worker, in full rounds
        jobs, under_way = chain(first, jobs), deque[tuple[Any, list[Placed]]]()
        while True:
            while len(under_way) < AHEAD * count and (some := list(islice(jobs, block))):
                under_way.append((self.workers[turn % count].make.remote(some), some))
                turn += 1
            if not under_way:
                return
            yield from self._made(*under_way.popleft())

    def _made(self, reference: Any, block: list[Placed]) -> list[Made]:
        import ray

        try:
            while not ray.wait([reference], timeout=LOOK)[0]:
                pass  # Ctrl-C takes effect only between two polls, so each has a timeout
            made, calls = ray.get(reference)
        except ray.exceptions.RayError as error:
            said = f"failed: its worker: {_last(error)}"
            return [Made(position, job.asked() | {"status": said}) for position, job in block]
        self.calls += calls
        return made

    def close(self) -> None:
        """End the workers."""
        import ray

        for worker in self.workers:
            ray.kill(worker)


def _last(error: Exception) -> str:
    """Return the last line of Ray's message, at most 200 characters: the error itself, without the long traceback before it."""
    return str(error).strip().splitlines()[-1][:200]
