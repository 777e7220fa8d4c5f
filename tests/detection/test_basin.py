"""The basin score: against its definition, against diffusers' own denoised predictions, alone and in a batch."""

import math

import pytest
import torch
from basinescape import Sampler
from basinescape.detection import basin_score
from basinescape.kernels import definition
from basinescape.schedulers.schedule import Schedule, make_scheduler, noise_levels, prepared
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPE = (3, 4, 8, 8)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def drawn(count, seed=0, shape=SHAPE):
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)).unbind()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 2.0))
def test_it_is_the_definition_of_each_sample(seed, apart):
    target, uncond, move = drawn(3, seed)
    cond = uncond + apart * move
    found = basin_score.nearer(target, uncond, cond)
    expected = [definition.basin_score(*one) for one in zip(target, uncond, cond, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_compared_in_float32(dtype):
    target, uncond, cond = drawn(3)
    uncond, cond = uncond.to(dtype), (0.7 * target + 0.3 * cond).to(dtype)
    found = basin_score.nearer(target, uncond, cond.contiguous(memory_format=torch.channels_last))
    expected = [definition.basin_score(*one) for one in zip(target, uncond, cond, strict=True)]
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-5)


CLEANED = {  # scheduler -> x0 as its own step has it, from (what the network is given, prediction, timestep)
    "epsilon": DDIMScheduler(**SD, clip_sample=False),
    "v_prediction": DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction"),
    "sample": DDIMScheduler(**SD, clip_sample=False, prediction_type="sample"),
    "ddpm": DDPMScheduler(**SD, clip_sample=False),
    "zero snr": DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True),
}


def cleaned(scheduler, given, prediction, timestep):
    scheduler.set_timesteps(1000)
    return scheduler.step(prediction, int(timestep), given).pred_original_sample


@pytest.mark.parametrize("name", CLEANED)
def test_it_is_how_much_nearer_diffusers_own_denoised_prediction_comes(name):
    scheduler = CLEANED[name]
    latents, noise, uncond, cond = drawn(4)
    probe = basin_score.Probe.of(scheduler)
    given, target = probe.question(latents, noise)
    assert torch.allclose(cleaned(scheduler, given, target, probe.timestep), latents, atol=1e-3)
    assert torch.allclose(probe.cleaned(given, uncond), cleaned(scheduler, given, uncond, probe.timestep), rtol=1e-3, atol=1e-3)
    off = [(cleaned(scheduler, given, one, probe.timestep) - latents).flatten(1).norm(dim=1) for one in (uncond, cond)]
    assert torch.allclose(basin_score.nearer(target, uncond, cond), (off[0] / off[1]).log(), atol=1e-4)


TOLD = {
    "flow": FlowMatchEulerDiscreteScheduler(),
    "flow, shifted": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, inverted": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "flow, unipc": UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    "sd": EulerDiscreteScheduler(**SD),
    "edm": EDMEulerScheduler(),
    "continuous": EulerDiscreteScheduler(
        **SD, timestep_type="continuous", prediction_type="v_prediction", sigma_max=700, sigma_min=0.002
    ),
}


@pytest.mark.parametrize("scheduler", [*TOLD.values(), *CLEANED.values()], ids=[*TOLD, *CLEANED])
def test_what_the_network_has_in_mind_is_found_in_its_prediction(scheduler):
    latents, noise = drawn(2)
    probe = basin_score.Probe.of(scheduler)
    assert torch.allclose(probe.cleaned(*probe.question(latents, noise)), latents, atol=1e-3)


def test_under_edm_it_is_diffusers_own_preconditioning():
    scheduler = EDMEulerScheduler(sigma_data=0.7)
    plan, (latents, noise) = prepared(scheduler, Schedule(100)), drawn(2)
    known = noise_levels(plan).log_snr
    call = int((known - basin_score.LOG_SNR).abs().argmin())
    probe = basin_score.Probe.at(scheduler, plan.timesteps[call].item(), known[call].item())
    given, target = probe.question(latents, noise)
    noised, t = latents + plan.sigmas[call] * noise, plan.timesteps[call]
    plan.set_begin_index(call)
    assert torch.allclose(plan.scale_model_input(noised, t), given, atol=1e-4)
    assert torch.allclose(plan.step(target, t, noised).pred_original_sample, latents, atol=1e-3)


def test_latents_in_half_precision_are_noised_in_float32():
    latents, noise = drawn(2)
    probe = basin_score.Probe.of(CLEANED["v_prediction"])
    half, whole = (probe.question(given, noise) for given in (latents.half(), latents.half().float()))
    assert {made.dtype for made in half} == {torch.float32} and all(map(torch.equal, half, whole))


