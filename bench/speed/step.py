"""The cost of a step outside the network. The network is a stub that returns at once, and the rest is timed and counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from basinescape import FirstMinimum, Guidance, Sampler
from basinescape.kernels.state import State
from basinescape.models import PromptedNetwork, adapt
from basinescape.sampling.step_table import StepTable
from basinescape.sampling.steps import denoise, lockstep_move, stepping
from basinescape.schedulers.schedule import make_scheduler
from torch import Tensor

from ..tables import Row
from .published import published
from .shapes import pipeline, sampled
from .timing import fitting, interleaved, left_out, profiled, summary, within_memory
from .traffic import moved

SCALE = 7.5
BASELINE = "diffusers"
SHORT, LONG = 10, 910  # steps; the difference of their times excludes the work done once a call, which varies by milliseconds
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}
READ = "aten::_local_scalar_dense"
LAUNCH = re.compile(r"cud?a?(Launch\w*Kernel|GraphLaunch|Mem(cpy|set)\w*Async)")
WAIT = re.compile(r"cud?a?(Stream|Device|Event|Ctx)Synchronize")


@dataclass(frozen=True)
class Cases:
    """The cases to time. models: (name, pixels a side). cost_batches, cost_steps: of the table of cost. schedulers, batches: of
    the comparison."""

    schedulers: tuple[str, ...]
    models: tuple[tuple[str, int], ...]
    batches: tuple[int, ...]
    cost_batches: tuple[int, ...]
    cost_steps: tuple[int, ...]
    rounds: int


BASE = ("sd15", 512), ("sdxl", 1024)
CASES = {
    "cpu": Cases(("ddim", "dpmsolver++"), (("tiny", 64), ("tiny", 256)), (1, 4, 16), (1, 4, 16, 64), (10, 50, 200), 9),
    "cuda": Cases(("ddim", "dpmsolver++", "euler"), BASE, (1, 4, 16), (1, 4, 16, 64), (10, 50, 200), 9),
    "quick": Cases(("dpmsolver++",), BASE, (1, 16), (1, 64), (10, 200), 3),
}


@contextmanager
def stubbed(pipe: Any) -> Iterator[None]:
    """In this context, UNet and text encoder return the same tensor in every call. The two halves of the UNet's differ."""
    kept: dict[torch.Size, Tensor] = {}

    def predict(sample: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        if sample.shape not in kept:
            one = torch.randn((2, *sample.shape[1:]), generator=torch.Generator().manual_seed(0)).to(sample)
            kept[sample.shape] = one.repeat_interleave(len(sample) // 2, dim=0)
        return (kept[sample.shape],)

    def read(ids: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        return (torch.zeros((*ids.shape, pipe.text_encoder.config.hidden_size), dtype=pipe.dtype, device=ids.device),)

    stubs = {pipe.unet: predict} | ({} if pipe.text_encoder is None else {pipe.text_encoder: read})
    for module, stub in stubs.items():
        module.forward = stub
    try:
        yield
    finally:
        for module in stubs:
            del module.forward


def peers(pipe: Any, scheduler: str, height: int, batch: int) -> dict[str, tuple[Callable[[int], Tensor], Guidance]]:
    """{name: (call, guidance)}. A call takes a number of steps, samples the whole batch and returns the latents."""
    cfg, first = Guidance.cfg(SCALE), Guidance.delayed(SCALE, until=FirstMinimum())
    prompts, seeds = ["a picture of a cat"] * batch, list(range(batch))
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)

    def ours(sampler: Sampler, guidance: Guidance) -> Callable[[int], Tensor]:
        return lambda steps: sampled(sampler, prompts, seeds, steps, guidance, "latent", height=height, width=height).latents

    def diffusers(steps: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"height": height, "width": height, "generator": generators, "output_type": "latent"}
        return pipe(prompts, num_inference_steps=steps, guidance_scale=SCALE, **options).images

    def scripts(steps: int) -> Tensor:
        made = [published(pipe, prompt, seed, steps, cfg, height) for prompt, seed in zip(prompts, seeds, strict=True)]
        return torch.cat(made)

    eager = Sampler.from_pipeline(pipe)
    found = {
        "ours": (ours(eager, cfg), cfg),
        "ours, first minimum": (ours(eager, first), first),
        BASELINE: (diffusers, cfg),
        "published style": (scripts, cfg),
    }
    if pipe.device.type == "cuda":
        captured = Sampler.from_pipeline(pipe, capture=True)
        found["ours, captured"] = ours(captured, cfg), cfg
        found["ours, first minimum, captured"] = ours(captured, first), first
    return found


def counts(call: Callable[[int], object], device: torch.device) -> dict[str, float]:
    """Counts for one step, without what a call does once: operators, reads by the host and, on a GPU, launches and waits.

    On a CPU also the bytes that operators read and write.
    """
    for steps in (SHORT, LONG):
        call(steps)
    short, long = (_counted(call, steps, device) for steps in (SHORT, LONG))
    if device.type == "cpu":
        short["bytes"], long["bytes"] = (moved(partial(call, steps)) for steps in (SHORT, LONG))
    return {name: (long[name] - short[name]) / (LONG - SHORT) for name in long}


def _counted(call: Callable[[int], object], steps: int, device: torch.device) -> Counter[str]:
    """Counts for a call. Operators called by operators are left out; launches and waits are found by the runtime's names."""
    found = Counter(dict.fromkeys(("operators", "reads", *(("launches", "waits") if device.type == "cuda" else ())), 0))
    for event in profiled(partial(call, steps), device):
        inner = event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")
        found["operators"] += event.name.startswith("aten::") and not inner
        found["reads"] += event.name == READ
        if device.type == "cuda":
            found["launches"] += bool(LAUNCH.match(event.name))
            found["waits"] += bool(WAIT.match(event.name))
    return found


def step(device: torch.device, preset: str) -> Iterator[Row]:
    """Rows in microseconds for one step of a batch: the comparison, the counts of a step, and the table of cost.

    A peer of plain guidance whose latents differ from diffusers' gets no ratio.
    """
    cases = CASES[preset]
    for model, height in cases.models:
        yield from within_memory({"bench": "step", "what": model}, partial(_of_model, model, height, cases, device))


def _of_model(model: str, height: int, cases: Cases, device: torch.device) -> Iterator[Row]:
    pipe = pipeline(model, torch.float16 if device.type == "cuda" else torch.float32, device)
    latents = _latents(pipe, height)
    with stubbed(pipe):
        for scheduler in cases.schedulers:
            for batch in cases.batches:
                what = {"bench": "step", "what": f"{scheduler}, {model}, {latents}, batch {batch}"}
                yield from within_memory(what, partial(_compared, what, pipe, scheduler, height, batch, cases.rounds))
            for peer, (call, _) in peers(pipe, scheduler, height, 1).items():
                what = {"bench": "step, counted", "what": f"{scheduler}, {model}, {latents}, batch 1", "peer": peer}
                yield from within_memory(what, partial(_counts, what, call, device))
        yield from within_memory({"bench": "step, cost", "what": latents}, partial(_cost, pipe, height, cases))


def _counts(what: Row, call: Callable[[int], object], device: torch.device) -> Iterator[Row]:
    yield {**what, **counts(call, device)}


def _latents(pipe: Any, height: int) -> str:
    return "x".join(map(str, adapt(pipe).shape(height, height)))


def _compared(what: Row, pipe: Any, scheduler: str, height: int, batch: int, rounds: int) -> Iterator[Row]:
    found = peers(pipe, scheduler, height, batch)
    made = fitting({peer: partial(_warmed, call) for peer, (call, _) in found.items()})
    calls = {(peer, steps): partial(found[peer][0], steps) for peer in made for steps in (SHORT, LONG)}
    times = interleaved(calls, pipe.device, rounds)
    a_step = {
        peer: [1e6 * (long - short) / (LONG - SHORT) for short, long in zip(times[peer, SHORT], times[peer, LONG], strict=True)]
        for peer in found
        if {(peer, SHORT), (peer, LONG)} <= times.keys()
    }
    for peer, (_, guidance) in found.items():
        if peer not in a_step:
            yield left_out({**what, "peer": peer})
            continue
        apart = _apart(made[peer], made[BASELINE]) if guidance.until is None and BASELINE in made else None
        agrees = apart is None or apart <= TOLERANCE[made[peer].dtype]
        row = summary(a_step[peer], a_step.get(BASELINE) if agrees else None)
        yield {**what, "peer": peer, "unit": "us a step", **row, "apart": apart}


def _warmed(call: Callable[[int], Tensor]) -> Tensor:
    """Its latents after SHORT steps, once it has taken LONG ones."""
    call(LONG)
    return call(SHORT)


def _apart(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.inference_mode()
def _cost(pipe: Any, height: int, cases: Cases) -> Iterator[Row]:
    """Rows in microseconds for the whole loop. ratio: the fitted (a + b * batch) + steps * (c + d * batch) over the median."""
    device = pipe.device
    sampler = Sampler.from_pipeline(pipe)
    shape = sampler.model.shape(height, height)

    def loop(batch: int, steps: int) -> Callable[[], None]:
        network = sampler.model.network(sampler.model.encode(["a picture of a cat"] * batch, height, height))
        plan = StepTable.make(sampler.solver(steps), Guidance.cfg(SCALE), device)
        noise = torch.randn((batch, *shape)).to(device, pipe.unet.dtype)
        call = partial(_loop, network, plan, plan.state(noise), noise)
        call()
        return call

    keys = [(batch, steps) for batch in cases.cost_batches for steps in cases.cost_steps]
    times = interleaved(fitting({key: partial(loop, *key) for key in keys}), device, cases.rounds)
    rows = {key: summary([1e6 * t for t in found], None) for key, found in times.items()}
    fitted = _fit({key: row["median"] for key, row in rows.items()}) if rows else {}
    for batch, steps in keys:
        what = {"bench": "step, cost", "what": f"{_latents(pipe, height)}, batch {batch}, {steps} steps", "peer": "ours"}
        row = rows.get((batch, steps))
        if row is None:
            yield left_out(what)
        else:
            row["ratio"] = fitted[batch, steps] / row["median"]
            yield {**what, "unit": "us", **row, "us a step": row["median"] / steps}


def _loop(network: PromptedNetwork, plan: StepTable, state: State, noise: Tensor) -> None:
    state.start(noise, plan.table, last=plan.last)
    denoise(stepping(network, state, lockstep_move(plan, state)), plan.branches)


def _fit(medians: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """{(batch, steps): time} of the bilinear function that fits `medians` with the least relative error."""
    terms = torch.tensor([[1, batch, steps, steps * batch] for batch, steps in medians], dtype=torch.float64)
    found = torch.tensor(list(medians.values()), dtype=torch.float64)
    solution = torch.linalg.lstsq(terms / found[:, None], torch.ones_like(found)[:, None]).solution
    return dict(zip(medians, (terms @ solution)[:, 0].tolist(), strict=True))
