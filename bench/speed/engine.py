"""In-flight batching beside static batches and a loop over diffusers' pipeline, on mixed work and on uniform work.

And what a run costs beside its network: time a sample, peak memory, how busy the network is, how far Ray's workers scale.
Static batches begin together, and the next one begins when all of one are done; "shrinking" ones leave out what is done once
half of them are. The stand-in's network waits for so long whatever its batch, as a GPU that is not full: there the number
of calls decides, which is a figure without noise.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from basinescape import At, Guard, Guidance, Sampler
from basinescape.bulk.generate import generate
from basinescape.bulk.plans import Plans
from basinescape.bulk.settings import Files, Placement, Recipe
from basinescape.bulk.stop import Stop
from basinescape.data.prompts import Job
from basinescape.guidance.guard import Attempt
from basinescape.sampling.engine import Engine
from basinescape.sampling.ladder import Ladder
from basinescape.sampling.samples import Sample
from basinescape.schedulers.schedule import make_scheduler
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ..tables import Row
from .command import command
from .shapes import pipeline
from .standin import stand_in
from .timing import interleaved, summary

SCALE = 7.5
SLOTS = 8
LOOP = "diffusers, plain guidance"
SECONDS = 0.01  # of a call of the stand-in's network
ROUNDS = {"cpu": 3, "cuda": 5, "quick": 3}
MEMORY = {"cpu": (1_000, 10_000, 100_000), "cuda": (1_000, 10_000), "quick": (1_000,)}  # prompts


def guarded(limit: float) -> Guard:
    """A guard whose attempts pass while their basin scores are at most `limit`, the last one in any case."""
    guidances = (
        Guidance.cfg(SCALE),
        Guidance.delayed(SCALE, until=At(900), before=2.0),
        Guidance.opposite(1.0, SCALE, At(300)),
    )
    limits = zip(guidances, (limit, limit, sys.float_info.max), strict=True)
    return Guard(tuple(Attempt(one, threshold) for one, threshold in limits))


def works(sampler: Sampler, jobs: int, most: int, prompts: Sequence[str]) -> dict[str, list[tuple[int, Guidance]]]:
    """(steps, guidance) of every job, by the kind of work. most: the largest number of steps."""
    plain, middle, rng = Guidance.cfg(SCALE), 3 * most // 5, torch.Generator().manual_seed(0)
    counts = torch.randint(most // 5, most + 1, (jobs,), generator=rng).tolist()
    outs = (sampler([text], [i], middle, plain, output="latent", progress=False) for i, text in enumerate(prompts))
    scores = sorted(
        sampler.judge(out.latents, text, i).score.item() for i, (out, text) in enumerate(zip(outs, prompts, strict=True))
    )
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
    """One sampler and the work it is given."""

    def __init__(self, sampler: Sampler, prompts: Sequence[str]):
        self.sampler, self.prompts = sampler, prompts
        size = sampler.size()
        self.shape, self.ladders = sampler.model.shape(*size), {}
        with torch.inference_mode():
            self.network = sampler.model.network(sampler.model.encode(list(prompts), *size))

    def samples(self, work: Sequence[tuple[int, Guidance]]) -> list[Sample]:
        for kind in work:
            if kind not in self.ladders:
                self.ladders[kind] = Ladder.make(self.sampler.solver(kind[0]), kind[1], self.sampler.model.device)
        return [Sample(i, self.ladders[kind], self.shape, self.network, i, seed=i) for i, kind in enumerate(work)]

    @torch.inference_mode()
    def in_flight(self, work: Sequence[tuple[int, Guidance]]) -> dict[int, Tensor]:
        """The latents of every job."""
        return {
            made.sample.key: made.latents
            for made in Engine(self.sampler.runner.lane, SLOTS, fixed=True).run(self.samples(work))
        }

    @torch.inference_mode()
    def static(self, work: Sequence[tuple[int, Guidance]], shrinking: bool) -> dict[int, Tensor]:
        samples = self.samples(work)
        groups = [samples[i : i + SLOTS] for i in range(0, len(samples), SLOTS)]
        engines = [(Engine(self.sampler.runner.lane, len(group), fixed=not shrinking), group) for group in groups]
        return {made.sample.key: made.latents for engine, group in engines for made in engine.run(group)}

    def peers(self, work: Sequence[tuple[int, Guidance]], loop: bool) -> dict[str, Callable[[], dict[int, Tensor]]]:
        """loop: also diffusers' own."""
        found = {
            "static batches": lambda: self.static(work, False),
            "static batches, shrinking": lambda: self.static(work, True),
            "in-flight": lambda: self.in_flight(work),
        }
        return found | ({LOOP: lambda: looped(self.sampler.pipe, self.prompts, work)} if loop else {})