@pytest.mark.parametrize("scheduler", TOLD.values(), ids=TOLD)
def test_what_is_told_and_given_is_what_the_scheduler_gives_at_that_level(scheduler):
    """Between the two nearest calls of many steps, whose noise levels and timesteps the scheduler itself says."""
    probe = basin_score.Probe.of(scheduler)
    plan = prepared(scheduler, Schedule(500))
    known = noise_levels(plan).log_snr
    call = int((known - probe.log_snr).abs().argmin())
    near = plan.timesteps[max(call - 1, 0) : call + 2].float()
    assert near.min() <= probe.timestep <= near.max() and abs(known[call] - probe.log_snr) < 0.2
    assert probe.log_snr == pytest.approx(basin_score.LOG_SNR, abs=0.02)
    signal, noise = probe.given
    data = plan.config.get("sigma_data", 1.0)
    assert 2 * math.log(data * signal / noise) == pytest.approx(probe.log_snr, abs=1e-4)
    one, other = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.5)
    given, target = probe.question(one, other)
    # The prediction that is right takes the scheduler from this level straight to the clean latents.
    if hasattr(plan, "sigmas") and "flow" in (plan.config.get("prediction_type") or type(plan).__name__.lower()):
        sigma = 1 / (1 + math.exp(probe.log_snr / 2))
        assert given.item() - sigma * target.item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++-karras", "edm-euler", "flow-euler", "heun", "pndm"])
def test_noise_levels_are_those_of_the_schedulers_own_noising(name):
    base = FlowMatchEulerDiscreteScheduler() if name.startswith("flow") else DDIMScheduler(**SD)
    base = EDMEulerScheduler() if name.startswith("edm") else base
    plan = prepared(make_scheduler(name, base), Schedule(20))
    one, nothing = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    mix = plan.scale_noise if hasattr(plan, "scale_noise") else None
    for call, (log_snr, t) in enumerate(zip(noise_levels(plan).log_snr.tolist(), plan.timesteps, strict=True)):
        if hasattr(plan, "set_begin_index"):
            plan.set_begin_index(call)
        shares = [
            mix(clean, t[None], noise).item() if mix else plan.add_noise(clean, noise, t[None]).item()
            for clean, noise in ((one, nothing), (nothing, one))
        ]
        data = plan.config.get("sigma_data", 1.0) if name.startswith("edm") else 1.0
        if shares[0] > 1e-4:
            assert 2 * math.log(data * shares[0] / shares[1]) == pytest.approx(log_snr, abs=0.15)
    assert len(noise_levels(plan).timestep) == len(noise_levels(plan).log_snr)


def test_a_flow_that_counts_its_noise_from_1_down_has_its_levels_the_right_way():
    plans = [prepared(FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted), Schedule(8)) for inverted in (False, True)]
    for plan in plans:
        timestep, log_snr = noise_levels(plan)
        assert timestep[0] > timestep[-1] and log_snr[0] < log_snr[-1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_sampler_judges_alone_as_in_a_batch(random_pipeline, prediction):
    sampler = Sampler.from_pipeline(random_pipeline("sd", 8, prediction))
    prompts, seeds = ["a cat", "a frog", "a dog", "a fish"], [3, 1, 4, 1]
    out = sampler(prompts, seeds, 4, output="latent", progress=False)
    together = sampler.judge(out.latents, prompts, seeds)
    assert together.score.isfinite().all() and together.score.shape == (4,)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = sampler.judge(out.latents[i : i + 1], prompt, seed).score
        assert alone.item() == pytest.approx(together.score[i].item(), abs=1e-5)
    assert torch.equal(sampler.judge(out.latents, prompts, seeds, batch_size=4).score, together.score)
    middle = together.score.median().item()
    verdict = sampler.judge(out.latents, prompts, seeds, threshold=middle)
    assert torch.equal(verdict.suspect, verdict.score > middle) and verdict.suspect.any() and not verdict.suspect.all()


def test_its_noise_is_none_of_the_samples_own():
    own = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(5))
    first, second = (next(basin_score.noises(seed, SHAPE[1:])) for seed in (5, 6))
    assert all(abs(torch.corrcoef(torch.stack([own.flatten(), x.flatten()]))[0, 1]) < 0.3 for x in (first, second))
    assert torch.equal(first, next(basin_score.noises(5, SHAPE[1:]))) and not torch.equal(first, second)


def test_what_is_not_a_number_is_suspect(small):
    sampler = Sampler.from_pipeline(small)
    latents = torch.zeros(2, 4, 16, 16)
    latents[1, 0, 0, 0] = torch.nan
    verdict = sampler.judge(latents, ["a cat", "a cat"], [0, 1], threshold=1e9)
    assert verdict.suspect.tolist() == [False, True] and verdict.score.isnan().tolist() == [False, True]
    assert basin_score.suspects(math.nan, 0.3) and basin_score.suspects(math.inf, 0.3) and not basin_score.suspects(0.3, 0.3)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda s, x: s.judge(x, ["a"]), "prompts must be one for each of 2 pictures, or one for all; got 1"),
        (lambda s, x: s.judge(x[:, :1], "a"), "latents must have the shape"),
        (lambda s, x: s.judge(x, "a", probes=0), "probes must be a whole number of at least 1"),
        (lambda s, x: s.judge(x, "a", threshold=math.nan), "threshold must be a finite number"),
        (lambda s, x: basin_score.Probe.at(s.scheduler, 1.0, 3.0), "pictures are judged near log SNR"),
        (lambda s, x: basin_score.Probe.of(DDIMScheduler(beta_start=1e-4, beta_end=2e-4)), "the nearest level here is"),
    ],
)
def test_what_cannot_be_judged_is_refused(small, use, says):
    with pytest.raises(ValueError, match=says):
        use(Sampler.from_pipeline(small), torch.zeros(2, 4, 16, 16))
