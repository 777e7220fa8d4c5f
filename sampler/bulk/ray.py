"""The same run on every GPU of a Ray cluster: workers make pictures, this process reads the prompts and writes the folder.

Blocks of jobs go to the workers and come back as files, in order; few are under way at a time, so that nothing holds them all.
Ray replaces a worker that dies, and its block is made again. What is done is known from the manifest, as without Ray.

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

ROUNDS = 8  # times the slots of an engine: the jobs of a block, fewer where some workers would have none
AHEAD = 2  # blocks a worker: one that it makes, one that waits for it
LOOK = 0.5  # seconds of a look at whether a block is done
RETRIES = 3  # times that a block is made again whose worker died


def cluster(workers: int | None = None) -> tuple[int, bool]:
    """(the number of workers, whether each has a GPU) of the cluster that RAY_ADDRESS names, or of this machine.

    workers: default one a GPU, or one where there is none. Raises ImportError without ray, ValueError for more workers than
    the cluster has GPUs, or CPUs where it has no GPU.
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
    """A sampler and its engine. threads: for what runs on a CPU, whose last bits depend on their number.

    options: of every call of the sampler.
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
        """What comes of a block of jobs, in the order of their positions, and the network calls that it took."""
        before = Counter(self.executor.calls)
        made = sorted(self.executor.made(jobs, Stop()), key=lambda one: one.position)
        return made, self.executor.calls - before


class RayExecutor:
    """An `Executor` by workers, each of which calls `placement.load` for its sampler.

    Raises RuntimeError where a worker cannot load it.
    """

    def __init__(self, plans: Plans, slots: int, files: Files, placement: Placement):
        import ray

        count, gpu = cluster(placement.workers)
        resources = {"num_gpus": 1} if gpu else {"num_cpus": 1}
        actor = ray.remote(**resources, max_restarts=-1, max_task_retries=RETRIES)(Worker)
        here = replace(files, signer=None, duplicates=None)  # the rest is this process's work
        given = torch.get_num_threads(), placement.load, plans.sampler.options, plans.recipe, plans.model, slots, here
        self.workers = [actor.remote(*given) for _ in range(count)]
        self.slots, self.calls = slots, Counter[str]()
        try:
            ray.get([worker.ready.remote() for worker in self.workers])
        except ray.exceptions.RayError as error:
            self.close()
            raise RuntimeError(f"a worker of the cluster cannot begin: {_last(error)}") from error

    def made(self, jobs: Iterable[Placed], stop: Stop, stepped: Stepped = unwatched) -> Iterator[Made]:
        """What comes of the jobs, block by block; what is not finite is made again by the worker that had it.

        `stepped` is told nothing: the steps are taken elsewhere.
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
                pass  # Ctrl-C is heard between two looks, and not in one that has no end
            made, calls = ray.get(reference)
        except ray.exceptions.RayError as error:
            said = f"failed: its worker: {_last(error)}"
            return [Made(position, job.asked() | {"status": said}) for position, job in block]
        self.calls += calls
        return made

    def close(self) -> None:
        """Give the workers back."""
        import ray

        for worker in self.workers:
            ray.kill(worker)


def _last(error: Exception) -> str:
    """The end of what Ray says, which is longer the more machines there are: the error itself, after its traceback."""
    return str(error).strip().splitlines()[-1][:200]
