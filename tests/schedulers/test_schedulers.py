"""Schedulers: which names go with which model, where a timestep lies on another noise schedule, what is refused."""

import copy

import diffusers
import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler
from basinescape.kernels import definition
from basinescape.schedulers.schedule import SCHEDULERS, Schedule, family, make_scheduler
from basinescape.schedulers.solver_coefficients import Solver

STEPS = 12
PROMPTS, SEEDS = ["a picture of a cat signed by arno", "a picture of a frog"], [3, 1]


def sample(pipe, scheduler, guidance=Guidance.cfg(7.5), steps=STEPS, **options):
    sampler = Sampler.from_pipeline(pipe, scheduler)
    return sampler(PROMPTS, SEEDS, steps, guidance, output="latent", progress=False, **options)


def own(pipe, scheduler, steps=STEPS, **options):
    """The latents of diffusers' own pipeline."""
    stock = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(scheduler)}, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    settings = {"guidance_scale": 7.5, "generator": generators, "output_type": "latent", **options}
    return stock(PROMPTS, num_inference_steps=steps, **settings).images


def scheduler_of(pipe, name, **config):
    return getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config, **config)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_name_keeps_the_formulation_or_is_refused(pipe, name):
    for current in (pipe.scheduler, diffusers.EDMEulerScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        formulation = name.split("-")[0] if name.startswith(("edm-", "flow-")) else "vp"
        if formulation == family(current):
            assert family(make_scheduler(name, current)) == formulation
        else:
            with pytest.raises(ValueError, match="formulation"):
                make_scheduler(name, current)


def test_own_is_the_pipelines(pipe):
    assert make_scheduler("own", pipe.scheduler) is pipe.scheduler is make_scheduler(None, pipe.scheduler)


# Continuous ones: the level is where the scheduler's own noise has the ratio to the data that its training schedule has there.
MAPPED = [
    ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("EDMEuler", {}),
    ("EDMDPMSolverMultistep", {"sigma_data": 1.0}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}),
    ("UniPCMultistep", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
]


@pytest.mark.parametrize(("name", "config"), MAPPED, ids=[name for name, _ in MAPPED])
def test_a_level_has_the_noise_of_its_timestep(name, config):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    solver = Solver.of(scheduler, Schedule(STEPS))
    scheduler.set_timesteps(STEPS)
    sigmas, level = scheduler.sigmas[: len(solver.level)].double(), solver.level.double()
    assert (level.diff() <= 0).all() and level.min() >= 0 and level.max() <= 1000
    if family(scheduler) == "flow":  # x = (1 - t) x_0 + t n, and t runs over the training schedule's 0..1000
        torch.testing.assert_close(level / 1000, sigmas, rtol=1e-5, atol=1e-5)
        return
    trained = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alphas = trained.alphas_cumprod if family(scheduler) == "edm" else scheduler.alphas_cumprod
    ratio = sigmas / scheduler.config.get("sigma_data", 1.0)
    known = ((1 - alphas) / alphas).sqrt().double()
    inside = (ratio > known[0]) & (ratio < known[-1])
    assert inside.sum() > 3
    below, above = known[level[inside].long()], known[(level[inside].long() + 1).clamp(max=999)]
    assert ((below <= ratio[inside] * 1.001) & (ratio[inside] <= above * 1.001)).all()


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "HeunDiscrete", "EDMEuler", "EDMDPMSolverMultistep"])
@pytest.mark.parametrize(
    "guidance",
    [
        Guidance.delayed(7.5, until=At(500)),
        Guidance.cfg(7.5, interval=(200, 700)),
        Guidance.cfg(7.5, shape="linear"),
    ],
    ids=repr,
)
def test_guidance_by_timesteps_is_never_without_effect(pipe, name, guidance):
    scheduler = scheduler_of(pipe, name)
    plain, found = sample(pipe, scheduler), sample(pipe, scheduler, guidance)
    assert (plain.latents - found.latents).abs().max() > 0.05 * plain.latents.std()
    if guidance.until is not None:
        solver = Solver.of(scheduler, Schedule(STEPS))
        levels = solver.level[solver.first_calls]
        step = found.transition_step[0].item()
        assert 0 < step < STEPS and levels[step] <= 500 < levels[step - 1]


def test_timesteps_of_no_training_schedule_are_refused_where_they_matter(pipe):
    scheduler = diffusers.IPNDMScheduler()
    assert sample(pipe, scheduler).latents.shape == (2, 4, 16, 16)
    named = ({"shape": "cosine"}, {"interval": (200, 700)}, {"restart": (300, 500, 1)})
    for guidance in (Guidance.delayed(7.5, until=At(500)), *(Guidance.cfg(7.5, **one) for one in named)):
        with pytest.raises(ValueError, match="asks for timesteps"):
            sample(pipe, scheduler, guidance)


