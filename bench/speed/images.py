"""Images a second, and utilisation: the network's FLOPs a second over the device's measured rate of matrix products."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler
from basinescape.models import adapt
from basinescape.models.network import PACKED, traced
from basinescape.sampling.step_table import StepTable
from basinescape.schedulers.schedule import make_scheduler
from torch.utils.flop_counter import FlopCounterMode

from ..tables import Row
from .published import published
from .shapes import pipeline, sampled
from .timing import fitting, interleaved, left_out, seconds, summary, within_memory

SCALE = 7.5
METHODS = {
    "cfg": Guidance.cfg(SCALE),
    "delayed, t <= 500": Guidance.delayed(SCALE, until=At(500)),
    "opposite -2, t <= 650": Guidance.opposite(2.0, scale=SCALE, until=At(650)),
    "delayed, first minimum": Guidance.delayed(SCALE, until=FirstMinimum()),
}
BASELINE = "diffusers"
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product measures a device's rate
TOLERANCE = {torch.float32: 1.0, torch.bfloat16: 4.0, torch.float16: 2.0}  # of `difference`, in 255ths


@dataclass(frozen=True)
class Case:
    """One model: its dtype, steps and batches, how often each peer is timed, and the key of WAYS."""

    model: str
    dtype: torch.dtype
    steps: int
    batches: tuple[int, ...]
    rounds: int
    ways: str = "cuda"


CASES = {
    "cpu": (Case("tiny", torch.float32, 50, (1, 16), 5, "cpu"),),
    "cuda": (
        Case("sd15", torch.float16, 50, (1, 4, 16), 5),
        Case("sd15", torch.bfloat16, 50, (1, 4, 16), 5),
        Case("sdxl", torch.bfloat16, 20, (1, 4, 16), 3),
    ),
    "quick": (Case("sd15", torch.float16, 20, (1, 4, 16), 3, "quick"),),
}
# (name, keyword arguments of the sampler, methods). All methods are timed only in the cheapest and in the plainest way.
WAYS = {
    "cpu": (("ours", {}, tuple(METHODS)), ("ours, compiled", {"compile": True}, ("cfg", "delayed, t <= 500"))),
    "cuda": (
        ("ours", {}, ("cfg",)),
        ("ours, captured", {"capture": True}, tuple(METHODS)),
        ("ours, compiled", {"compile": True}, ("cfg",)),
        ("ours, compiled, captured", {"compile": True, "capture": True}, tuple(METHODS)),
        ("ours, captured, xformers", {"capture": True, "attention": "xformers"}, ("cfg",)),
    ),
    "quick": (
        ("ours, captured", {"capture": True}, ("cfg",)),
        ("ours, compiled, captured", {"compile": True, "capture": True}, ("cfg", "delayed, t <= 500")),
    ),
}


Peer = tuple[str, Callable[[], np.ndarray]]  # (name of the method, a call that returns its images)


class Bench:
    """The peers of one model and batch size."""

    def __init__(self, case: Case, device: torch.device, pipe: Any, batch: int):
        self.case, self.device, self.pipe = case, device, pipe
        self.prompts = ["a picture of a cat signed by arno", "a picture of a frog"] * batch
        self.prompts, self.seeds = self.prompts[:batch], list(range(batch))
        self.size = pipe.unet.config.sample_size * pipe.vae_scale_factor

    def ours(self, sampler: Callable[[], Sampler], guidance: Guidance) -> np.ndarray:
        return sampled(sampler(), self.prompts, self.seeds, self.case.steps, guidance, "np").images

    def diffusers(self, made: Callable[[], Any]) -> np.ndarray:
        pipe = made()
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        options = {"generator": generators, "output_type": "np", "guidance_scale": SCALE}
        return pipe(self.prompts, num_inference_steps=self.case.steps, **options).images

    @torch.no_grad()
    def published(self, guidance: Guidance) -> np.ndarray:
        made = []
        for prompt, seed in zip(self.prompts, self.seeds, strict=True):
            latents = published(self.pipe, prompt, seed, self.case.steps, guidance, self.size)
            made.append(adapt(self.pipe).decode(latents, "np").images)
        return np.concatenate(made)

    def compiled(self) -> Any:
        """The pipeline as diffusers' guide has it fast."""
        fast = twin(self.pipe)
        fast.unet.to(memory_format=torch.channels_last)
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        fast.unet.compile(mode=mode, fullgraph=True, dynamic=False)
        return fast

    def packed(self) -> Any:
        """The pipeline compiled as ours is on a CPU, which is not in diffusers' guide."""
        best = twin(self.pipe)
        best.unet.to(memory_format=torch.channels_last).compile(fullgraph=True, dynamic=False, options=PACKED)
        best.unet._compiled_call_impl = traced(best.unet._compiled_call_impl, packed=True)
        return best

    def sampler(self, options: dict[str, Any]) -> Sampler:
        own = options.get("compile") or "attention" in options
        return Sampler.from_pipeline(twin(self.pipe) if own else self.pipe, **options)

    def peers(self) -> dict[str, Peer]:
        """What a peer needs is made when it is first called: where there is no memory for it, the others go on."""
        found: dict[str, Peer] = {
            BASELINE: ("cfg", partial(self.diffusers, lambda: self.pipe)),
            "diffusers, compiled, channels-last": ("cfg", partial(self.diffusers, cache(self.compiled))),
        }
        if self.device.type == "cpu":
            found["diffusers, compiled, channels-last, packed"] = "cfg", partial(self.diffusers, cache(self.packed))
        if len(self.prompts) == 1:  # it takes one at a time, so other batches say the same
            found["published style"] = "cfg", partial(self.published, METHODS["cfg"])
        for way, options, methods in WAYS[self.case.ways]:
            if options.get("attention") == "xformers" and find_spec("xformers") is None:
                continue
            sampler = cache(partial(self.sampler, options))
            for method in methods:
                found[f"{way}, {method}"] = method, partial(self.ours, sampler, METHODS[method])
        return found

    def flops(self) -> dict[str, float]:
        """{method: FLOPs of the network for one image}."""
        model = adapt(self.pipe)
        network = model.network(model.encode(self.prompts[:1], self.size, self.size))
        latents = torch.randn((1, *model.shape(self.size, self.size))).to(self.device, self.case.dtype)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(latents, torch.full((1,), 500.0, device=self.device), "cond")
        solver = Sampler.from_pipeline(self.pipe).solver(self.case.steps)
        calls = {}
        for method, guidance in METHODS.items():
            branches = StepTable.make(solver, guidance, self.device).branches
            calls[method] = sum(2 if branch == "both" else 1 for branch in branches)
        return {method: count * counter.get_total_flops() for method, count in calls.items()}


