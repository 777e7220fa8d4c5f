"""Plain guidance on every scheduler that diffusers lists for these pipelines, against diffusers' own pipeline.

`make test` runs a part: every class with every option, the other factors taking turns. `make matrix` runs every combination.
"""

import copy
import itertools

import diffusers
import pytest
import torch
from basinescape import Guidance, Sampler

SCALE, SEEDS, PROMPTS = 4.0, [5, 6], ["a picture of a cat", "frog"]
KINDS = ["sd", "sdxl"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "linspace", "trailing"]
STEPS = [5, 20, 3, 1, 2]
SIGMAS = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
CLIPS = [{"clip_sample": True}, {"thresholding": True}]
# class -> its main options; {} are the defaults on Stable Diffusion's own noise schedule
OPTIONS = {
    "DDIMScheduler": [{}, *CLIPS, {"set_alpha_to_one": False, "steps_offset": 1}, {"rescale_betas_zero_snr": True}],
    "DDIMParallelScheduler": [{}, {"clip_sample": True}],
    "DDPMScheduler": [{}, *CLIPS, {"variance_type": "fixed_large"}],
    "DDPMParallelScheduler": [{}],
    "DEISMultistepScheduler": [{}, *SIGMAS, {"solver_order": 3}, {"thresholding": True}],
    "DPMSolverMultistepScheduler": [
        {},
        *SIGMAS,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"solver_order": 3},
        {"solver_type": "heun"},
        {"euler_at_final": True},
        {"use_lu_lambdas": True},
        {"thresholding": True},
        {"lower_order_final": False},
    ],
    "DPMSolverSDEScheduler": [{}, {"use_karras_sigmas": True}],
    "DPMSolverSinglestepScheduler": [{}, *SIGMAS, {"solver_order": 3}, {"solver_order": 1}, {"thresholding": True}],
    "EDMDPMSolverMultistepScheduler": [{}, {"algorithm_type": "sde-dpmsolver++"}, {"sigma_schedule": "exponential"}],
    "EDMEulerScheduler": [{}, {"sigma_schedule": "exponential"}],
    "EulerAncestralDiscreteScheduler": [{}, {"rescale_betas_zero_snr": True}],
    "EulerDiscreteScheduler": [{}, *SIGMAS, {"interpolation_type": "log_linear"}, {"timestep_type": "continuous"}],
    "HeunDiscreteScheduler": [{}, *SIGMAS, {"clip_sample": True}, {"beta_schedule": "squaredcos_cap_v2"}],
    "IPNDMScheduler": [{}],
    "KDPM2AncestralDiscreteScheduler": [{}, *SIGMAS],
    "KDPM2DiscreteScheduler": [{}, *SIGMAS],
    "LCMScheduler": [{}, {"clip_sample": True}],
    "LMSDiscreteScheduler": [{}, *SIGMAS],
    "PNDMScheduler": [{}, {"skip_prk_steps": True}, {"set_alpha_to_one": True, "skip_prk_steps": True}],
    "SASolverScheduler": [{}, {"use_karras_sigmas": True}],
    "TCDScheduler": [{}, {"clip_sample": True}],
    "UniPCMultistepScheduler": [{}, *SIGMAS, {"solver_order": 3}, {"solver_type": "bh1"}, {"thresholding": True}],
}
STOCHASTIC = [
    ("DDIMScheduler", {}, {"eta": 0.7}),
    ("DDPMScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("DPMSolverSDEScheduler", {}, {}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("KDPM2AncestralDiscreteScheduler", {}, {}),
    ("LCMScheduler", {}, {}),
    ("SASolverScheduler", {}, {}),
    ("TCDScheduler", {}, {"eta": 0.5}),
]
PAIRS = [(name, option) for name, options in OPTIONS.items() for option in options]
PART = [
    (i, KINDS[i % 7 == 0], PREDICTIONS[i % 3], SPACINGS[(i + shift) % 3], STEPS[(i + shift) % 5])
    for i in range(len(PAIRS))
    for shift in (0, 2)
]


def cases(every):
    """The combinations of `make matrix`, or the part of `make test`."""
    for i, *case in itertools.product(range(len(PAIRS)), KINDS, PREDICTIONS, SPACINGS, STEPS) if every else PART:
        name, option = PAIRS[i]
        words = [name.removesuffix("Scheduler"), *map(str, option.values()), *map(str, case)]
        yield pytest.param(name, option, *case, id="-".join(words))


def pytest_generate_tests(metafunc):
    if "spacing" in metafunc.fixturenames:
        names = ("name", "option", "kind", "prediction", "spacing", "steps")
        metafunc.parametrize(names, list(cases(metafunc.config.getoption("--matrix"))))


@pytest.fixture(scope="module")
def pipelines(random_pipeline):
    return {kind: random_pipeline(kind, 8, "epsilon") for kind in KINDS}


def scheduler_of(name, option, prediction, spacing):
    """The scheduler as a model of this kind would come with it; what its class does not know, diffusers passes over."""
    cls = getattr(diffusers, name)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return cls.from_config({**noise, "prediction_type": prediction, "timestep_spacing": spacing, **option})


def stock(pipe, scheduler, steps, prompts=PROMPTS, seeds=SEEDS, **options):
    """The latents of diffusers' own pipeline."""
    pipe.scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, "noise_sampler_seed"):
        pipe.scheduler.noise_sampler_seed = list(seeds)  # ours seeds each sample's Brownian path as the sample
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"guidance_scale": SCALE, "generator": generators, "output_type": "latent", **options}
    return pipe(prompts, num_inference_steps=steps, **settings).images


