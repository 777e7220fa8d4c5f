"""Time in-flight batching beside static batches and a loop over diffusers' pipeline, on mixed and on uniform work.

Also measured are a run's costs beside its network: time for a sample, peak memory, how busy the network is, how Ray's workers
scale. The samples of a static batch begin together, and the next batch begins when all are done. A "shrinking" batch drops
finished samples once they are half of it. The stand-in's network waits for a fixed time in every call, as a GPU that is not
full does; there the number of calls decides, and this number has no noise.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from basinescape import At, Guard, Guidance, Sampler
from basinescape.bulk.generate import generate
from basinescape.bulk.job_plans import Plans
from basinescape.bulk.settings import Files, Placement, Recipe
from basinescape.bulk.stop import Stop
from basinescape.data.prompts import Job, Prompts
from basinescape.guidance.guard import Attempt
from basinescape.models import PromptedNetwork
from basinescape.sampling.attempt_table import AttemptTable
from basinescape.sampling.engine import Engine
from basinescape.sampling.samples import Sample
from basinescape.schedulers.schedule import make_scheduler
from torch import Tensor

from ..tables import Row
from .command import BATCH as SLOTS
from .command import command, looped, prompt
from .shapes import pipeline
from .standin import stand_in
from .timing import fitting, interleaved, rated, seconds, summary, within_memory

SCALE = 7.5
LOOP = "diffusers, plain guidance"
SECONDS = 0.01  # of a call of the stand-in's network
ROUNDS = {"cpu": 3, "cuda": 5, "quick": 3}
MEMORY = {"cpu": (1_000, 10_000, 100_000), "cuda": (1_000, 10_000), "quick": (1_000,)}  # prompts
# (jobs, most steps of a job): the comparisons of in-flight batching, `command`, `overhead`, `busy`.
STAND_IN, TINY, COMMAND, OVERHEAD, BUSY = (128, 50), (48, 20), (48, 20), (128, 30), (96, 50)
JUDGED = 16  # images whose basin scores set the guard's limit


def guarded(limit: float) -> Guard:
    """A guard whose attempts pass if their basin scores are at most `limit`; the last attempt always passes."""
    guidances = (
        Guidance.cfg(SCALE),
        Guidance.delayed(SCALE, until=At(900), before=2.0),
        Guidance.opposite(1.0, SCALE, At(300)),
    )
    limits = zip(guidances, (limit, limit, sys.float_info.max), strict=True)
    return Guard(tuple(Attempt(one, threshold) for one, threshold in limits))


Work = Sequence[tuple[int, Guidance | Guard]]  # (steps, guidance) of every job


def works(sampler: Sampler, jobs: int, most: int) -> dict[str, Work]:
    """{kind: work}. most: the largest number of steps."""
    plain, middle, rng = Guidance.cfg(SCALE), 3 * most // 5, torch.Generator().manual_seed(0)
    counts = torch.randint(most // 5, most + 1, (jobs,), generator=rng).tolist()
    scores = []
    for i in range(JUDGED):
        out = sampler([prompt(i)], [i], middle, plain, output="latent", progress=False)
        scores.append(sampler.judge(out.latents, prompt(i), i).score.item())
    scores.sort()
    guard, again = guarded(scores[3 * len(scores) // 4]), Guidance.cfg(SCALE, restart=(300, 600, 2))
    return {
        "uniform": [(middle, plain)] * jobs,
        f"{most // 5} to {most} steps": [(count, plain) for count in counts],
        "guard, a quarter begins again": [(middle, guard)] * jobs,
        "all of these, and restarts": [
            ((counts[i], plain), (middle, guard), (middle, again), (middle, plain))[i % 4] for i in range(jobs)
        ],
    }


class Case:
    """One sampler, the prompts of `jobs` jobs, encoded, and the peers that sample them."""

    def __init__(self, sampler: Sampler, jobs: int):
        self.sampler, size = sampler, sampler.size()
        self.shape = sampler.model.shape(*size)
        self.attempt_tables: dict[tuple[int, Guidance | Guard], AttemptTable] = {}
        with torch.inference_mode():
            self.network = sampler.model.network(sampler.model.encode([prompt(i) for i in range(jobs)], *size))

    def samples(self, work: Work) -> list[Sample]:
        for kind in work:
            if kind not in self.attempt_tables:
                self.attempt_tables[kind] = AttemptTable.make(self.sampler.solver(kind[0]), kind[1], self.sampler.model.device)
        return [Sample(i, self.attempt_tables[kind], self.shape, self.network, i, seed=i) for i, kind in enumerate(work)]

    @torch.inference_mode()
    def in_flight(self, work: Work) -> dict[int, Tensor]:
        """The latents of every job."""
        engine = Engine(self.sampler.runner.open_batch, SLOTS, fixed=True)
        return {made.sample.key: made.latents for made in engine.run(self.samples(work))}

    @torch.inference_mode()
    def static(self, work: Work, shrinking: bool) -> dict[int, Tensor]:
        samples = self.samples(work)
        groups = [samples[i : i + SLOTS] for i in range(0, len(samples), SLOTS)]
        engines = [(Engine(self.sampler.runner.open_batch, len(group), fixed=not shrinking), group) for group in groups]
        return {made.sample.key: made.latents for engine, group in engines for made in engine.run(group)}

    def plain(self, work: Work) -> dict[int, Tensor]:
        """The latents by diffusers' pipeline, under plain guidance only. Jobs with the same number of steps share a batch."""
        alike = sorted(((i, steps) for i, (steps, _) in enumerate(work)), key=itemgetter(1))
        return dict(looped(self.sampler.pipe, alike, SCALE, output_type="latent"))

    def peers(self, work: Work, loop: bool) -> dict[str, Callable[[], dict[int, Tensor]]]:
        """{name: call}. loop: include the loop over diffusers' pipeline."""
        found: dict[str, Callable[[], dict[int, Tensor]]] = {
            "static batches": partial(self.static, work, False),
            "static batches, shrinking": partial(self.static, work, True),
            "in-flight": partial(self.in_flight, work),
        }
        return found | ({LOOP: partial(self.plain, work)} if loop else {})