def twin(pipe: Any) -> Any:
    """The same pipeline with networks of its own, to be compiled or laid out differently, or with another attention."""
    other = copy.copy(pipe)
    other.unet, other.vae = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.vae)
    return other


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product, the best of several."""
    side = SIDE[device.type]
    a, b = torch.randn((2, side, side), device=device).to(dtype)
    out = a @ b
    return 2 * side**3 / min(seconds(lambda: torch.matmul(a, b, out=out), device, 5) for _ in range(10))


def difference(found: np.ndarray, expected: np.ndarray, dtype: torch.dtype) -> float:
    """The difference of images in 255ths: the largest in float32; the mean in half precision, where rounding errors grow.

    Random networks make pale images: their differences are scaled up to full contrast.
    """
    apart = 255 * np.abs(found.astype(np.float64) - expected) / min(1.0, 4 * float(expected.std()))
    return float(apart.max() if dtype == torch.float32 else apart.mean())


def images(device: torch.device, preset: str) -> Iterator[Row]:
    """Rows in images a second. utilisation is computed from the UNet's FLOPs under each method.

    The images of plain guidance are compared with diffusers', those of other methods with the `published` loop's. They must be
    within TOLERANCE, and nearer to their own method's images than to another's; otherwise the peer gets no ratio.
    """
    for model in CASES[preset]:
        what = f"{model.model}, {str(model.dtype).removeprefix('torch.')}, {model.steps} steps"
        yield from within_memory({"bench": "images", "what": what}, partial(_of_model, model, what, device))


def _of_model(model: Case, what: str, device: torch.device) -> Iterator[Row]:
    pipe = pipeline(model.model, model.dtype, device)
    pipe.scheduler = make_scheduler("dpmsolver++", pipe.scheduler)
    rate = matmul_rate(device, model.dtype)
    for batch in model.batches:
        torch._dynamo.reset()
        one = {"bench": "images", "what": f"{what}, batch {batch}"}
        yield from within_memory(one, partial(_rows, one, Bench(model, device, pipe, batch), batch, rate))


def _rows(what: Row, bench: Bench, batch: int, rate: float) -> Iterator[Row]:
    peers, flops, dtype = bench.peers(), bench.flops(), bench.case.dtype
    methods = {name: method for name, (method, _) in peers.items()}
    calls = {name: call for name, (_, call) in peers.items()}
    del peers  # so that what a peer holds goes with its call
    made = fitting(calls)
    expected = {method: bench.published(METHODS[method]) for method in dict.fromkeys(methods.values()) if method != "cfg"}
    expected["cfg"] = made[BASELINE] if BASELINE in made else bench.published(METHODS["cfg"])
    apart = {name: {m: difference(found, right, dtype) for m, right in expected.items()} for name, found in made.items()}
    times = interleaved(calls, bench.device, bench.case.rounds)
    for name, method in methods.items():
        one = {**what, "peer": name}
        if name not in times:
            yield left_out(one)
            continue
        off = apart[name][method]
        agrees = off <= TOLERANCE[dtype] and off <= min(apart[name].values())
        row = summary(times[name], times.get(BASELINE) if agrees else None)
        rates = summary([batch / t for t in times[name]], None)
        use = {"ratio": row["ratio"], "utilisation": flops[method] * rates["median"] / rate, "apart": off}
        yield {**one, "unit": "images/s", **rates, **use}