def ours(pipe, scheduler, steps, prompts=PROMPTS, seeds=SEEDS, **options):
    sampler = Sampler.from_pipeline(pipe, copy.deepcopy(scheduler))
    return sampler(prompts, seeds, steps, Guidance.cfg(SCALE), output="latent", progress=False, **options).latents


def test_plain_guidance_is_the_stock_pipelines(pipelines, name, option, kind, prediction, spacing, steps):
    pipe = pipelines[kind]
    try:
        scheduler = scheduler_of(name, option, prediction, spacing)
        expected = stock(pipe, scheduler, steps)
    except Exception as error:  # whatever diffusers raises where it cannot run this itself
        pytest.skip(f"diffusers: {error}")
    if not expected.isfinite().all():
        pytest.skip("diffusers' own latents are not finite")
    try:
        found = ours(pipe, scheduler, steps)
    finally:
        pipe.scheduler = scheduler
    difference, std = (found - expected).abs().max().item(), expected.std().item()
    if difference > 1e-3 * std:  # clipping and extreme noise levels amplify rounding, diffusers' own as ours
        alone = torch.cat([stock(pipe, scheduler, steps, [p], [s]) for p, s in zip(PROMPTS, SEEDS, strict=True)])
        exact = stock(copy.deepcopy(pipe).to(torch.float64), scheduler, steps)
        rounding = max((other - expected).abs().max().item() for other in (alone, exact))
        assert difference <= 2 * rounding


@pytest.mark.parametrize(("name", "option", "options"), STOCHASTIC, ids=[name for name, *_ in STOCHASTIC])
def test_noise_is_the_samples_own(pipelines, name, option, options):
    """Alone = in a batch of three = again, whatever torch's global generator holds, and other noise for another seed."""
    pipe, scheduler = pipelines["sd"], scheduler_of(name, option, "epsilon", "leading")
    prompts, seeds = ["a picture of a cat"] * 3, [7, 8, 9]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    three = ours(pipe, scheduler, 4, prompts, seeds, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again = ours(pipe, scheduler, 4, prompts, seeds, **options)
    alone = torch.cat([ours(pipe, scheduler, 4, prompts[:1], [seed], **options) for seed in seeds])
    exact = torch.cat([ours(pipe, scheduler, 4, prompts[:1], [seed], **options) for seed in reversed(seeds)]).flip(0)
    assert torch.equal(again, three) and torch.equal(exact, alone)
    assert (three - alone).abs().max() <= 1e-3 * three.std()
    assert (three[0] - three[1]).abs().max() > 0.1 * three.std()
    expected = stock(pipe, scheduler, 4, prompts, seeds, **({} if not options else {"eta": options["eta"]}))
    assert (three - expected).abs().max() <= 1e-3 * three.std()