def engine(device: torch.device, preset: str) -> Iterator[Row]:
    """Rows in images a second, with the stand-in's network calls; then overhead, the network's share, Ray's scaling, memory."""
    pipe = pipeline("tiny", torch.float32, device)
    pipe.scheduler = make_scheduler("dpmsolver++", pipe.scheduler)
    waiting, real = stand_in(pipe, seconds=SECONDS), Sampler.from_pipeline(pipe)
    for name, sampler, (jobs, most) in (("stand-in", waiting, STAND_IN), ("tiny", real, TINY)):
        case = Case(sampler, jobs)
        for kind, work in works(sampler, jobs, most).items():
            what = {"bench": "engine", "what": f"{name}, {kind}"}
            yield from within_memory(what, partial(_compared, what, case, work, sampler is real, device, ROUNDS[preset]))
    yield from within_memory({"bench": "engine, command"}, partial(command, device, ROUNDS[preset], *COMMAND))
    time_of, share_of = {"bench": "engine", "what": "time a sample"}, {"bench": "engine", "what": "share of the network"}
    yield from within_memory(time_of, lambda: [overhead(stand_in(pipe), device, ROUNDS[preset], *OVERHEAD)])
    yield from within_memory(share_of, lambda: [busy(real, 2 * SLOTS, *BUSY)])
    yield from scaling()
    for count in MEMORY[preset]:
        yield memory(count)


def _compared(what: Row, case: Case, work: Work, loop: bool, device: torch.device, rounds: int) -> Iterator[Row]:
    peers, counts = case.peers(work, loop), {}

    def counted(peer: str) -> dict[int, Tensor]:
        before = getattr(case.sampler.model, "calls", 0)
        made = peers[peer]()
        counts[peer] = getattr(case.sampler.model, "calls", 0) - before
        return made

    made = fitting({peer: partial(counted, peer) for peer in peers})
    plain = all(guidance == Guidance.cfg(SCALE) for _, guidance in work)
    agree(*(latents for peer, latents in made.items() if peer != LOOP or plain))
    times = interleaved({peer: peers[peer] for peer in made}, device, rounds)
    for row in rated(what, peers, len(work), times, "static batches"):
        yield {**row, "calls": counts.get(row["peer"]) or None}


def agree(*made: dict[int, Tensor]) -> None:
    """Raises RuntimeError unless all have made the same latents."""
    for other in made[1:]:
        apart = max(((other[i] - x).norm() / x.norm()).item() for i, x in made[0].items())
        if made[0].keys() != other.keys() or not apart <= 1e-3:
            raise RuntimeError(f"the peers' latents are {apart:.2g} of their norm apart: they are not compared")


