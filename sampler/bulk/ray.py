"""The same run on every GPU of a Ray cluster: actors hold the engine, this process reads the prompts and writes the folder.

Blocks of jobs go to the actors and come back as files, in order; few are under way at a time, so that nothing holds them all. A
worker that dies is replaced and its block made again, by Ray. What is done is known from the manifest, as without Ray.

These are actors and not Ray Data's `map_batches`: what that adds, reading and writing in blocks, this process has already for
all of its sources and formats, and it needs pandas and pyarrow on every machine.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from ..data.encoding import Made
from ..sampler import Sampler
from .executor import LocalExecutor
from .part import Placed
from .plans import Plans
from .settings import Files, Placement, Recipe
from .stop import Stop

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
    """An actor: a sampler and its engine. threads: for what runs on a CPU, whose last bits depend on their number.

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

    def make(self, jobs: list[Placed]) -> tuple[list[Made], Counter[str]]:
        """What comes of a block of jobs, in the order of their positions, and the network calls that it took."""
        before = Counter(self.executor.calls)
        made = sorted(self.executor.made(jobs, Stop()), key=lambda one: one.position)
        return made, self.executor.calls - before


class RayExecutor:
    """An `Executor` by workers, each of which calls `placement.load` for its sampler."""

    def __init__(self, plans: Plans, slots: int, files: Files, placement: Placement):
        import ray

        count, gpu = cluster(placement.workers)
        resources = {"num_gpus": 1} if gpu else {"num_cpus": 1}
        actor = ray.remote(**resources, max_restarts=-1, max_task_retries=RETRIES)(Worker)
        here = replace(files, signer=None, duplicates=None)  # the rest is this process's work
        given = torch.get_num_threads(), placement.load, plans.sampler.options, plans.recipe, plans.model, slots, here
        self.workers = [actor.remote(*given) for _ in range(count)]
        self.block, self.calls = ROUNDS * slots, Counter[str]()
        self.stepped: Callable[[float], None] = lambda under_way: None  # nobody tells of steps taken elsewhere

    def made(self, jobs: Iterable[Placed], stop: Stop) -> Iterator[Made]:
        """What comes of the jobs, block by block; what is not finite is made again by the worker that had it."""
        jobs, turn = stop.until(jobs), 0
        under_way: deque[tuple[Any, list[Placed]]] = deque()
        while True:
            while len(under_way) < AHEAD * len(self.workers) and (block := list(islice(jobs, self.block))):
                under_way.append((self.workers[turn % len(self.workers)].make.remote(block), block))
                turn += 1
            if not under_way:
                return
            yield from self._made(*under_way.popleft())

    def _made(self, reference: Any, block: list[Placed]) -> list[Made]:
        import ray

        try:
            made, calls = ray.get(reference)
        except ray.exceptions.RayError as error:
            said = f"failed: its worker: {' '.join(str(error).split())[:200]}"
            return [Made(position, job.asked() | {"status": said}) for position, job in block]
        self.calls += calls
        return made

    def close(self) -> None:
        """Give the workers back."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
