"""What the sampler must do on a GPU, on the pipeline that ships. Needs diffusers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from basinescape import FirstMinimum, Guidance, Sampler
from basinescape.bulk.generate import generate
from basinescape.bulk.settings import Files, Placement, Recipe
from basinescape.data.prompts import Job
from basinescape.sampling.step_table import StepTable
from basinescape.sampling.steps import denoise, fused_step
from basinescape.schedulers.schedule import make_scheduler
from safetensors.torch import load_file

from ..speed.images import METHODS
from ..speed.shapes import pipeline, sampled
from ..speed.step import counts, peers, stubbed
from .checks import Figures, require

PROMPTS, SEEDS, STEPS = ["a picture of a cat signed by arno", "a picture of a frog", "a picture of a dog"], [3, 1, 2], 20


@torch.inference_mode()
def check_sampler_synchronisation(device: torch.device) -> Figures:
    """The whole loop, network included, makes the host wait nowhere."""
    sampler = Sampler.from_pipeline(pipeline("tiny", torch.float16, device), "dpmsolver++")
    model = sampler.model
    network = model.network(model.encode(PROMPTS, 64, 64))
    noise = torch.randn(3, 4, 16, 16).to(device, torch.float16)
    for guidance in METHODS.values():
        plan = StepTable.make(sampler.solver(STEPS), guidance, device)
        state = plan.state(noise, model.memory_format)
        take = fused_step(network, plan, state)
        denoise(take, plan.branches)
        state.start(noise, plan.table, last=plan.last)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            denoise(take, plan.branches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"methods": len(METHODS)}


def check_sampler_launches(device: torch.device) -> Figures:
    """Beside a network that does nothing, a step is one launch and no wait, captured or not."""
    pipe = pipeline("tiny", torch.float16, device)
    figures = {}
    with stubbed(pipe):
        for name, (call, _) in peers(pipe, "dpmsolver++", 256, 2).items():
            figures[name] = counts(call, device)
    for name, found in figures.items():
        if name.startswith("ours"):
            require(found["launches"] <= 1 and found["waits"] == 0 and found["reads"] == 0, f"{name}: {found}")
    return figures


def check_sampler_capture(device: torch.device) -> Figures:
    """Captured images are the same network's uncaptured ones, for every method, and after another batch size was captured."""
    pipe = pipeline("tiny", torch.float16, device)
    plain, captured = Sampler.from_pipeline(pipe, "dpmsolver++"), Sampler.from_pipeline(pipe, "dpmsolver++", capture=True)
    plain.model = captured.model
    methods = {**METHODS, "delayed, first minimum or step 8": Guidance.delayed(7.5, until=FirstMinimum(latest=8))}
    figures = {}
    for count in (3, 1, 3):
        for name, guidance in methods.items():
            a, b = (sampled(s, PROMPTS[:count], SEEDS[:count], STEPS, guidance, "latent") for s in (plain, captured))
            apart = ((a.latents - b.latents).float().norm() / a.latents.float().norm()).item()
            figures[f"{name}, batch {count}"] = {"apart": apart, "same bits": torch.equal(a.latents, b.latents)}
            where = f"{name}, batch {count}: captured and uncaptured"
            require(apart <= 1e-2, f"{where} differ by {apart:.2g}")
            found, expected = b.transition_step.tolist(), a.transition_step.tolist()
            require(found == expected, f"{where} leave at {found} and {expected}")
    captured.close()
    return figures


def check_sampler_images(device: torch.device) -> Figures:
    """Plain guidance gives diffusers' own images."""
    figures = {}
    for name in ("ddim", "euler", "dpmsolver++"):
        pipe = pipeline("tiny", torch.float32, device)
        pipe.scheduler = make_scheduler(name, pipe.scheduler)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        options = {"generator": generators, "output_type": "np", "guidance_scale": 7.5}
        expected = pipe(PROMPTS, num_inference_steps=STEPS, **options).images
        found = Sampler.from_pipeline(pipe)(PROMPTS, SEEDS, STEPS, Guidance.cfg(7.5), output="np", progress=False).images
        figures[name] = float(255 * np.abs(found - expected).max())
        require(figures[name] <= 1, f"{name}: {figures[name]:.2g} of 255 apart")
    return figures


def check_sampler_threads(device: torch.device) -> Figures:
    """A set that threads encode and decode beside captures has the same pictures as one without captures."""
    pipe = pipeline("tiny", torch.float16, device)
    jobs = [Job(f"{i}", PROMPTS[i % 3], i, height=64 - 16 * (i % 3), width=64) for i in range(6)]
    recipe, files = Recipe(Guidance.cfg(7.5), STEPS), Files("latents")
    plain, captured = Sampler.from_pipeline(pipe, "dpmsolver++"), Sampler.from_pipeline(pipe, "dpmsolver++", capture=True)
    plain.model = captured.model
    made = []
    for sampler in (plain, captured):
        with tempfile.TemporaryDirectory() as folder:
            done = generate(sampler, jobs, folder, recipe, "tiny", files, Placement(2), progress=False).done
            require(done == len(jobs), f"{done} of {len(jobs)} pictures were made")
            made.append({path.stem: load_file(path)["latents"].float() for path in Path(folder).rglob("*.safetensors")})
    require(captured.graphs is not None and captured.graphs.failure is None, "the step could not be captured")
    captured.close()
    apart = max(((made[1][job] - x).norm() / x.norm()).item() for job, x in made[0].items())
    require(apart <= 1e-2, f"captured and uncaptured differ by {apart:.2g}")
    return {"pictures": len(jobs), "apart": apart}


CHECKS = {
    "sampler synchronisation": check_sampler_synchronisation,
    "sampler launches": check_sampler_launches,
    "sampler capture": check_sampler_capture,
    "sampler images": check_sampler_images,
    "sampler threads": check_sampler_threads,
}