def looped(pipe: StableDiffusionPipeline, prompts: Sequence[str], work: Sequence[tuple[int, Guidance]]) -> dict[int, Tensor]:
    """The latents of every job, in batches, by diffusers' pipeline: one number of steps a call, plain guidance only."""
    found = {}
    for steps in dict.fromkeys(steps for steps, _ in work):
        jobs = [i for i, (own, _) in enumerate(work) if own == steps]
        for batch in (jobs[k : k + SLOTS] for k in range(0, len(jobs), SLOTS)):
            noise = [torch.Generator().manual_seed(i) for i in batch]
            options = {"num_inference_steps": steps, "guidance_scale": SCALE, "output_type": "latent"}
            found |= zip(batch, pipe([prompts[i] for i in batch], generator=noise, **options).images, strict=True)
    return found


def engine(device: torch.device, preset: str) -> Iterator[Row]:
    """Rows in images a second, with the network's calls where they are counted; then memory, and how busy the network is."""
    pipe = pipeline("tiny", torch.float32, device)
    prompts = [f"a picture of a {i}" for i in range(128)]
    pipe.scheduler = make_scheduler("dpmsolver++", pipe.scheduler)
    waiting, real = stand_in(pipe, seconds=SECONDS), Sampler.from_pipeline(pipe)
    for name, sampler, jobs, most in (("stand-in", waiting, 128, 50), ("tiny", real, 48, 20)):
        case = Case(sampler, prompts[:jobs])
        for kind, work in works(sampler, jobs, most, prompts[:16]).items():
            peers, calls, made = case.peers(work, loop=sampler is real), {}, {}
            for peer, call in peers.items():
                before = getattr(sampler.model, "calls", 0)
                made[peer] = call()
                calls[peer] = getattr(sampler.model, "calls", 0) - before
            known = [peer for peer in peers if peer != LOOP or all(guidance == Guidance.cfg(SCALE) for _, guidance in work)]
            agree(*(made[peer] for peer in known))
            times = interleaved(peers, device, ROUNDS[preset])
            for peer in peers:
                rates, row = summary([jobs / t for t in times[peer]], None), summary(times[peer], times["static batches"])
                what = {"bench": "engine", "what": f"{name}, {kind}", "peer": peer, "unit": "images/s"}
                yield {**what, **rates, "ratio": row["ratio"], "calls": calls[peer] or None}
    yield from command(device, ROUNDS[preset])
    yield overhead(Case(stand_in(pipe), prompts), device, ROUNDS[preset])
    yield from busy(real)
    yield from scaling()
    for count in MEMORY[preset]:
        yield memory(count)


def agree(first: dict[int, Tensor], *others: dict[int, Tensor]) -> None:
    """Raises RuntimeError unless all have made the same latents."""
    for other in others:
        apart = max(((other[i] - x).norm() / x.norm()).item() for i, x in first.items())
        if first.keys() != other.keys() or not apart <= 1e-3:
            raise RuntimeError(f"the peers' latents are {apart:.2g} of their norm apart: they are not compared")