def overhead(sampler: Sampler, device: torch.device, rounds: int, jobs: int, steps: int) -> Row:
    """The row of the time for a sample outside its network, which returns at once."""
    call = partial(Case(sampler, jobs).in_flight, [(steps, Guidance.cfg(SCALE))] * jobs)
    call()
    times = [seconds(call, device) for _ in range(rounds)]
    what = f"stand-in that does not wait, {SLOTS} slots, {steps} steps"
    row = summary([1e3 * t / jobs for t in times], None)
    return {"bench": "engine", "what": what, "peer": "in-flight", "unit": "ms a sample", **row}


def scaling(workers: Sequence[int] = (1, 2, 4), steps: int = 10) -> Iterator[Row]:
    """Images a second of a local Ray's workers, with a stand-in each, on CPUs; nothing where Ray is not installed."""
    if find_spec("ray") is None:
        return
    import ray
    from basinescape.bulk.ray import ROUNDS as blocks
    from basinescape.bulk.ray import RayExecutor

    ray.init(num_cpus=max(workers), num_gpus=0, include_dashboard=False, log_to_driver=False)
    jobs = [(i, Job(f"{i}", prompt(i), i)) for i in range(2 * max(workers) * blocks * SLOTS)]
    rates: list[float] = []
    for count in workers:
        run = RayExecutor(
            Plans(worker(), Recipe(Guidance.cfg(SCALE), steps), "tiny"), SLOTS, Files(), Placement(SLOTS, worker, count)
        )
        sum(1 for _ in run.made(iter(jobs[: count * blocks * SLOTS]), Stop()))  # starts every worker
        start = time.perf_counter()
        rates.append(sum(1 for _ in run.made(iter(jobs), Stop())) / (time.perf_counter() - start))
        run.close()
        what = {"bench": "engine", "what": f"stand-in, Ray, workers: {count}", "peer": "in-flight", "unit": "images/s"}
        yield {**what, "median": rates[-1], "ratio": rates[-1] / rates[0]}
    ray.shutdown()


def worker() -> Sampler:
    """The sampler of one of Ray's workers."""
    torch.set_num_threads(1)
    return stand_in(pipeline("tiny", torch.float32, torch.device("cpu")), seconds=SECONDS)


def busy(sampler: Sampler, slots: int, jobs: int, steps: int) -> Row:
    """The row of the share of a whole run's time, from prompts to PNG, in which the small pipeline's network runs."""
    network, spent = sampler.model.network, [0.0]

    def timed(*given: Any, **named: Any) -> PromptedNetwork:
        made = network(*given, **named)
        for name in ("net", "both"):
            setattr(made, name, _clocked(getattr(made, name), spent))
        return made

    work, recipe = [Job(f"{i}", prompt(i), i) for i in range(jobs)], Recipe(Guidance.cfg(SCALE), steps)
    with tempfile.TemporaryDirectory() as folder, patch.object(sampler.model, "network", timed):
        start = time.perf_counter()
        generate(sampler, work, folder, recipe, "tiny", placement=Placement(slots), progress=False)
        share = spent[0] / (time.perf_counter() - start)
    what = {"bench": "engine", "what": f"tiny, batch {slots}, prompts to PNG", "peer": "in-flight"}
    return {**what, "unit": "busy", "median": share}


def _clocked(call: Callable[..., object], spent: list[float]) -> Callable[..., object]:
    def clocked(*given: object, **named: object) -> object:
        start = time.perf_counter()
        made = call(*given, **named)
        spent[0] += time.perf_counter() - start
        return made

    return clocked


def memory(count: int) -> Row:
    """The row of the peak memory of a process that makes `count` images with the stand-in and writes them as Parquet."""
    done = subprocess.run([sys.executable, "-m", __name__, str(count)], capture_output=True, text=True, check=True)
    what = {"bench": "engine", "what": f"stand-in, {count:,} prompts", "peer": "in-flight"}
    return {**what, "unit": "MB at most", "median": float(done.stdout.split()[-1])}


def _measured(count: int) -> float:
    import resource

    torch.set_num_threads(1)
    sampler = stand_in(pipeline("tiny", torch.float32, torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        with prompts.open("w") as file:
            file.writelines(f'{{"prompt": "a picture of a cat {i}"}}\n' for i in range(count))
        recipe, files = Recipe(Guidance.cfg(SCALE), 1), Files("parquet")
        out = Path(folder) / "out"
        summary = generate(sampler, Prompts(prompts), out, recipe, "tiny", files, Placement(16), progress=False)
        if summary.done != count:
            raise RuntimeError(f"{summary.done} of {count} images were made")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(_measured(int(sys.argv[1])))