@pytest.mark.parametrize(
    ("name", "config", "calls"),
    [
        ("DDIM", {}, lambda n: list(range(n))),
        ("HeunDiscrete", {}, lambda n: [k // 2 for k in range(2 * n - 1)]),
        ("KDPM2Ancestral" + "Discrete", {}, lambda n: [k // 2 for k in range(2 * n - 1)]),
        ("PNDM", {"skip_prk_steps": True}, lambda n: [0, *range(n)]),
        ("PNDM", {"skip_prk_steps": False}, lambda n: [0] * 4 + [1] * 4 + [2] * 4 + list(range(3, n))),
    ],
)
def test_a_step_is_a_step_however_often_it_calls_the_network(pipe, name, config, calls):
    scheduler = scheduler_of(pipe, name, **config)
    assert Solver.of(scheduler, Schedule(STEPS)).step.tolist() == calls(STEPS)
    out = sample(pipe, scheduler)
    assert out.noise_gap.shape == (2, STEPS) and out.noise_gap.isfinite().all()
    assert len(out.timesteps) == STEPS and (out.timesteps.diff() < 0).all()


UNUSABLE = ["CogVideoXDPM", "RePaint", "SCM", "ConsistencyDecoder", "DDPMWuerstchen", "VQDiffusion", "ScoreSdeVe"]


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_is_refused_in_one_line(pipe, name):
    try:
        scheduler = getattr(diffusers, f"{name}Scheduler")(**({"num_vec_classes": 8} if name == "VQDiffusion" else {}))
    except AttributeError:
        from diffusers.schedulers.scheduling_consistency_decoder import ConsistencyDecoderScheduler

        scheduler = ConsistencyDecoderScheduler()
    with pytest.raises(ValueError, match="scheduler") as raised:
        sample(pipe, scheduler)
    assert "\n" not in str(raised.value)


def test_noise_that_no_seed_decides_is_refused(pipe):
    class Wandering(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):
            moved = super().step(model_output, timestep, sample).prev_sample
            return (moved + 0.1 * torch.randn(moved.shape),)

    with pytest.raises(ValueError, match="no seed decides"):
        sample(pipe, Wandering.from_config(pipe.scheduler.config))


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("DDIM", 8, {"eta": 0.6}),
        ("TCD", 8, {"eta": 0.3}),
        ("EulerDiscrete", 8, {"sigmas": [12.0, 6.0, 3.0, 1.5, 0.5]}),
        ("DPMSolverMultistep", 8, {"timesteps": [901, 700, 500, 300, 100]}),
        ("DPMSolverMultistep", 8, {"guidance_rescale": 0.7}),
        ("UniPCMultistep", 8, {"guidance_rescale": 0.7}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_have_diffusers_meaning(pipe, name, steps, options):
    scheduler = scheduler_of(pipe, name)
    found, expected = sample(pipe, scheduler, steps=steps, **options).latents, own(pipe, scheduler, steps, **options)
    assert (found - expected).abs().max() <= 1e-3 * expected.std()
    assert (found - sample(pipe, scheduler, steps=steps).latents).abs().max() > 1e-2 * expected.std()


@pytest.mark.parametrize("offset", [1, 0], ids=["between two steps", "at a step"])
def test_a_run_that_ends_early_is_the_first_part_of_the_run(random_pipeline, offset):
    pipe = random_pipeline("sdxl", 8, "epsilon")
    pipe.scheduler = scheduler_of(pipe, "DDIM", steps_offset=offset)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    settings = {"num_inference_steps": 10, "guidance_scale": 7.5, "generator": generators, "output_type": "latent"}
    expected = pipe(PROMPTS, denoising_end=0.7, **settings).images
    found = sample(pipe, None, steps=10, denoising_end=0.7)
    assert found.noise_gap.shape == (2, 7)
    assert (found.latents - expected).abs().max() <= 1e-3 * expected.std()


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep"])
def test_a_callback_sees_and_may_change_the_latents(pipe, name):
    def halve(_, index, timestep, given):
        seen.append((index, float(timestep)))
        return {"latents": given["latents"] * 0.5} if index == 2 else {}

    scheduler, seen = scheduler_of(pipe, name), []
    found = sample(pipe, scheduler, steps=6, callback_on_step_end=halve).latents
    ours, seen = seen, []
    expected = own(pipe, scheduler, 6, callback_on_step_end=halve)
    assert ours == seen and len(ours) == 6
    assert (found - expected).abs().max() <= 1e-3 * expected.std()


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 2.0},
        {"timesteps": [1.0], "sigmas": [1.0]},
        {"timesteps": []},
        {"sigmas": ["high"]},
        {"sigmas": [14.0, -3.0, 0.5]},
        {"denoising_end": 1.5},
        {"denoising_end": 0.01},
        {"guidance_rescale": -1},
        {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bad_options_are_named(pipe, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sample(pipe, None, **options)


def test_a_bad_option_is_named_where_the_scheduler_takes_its_own_steps_too(pipe):
    with pytest.raises(ValueError, match="guidance_rescale"):
        sample(pipe, scheduler_of(pipe, "UniPCMultistep"), steps=3, guidance_rescale=-1)


def test_a_scheduler_that_cannot_take_so_many_steps_says_so(pipe):
    with pytest.raises(ValueError, match="DDIMScheduler cannot take 1000 steps"):
        sample(pipe, pipe.scheduler, steps=1000)
    with pytest.raises(ValueError, match="timesteps"):
        sample(pipe, scheduler_of(pipe, "DDIM"), timesteps=[900, 500])


def test_measuring_leaves_torchs_generator_alone(pipe):
    before = torch.random.get_rng_state()
    for name in ("EulerAncestralDiscrete", "DPMSolverSDE", "DDIM"):
        Solver.of(scheduler_of(pipe, name), Schedule(5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_heun_keeps_its_linear_path_at_extreme_noise():
    scheduler = diffusers.HeunDiscreteScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    assert Solver.of(scheduler, Schedule(20)).coefficients is not None


def test_the_first_minimum_counts_steps(pipe):
    """Under Heun the second call of a step neither shows nor hides a minimum."""
    out = sample(pipe, scheduler_of(pipe, "HeunDiscrete"), Guidance.delayed(7.5, until=FirstMinimum()))
    for gaps, found in zip(out.noise_gap.tolist(), out.transition_step.tolist(), strict=True):
        minima = [k for k in range(2, STEPS) if definition.is_minimum(*gaps[k - 2 : k + 1])]
        assert found == (minima[0] if minima else -1)