def overhead(case: Case, device: torch.device, rounds: int, steps: int = 30) -> Row:
    """What a sample costs beside its network, which answers at once."""
    work = [(steps, Guidance.cfg(SCALE))] * len(case.prompts)
    case.in_flight(work)
    times = interleaved({"in-flight": lambda: case.in_flight(work)}, device, rounds)["in-flight"]
    what = f"stand-in that does not wait, {SLOTS} slots, {steps} steps"
    row = summary([1e3 * t / len(work) for t in times], None)
    return {"bench": "engine", "what": what, "peer": "in-flight", "unit": "ms a sample", **row}


def scaling(workers: Sequence[int] = (1, 2, 4), steps: int = 10) -> Iterator[Row]:
    """Images a second of a local Ray's workers, each with a stand-in of its own; nothing where Ray is not installed."""
    if find_spec("ray") is None:
        return
    import ray
    from basinescape.bulk.ray import ROUNDS as blocks
    from basinescape.bulk.ray import RayExecutor

    ray.init(num_cpus=max(workers), include_dashboard=False, log_to_driver=False)
    jobs = [(i, Job(f"{i}", f"a picture of a {i}", i)) for i in range(2 * max(workers) * blocks * SLOTS)]
    rates: list[float] = []
    for count in workers:
        run = RayExecutor(
            Plans(worker(), Recipe(Guidance.cfg(SCALE), steps), "tiny"), SLOTS, Files(), Placement(SLOTS, worker, count)
        )
        sum(1 for _ in run.made(iter(jobs[: count * blocks * SLOTS]), Stop()))  # until every worker is there
        start = time.perf_counter()
        rates.append(sum(1 for _ in run.made(iter(jobs), Stop())) / (time.perf_counter() - start))
        run.close()
        what = {"bench": "engine", "what": f"stand-in, Ray, workers: {count}", "peer": "in-flight", "unit": "images/s"}
        yield {**what, "median": rates[-1], "ratio": rates[-1] / rates[0]}
    ray.shutdown()


def worker() -> Sampler:
    """What one of Ray's samples with."""
    torch.set_num_threads(1)
    return stand_in(pipeline("tiny", torch.float32, torch.device("cpu")), seconds=SECONDS)


def busy(sampler: Sampler, jobs: int = 96, slots: int = 16, steps: int = 50) -> Iterator[Row]:
    """The share of a run's time in which the network runs, prompts to PNG, on the small pipeline: start and end included."""
    network, spent = sampler.model.network, [0.0]

    def timed(*given: object, **named: object):
        made = network(*given, **named)
        for name in ("net", "both"):
            setattr(made, name, _clocked(getattr(made, name), spent))
        return made

    sampler.model.network = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = [Job(f"{i}", f"a picture of a {i}", i) for i in range(jobs)]
            start = time.perf_counter()
            recipe = Recipe(Guidance.cfg(SCALE), steps)
            generate(sampler, work, folder, recipe, "tiny", placement=Placement(slots), progress=False)
            share = spent[0] / (time.perf_counter() - start)
    finally:
        del sampler.model.network
    yield {
        "bench": "engine",
        "what": f"tiny, batch {slots}, prompts to PNG",
        "peer": "in-flight",
        "unit": "busy",
        "median": share,
    }


def _clocked(call: Callable[..., object], spent: list[float]) -> Callable[..., object]:
    def clocked(*given: object, **named: object) -> object:
        start = time.perf_counter()
        made = call(*given, **named)
        spent[0] += time.perf_counter() - start
        return made

    return clocked


def memory(count: int) -> Row:
    """Peak memory of a process that makes `count` images with the stand-in, into Parquet."""
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
        from basinescape.data.prompts import Prompts

        recipe, files = Recipe(Guidance.cfg(SCALE), 1), Files("parquet")
        out = Path(folder) / "out"
        summary = generate(sampler, Prompts(prompts), out, recipe, "tiny", files, Placement(16), progress=False)
        if summary.done != count:
            raise RuntimeError(f"{summary.done} of {count} images were made")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(_measured(int(sys.argv[1])))
