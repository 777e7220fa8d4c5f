"""Restart sampling: back to a higher noise level by fresh noise, and down again."""

import copy

import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler
from basinescape.schedulers.schedule import make_scheduler
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from rounding import assert_same_but_for_rounding

STEPS, SCALE = 8, 4.0
PROMPTS, SEEDS = ["a picture of a cat", "a frog"], [5, 6]
RESTART = (300, 600, 2)


@pytest.fixture(scope="module")
def pipe(small):
    return small


def sample(pipe, scheduler, guidance, prompts=PROMPTS, seeds=SEEDS, steps=STEPS, **options):
    sampler = Sampler.from_pipeline(pipe, scheduler)
    return sampler(prompts, seeds, steps, guidance, output="latent", progress=False, **options)


def ready(scheduler, call=0):
    """Set to the steps, at a call that is its first."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(call)
    return scheduler


def shares(scheduler, call):
    """Of clean latents and noise in the latents before a call, by the formulas of the two families."""
    if hasattr(scheduler, "sigmas"):
        sigma = scheduler.sigmas[call].item()
        preserving = isinstance(scheduler, DPMSolverMultistepScheduler)
        return (1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5) if preserving else (1.0, sigma)
    signal = scheduler.alphas_cumprod[scheduler.timesteps[call]].item()
    return signal**0.5, (1 - signal) ** 0.5


def plain_loop(pipe, scheduler, prompt, seed, low, high, times):
    """One sample by the scheduler's own steps."""
    encoded = torch.cat(pipe.encode_prompt(prompt, "cpu", 1, True)[::-1])
    generator, start = torch.Generator().manual_seed(seed), ready(scheduler)
    latents = torch.randn((1, 4, 16, 16), generator=generator) * start.init_noise_sigma
    calls = len(start.timesteps)

    def down(latents, first, last):
        stepping = ready(scheduler, first)
        for t in stepping.timesteps[first:last]:
            x = stepping.scale_model_input(torch.cat([latents] * 2), t)
            u, c = pipe.unet(x, t, encoded, return_dict=False)[0].chunk(2)
            latents = stepping.step(u + SCALE * (c - u), t, latents).prev_sample
        return latents

    firsts = range(0, calls, start.order)  # the first call of each step
    j, k = (next(i for i in firsts if start.timesteps[i] <= level) for level in (low, high))
    (clean, noise), (signal, total) = shares(start, j), shares(start, k)
    latents = down(latents, 0, j)
    for i in range(times):
        scale = signal / clean
        fresh = torch.randn(latents.shape, generator=generator)
        latents = down(scale * latents + (total**2 - (scale * noise) ** 2) ** 0.5 * fresh, k, j if i < times - 1 else calls)
    return latents


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++", "heun"])
@torch.inference_mode()
@pytest.mark.slow
def test_it_is_a_plain_loop_that_goes_back(pipe, name):
    scheduler = make_scheduler(name, pipe.scheduler)
    found = sample(pipe, scheduler, Guidance.cfg(SCALE, restart=RESTART)).latents

    def again():
        return torch.cat([plain_loop(pipe, scheduler, p, s, *RESTART) for p, s in zip(PROMPTS, SEEDS, strict=True)])

    assert_same_but_for_rounding(found, again(), pipe, again)
    assert (found - sample(pipe, scheduler, Guidance.cfg(SCALE)).latents).abs().max() > 0.1


@pytest.mark.parametrize("guidance", [Guidance.delayed(SCALE, until=At(600)), Guidance.opposite(2.0, SCALE, FirstMinimum())])
@pytest.mark.slow
def test_it_composes_and_a_sample_is_its_own(pipe, guidance):
    """After a delay and opposite guidance: alone = in a batch = in another order; each step's gap is that of its last visit."""
    guidance = Guidance.from_dict({**guidance.to_dict(), "restart": RESTART})
    assert eval(repr(guidance)) == guidance == Guidance.from_dict(guidance.to_dict())
    found = sample(pipe, "dpmsolver++", guidance)
    assert found.noise_gap.shape == (2, STEPS)

    def turned():
        out = sample(pipe, "dpmsolver++", guidance, PROMPTS[::-1], SEEDS[::-1])
        return out.latents.flip(0), out.noise_gap.flip(0)

    def alone():
        outs = [sample(pipe, "dpmsolver++", guidance, [p], [s]) for p, s in zip(PROMPTS, SEEDS, strict=True)]
        return torch.cat([out.latents for out in outs]), torch.cat([out.noise_gap for out in outs])

    for other in (turned, alone):
        assert_same_but_for_rounding((found.latents, found.noise_gap), other(), pipe, other)


def test_a_callback_is_told_every_call(pipe):
    seen = []

    def note(_, row, timestep, given):
        seen.append((row, float(timestep)))
        return {}

    sample(pipe, "ddim", Guidance.cfg(SCALE, restart=RESTART), callback_on_step_end=note)
    timesteps = [t for _, t in seen]
    again = [t for t in timesteps if RESTART[0] < t <= RESTART[1]]
    assert [row for row, _ in seen] == list(range(len(seen)))
    assert len(again) == (1 + RESTART[2]) * len(set(again)) and len(seen) == STEPS + RESTART[2] * len(set(again))


def test_flow_goes_back_along_its_own_mixture(pipe):
    """(1 - t) clean + t noise: the shares of a jump are those that leave both right."""
    sampler = Sampler.from_pipeline(pipe, FlowMatchEulerDiscreteScheduler())
    solver = sampler.solver(10)
    low, high = solver.call_at(300), solver.call_at(700)
    scale, sigma = solver.renoised(low, high)
    (t_low, t_high) = (solver.levels[k] / 1000 for k in (low, high))
    assert scale * (1 - t_low) == pytest.approx(1 - t_high)
    assert (scale * t_low) ** 2 + sigma**2 == pytest.approx(t_high**2)


@pytest.mark.parametrize(
    ("restart", "scheduler", "says"),
    [
        ((600, 300, 1), "ddim", "restart must go back"),
        ((300, 600), "ddim", r"restart must be \(low, high, times\)"),
        ((300, 600, 0), "ddim", "restart must be a whole number of at least 1"),
        ((300, float("nan"), 1), "ddim", "restart must be a finite number"),
        ((300, 301, 1), "ddim", "goes back over no step"),
        ((-5, 301, 1), "ddim", "no step is at or below timestep -5"),
        ((300, 600, 1), "unipc", "needs a linear scheduler, and UniPCMultistepScheduler is not"),
    ],
)
def test_what_cannot_be_done_is_refused(pipe, restart, scheduler, says):
    with pytest.raises(ValueError, match=says):
        sample(pipe, scheduler, Guidance.cfg(SCALE, restart=restart))
