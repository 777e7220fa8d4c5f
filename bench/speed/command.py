"""Time the work of `basinescape generate`, prompts to files, beside stock diffusers in batches, without a process's start."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from basinescape import Guard, Guidance, Sampler
from basinescape.bulk.generate import generate
from basinescape.bulk.settings import Placement, Recipe
from basinescape.data.prompts import Job

from ..tables import Row
from .shapes import pipeline
from .timing import fitting, interleaved, rated

BATCH = 8
SCALES = {"tiny": 7.5, "flow": 4.0}
STOCK = "diffusers, plain guidance"


def works(jobs: int, steps: int) -> dict[str, list[int]]:
    """{kind: steps of every job}: all equal, random from a fifth of `steps` to `steps`, and the random ones sorted."""
    counts = torch.randint(steps // 5, steps + 1, (jobs,), generator=torch.Generator().manual_seed(0)).tolist()
    return {"uniform": [3 * steps // 5] * jobs, "mixed steps, as they come": counts, "mixed steps, sorted": sorted(counts)}


def ours(sampler: Sampler, work: Sequence[int], guidance: Guidance | Guard, model: str) -> None:
    """Do the command's work, into a temporary folder."""
    jobs = [Job(f"{i}", prompt(i), i, steps=steps) for i, steps in enumerate(work)]
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(guidance, max(work))
        done = generate(sampler, jobs, folder, recipe, model, placement=Placement(BATCH), progress=False).done
    if done != len(jobs):
        raise RuntimeError(f"{done} of {len(jobs)} images were made")


def stock(pipe: Any, work: Sequence[int], scale: float) -> None:
    """Loop over diffusers' pipeline, and write the images as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        for i, image in looped(pipe, enumerate(work), scale):
            image.save(Path(folder, f"{i}.png"))


def looped(pipe: Any, work: Iterable[tuple[int, int]], scale: float, **options: Any) -> Iterator[tuple[int, Any]]:
    """Yield (job, image) for every (job, steps), by diffusers' pipeline. A call takes one number of steps, so a batch has
    neighbours with the same number."""
    for steps, group in groupby(work, key=itemgetter(1)):
        alike = [i for i, _ in group]
        for batch in (alike[k : k + BATCH] for k in range(0, len(alike), BATCH)):
            noise = [torch.Generator().manual_seed(i) for i in batch]
            settings = {"generator": noise, "num_inference_steps": steps, "guidance_scale": scale, **options}
            yield from zip(batch, pipe([prompt(i) for i in batch], **settings).images, strict=True)


def prompt(i: int) -> str:
    return f"a picture of a {i}"


def command(device: torch.device, rounds: int, jobs: int, steps: int) -> Iterator[Row]:
    """Rows in images a second. The guard's ratio compares it with plain guidance by diffusers, which judges nothing."""
    for model, scale in SCALES.items():
        pipe = pipeline(model, torch.float32, device)
        sampler, plain, kinds = Sampler.from_pipeline(pipe), Guidance.cfg(scale), works(jobs, steps)
        guidances: dict[str, Guidance | Guard] = {**dict.fromkeys(kinds, plain), "uniform, guard": Guidance.guard(scale)}
        kinds["uniform, guard"] = kinds["uniform"]
        for kind, work in kinds.items():
            own = partial(ours, sampler, work, guidances[kind], model)
            peers: dict[str, Callable[[], None]] = {"generate": own, STOCK: partial(stock, pipe, work, scale)}
            fitting(peers)
            times = interleaved(peers, device, rounds)
            what = {"bench": "engine, command", "what": f"{model}, {kind}"}
            yield from rated(what, ("generate", STOCK), jobs, times, STOCK)
