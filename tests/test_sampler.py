"""The sampler on the pipeline that ships: against diffusers, against a plain loop, alone and in a batch."""

import copy
import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from basinescape import At, Calibration, Fallen, FirstMinimum, Guidance, Sampler, Settled
from basinescape.bench.evaluation.analyze import transition
from basinescape.kernels import definition
from basinescape.schedulers.schedule import make_scheduler
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from families import sd3
from rounding import LEEWAY, NEAR, assert_same_but_for_rounding, spread

STEPS = 8
PROMPTS = ["a picture of a cat signed by arno", "a picture of a frog", "a picture of a fish signed by dirk"]
SEEDS = [3, 1, 2]


def sample(pipe, scheduler, guidance, prompts=PROMPTS, seeds=SEEDS, output="latent"):
    sampler = Sampler.from_pipeline(pipe, scheduler)
    return sampler(prompts, seeds, STEPS, guidance, output=output, progress=False)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver++", "unipc"])
def test_plain_cfg_is_the_pipelines_own(pipe, scheduler):
    own = StableDiffusionPipeline(**{**pipe.components, "scheduler": make_scheduler(scheduler, pipe.scheduler)})
    own.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = own(PROMPTS, num_inference_steps=STEPS, guidance_scale=7.5, generator=generators, output_type="np").images
    found = sample(pipe, scheduler, Guidance.cfg(7.5), output="np").images
    assert np.abs(found - expected).max() <= 1 / 255


METHODS = [
    Guidance.delayed(7.5, until=At(500)),
    Guidance.delayed(7.5, until=FirstMinimum()),
    Guidance.opposite(2.0, scale=7.5, until=At(650)),
    Guidance.opposite(7.5, scale=7.5, until=FirstMinimum(earliest=3, latest=5)),
]


@pytest.fixture(scope="module")
def exact(pipe):
    """The same pipeline in float64."""
    return copy.deepcopy(pipe).to(torch.float64)


@pytest.fixture(scope="module")
def small_exact(small):
    return copy.deepcopy(small).to(torch.float64)


def plain_loop(pipe, scheduler, guidance, prompt, seed):
    """One sample in the pipeline's dtype, straight from the method's definitions: latents and transition step."""
    scheduler = make_scheduler(scheduler, pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    cond, uncond = pipe.encode_prompt(prompt, "cpu", 1, True)
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    latents = latents.to(pipe.unet.dtype)
    gaps, transition, rule = [], -1, guidance.until
    for k, t in enumerate(scheduler.timesteps):
        euler = isinstance(scheduler, EulerDiscreteScheduler)  # whose own step rounds to float32
        sigma, following = scheduler.sigmas[k : k + 2].to(latents) if euler else (None, None)
        x = latents / (sigma**2 + 1) ** 0.5 if euler else scheduler.scale_model_input(latents, t)
        u, c = pipe.unet(torch.cat([x, x]), t, torch.cat([uncond, cond]), return_dict=False)[0].chunk(2)
        gaps.append((c - u).norm().item())
        if transition < 0:
            if isinstance(rule, At):
                leaves = t <= rule.timestep
            else:
                minimum = k >= rule.earliest and definition.is_minimum(*gaps[k - 2 : k + 1])
                leaves = minimum or (rule.latest is not None and k >= rule.latest)
            transition = k if leaves else -1
        weight = guidance.scale if transition >= 0 else guidance.before
        guided = u + weight * (c - u)
        latents = latents + (following - sigma) * guided if euler else scheduler.step(guided, t, latents).prev_sample
    return latents, transition


@pytest.mark.parametrize(
    ("guidance", "scheduler"),
    [*zip(METHODS, ["ddim", "euler", "dpmsolver++", "unipc"], strict=True), (METHODS[1], "dpmsolver++")],
    ids=repr,
)
@torch.inference_mode()
def test_a_batch_is_the_plain_loop_of_each_sample(small, small_exact, scheduler, guidance):
    out = sample(small, scheduler, guidance)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        latents, transition = plain_loop(small_exact, scheduler, guidance, prompt, seed)
        assert out.transition_step[i] == transition
        off = (out.latents[i : i + 1] - latents).abs().max()
        if off > NEAR:  # what float32 does to a plain loop, which guidance amplifies
            assert off <= LEEWAY * spread(
                small.unet, lambda p=prompt, s=seed: plain_loop(small, scheduler, guidance, p, s)[0], latents
            )


@torch.inference_mode()
def test_samples_of_one_batch_transition_at_their_own_steps_and_some_never(pipe, exact):
    prompts, seeds = PROMPTS * 3, [3, 1, 2, 13, 11, 12, 23, 21, 22]
    guidance = Guidance.delayed(7.5, until=FirstMinimum())
    out = sample(pipe, "dpmsolver++", guidance, prompts, seeds)
    expected = [plain_loop(exact, "dpmsolver++", guidance, *pair)[1] for pair in zip(prompts, seeds, strict=True)]
    assert out.transition_step.tolist() == expected
    assert -1 in expected and len(set(expected)) > 2


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler-ancestral"])
@pytest.mark.parametrize("latest", [None, 6])
def test_samples_settle_where_their_gaps_say(pipe, scheduler, latest):
    free = sample(pipe, scheduler, Guidance.delayed(7.5, until=FirstMinimum(latest=None)))
    rule = Settled(tuple(free.noise_gap.median(dim=0).values.tolist()), factor=0.9, wait=2, latest=latest)
    out = sample(pipe, scheduler, Guidance.delayed(7.5, until=rule))
    expected = [transition(gaps, rule) for gaps in out.noise_gap.tolist()]
    assert out.transition_step.tolist() == [-1 if step is None else step for step in expected]
    assert len(set(expected)) > 1


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler-ancestral"])
@pytest.mark.parametrize(("share", "latest"), [(0.5, None), (0.8, 6)])
def test_samples_leave_where_their_gaps_have_fallen(pipe, scheduler, share, latest):
    """By the recorded gaps: the first below `share` of the largest before it, or the deadline."""
    guidance = Guidance.opposite(2.0, scale=7.5, until=Fallen(share, latest))
    out = sample(pipe, scheduler, guidance)
    assert Guidance.from_dict(guidance.to_dict()) == guidance
    for gaps, found in zip(out.noise_gap, out.transition_step.tolist(), strict=True):
        fallen = [k for k in range(1, STEPS) if gaps[k] < share * gaps[:k].max() or k == latest]
        assert found == next(iter(fallen), -1)


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler-ancestral"])
def test_a_sample_is_the_same_alone_in_seven_and_in_another_order(small, scheduler):
    guidance = METHODS[1]
    prompts, seeds = [PROMPTS[i % 3] for i in range(7)], list(range(7))
    order = [4, 0, 6, 2, 5, 1, 3]
    seven = sample(small, scheduler, guidance, prompts, seeds)
    turned = sample(small, scheduler, guidance, [prompts[i] for i in order], [seeds[i] for i in order])
    alone = sample(small, scheduler, guidance, prompts[2:3], seeds[2:3])
    for found, expected, chosen in ((turned, seven.latents[order], order), (alone, seven.latents[2:3], [2])):
        given = [prompts[i] for i in chosen], [seeds[i] for i in chosen]
        assert_same_but_for_rounding(
            found.latents, expected, small, lambda given=given: sample(small, scheduler, guidance, *given).latents
        )
    assert turned.transition_step.tolist() == seven.transition_step[order].tolist()
    assert alone.transition_step[0] == seven.transition_step[2]


def one_by_one(network):
    """The network for a sample at a time, which rounds the same in every batch."""

    def predict(latents, timesteps, branch):
        parts = [network.select(torch.tensor([i])) for i in range(len(latents) // (2 if branch == "both" else 1))]
        rows = [slice(i, None, len(parts)) for i in range(len(parts))]
        made = [part(latents[row], timesteps[row], branch) for part, row in zip(parts, rows, strict=True)]
        out = torch.empty_like(latents)
        for row, prediction in zip(rows, made, strict=True):
            out[row] = prediction
        return out

    return predict


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "euler"])
def test_the_loop_adds_nothing_of_the_batch(small, scheduler):
    sampler = Sampler.from_pipeline(small, scheduler).wrapped(one_by_one)
    settings = {"steps": STEPS, "guidance": METHODS[1], "output": "latent", "progress": False}
    batch, alone = sampler(PROMPTS, SEEDS, **settings), sampler(PROMPTS[2], SEEDS[2], **settings)
    assert torch.equal(alone.latents[0], batch.latents[2]) and alone.transition_step[0] == batch.transition_step[2]
    torch.testing.assert_close(alone.noise_gap[0], batch.noise_gap[2], rtol=0, atol=0, equal_nan=True)


def test_a_second_wrap_does_not_replace_the_first_in_silence(small):
    sampler = Sampler.from_pipeline(small)
    with pytest.raises(ValueError, match="wrap must be a function of a network, got None"):
        sampler.wrapped(None)
    with pytest.raises(ValueError, match=r"samples from .*one_by_one.* already"):
        sampler.wrapped(one_by_one).wrapped(lambda network: network)
    sampler.wrapped(lambda network: network)


def test_a_branch_nobody_needs_is_not_run(pipe):
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        out = sample(pipe, "ddim", Guidance.delayed(7.5, until=At(500)))
    finally:
        hook.remove()
    first = out.transition_step[0].item()
    assert 0 < first < STEPS
    assert rows == [3] * first + [6] * (STEPS - first)
    assert out.noise_gap[:, :first].isnan().all() and out.noise_gap[:, first:].isfinite().all()


@pytest.mark.parametrize(
    "guidance",
    [
        *METHODS,
        Guidance.delayed(np.int64(5), until=FirstMinimum(np.int64(2), np.int64(4), np.float32(0.5))),
        Guidance.cfg(5, shape=(1.0, 2.0), interval=(100, 900)),
        Guidance.cfg(5, rule="apg", eta=np.float32(0.5)),
    ],
    ids=repr,
)
def test_guidance_survives_serialisation_and_its_repr(guidance):
    assert Guidance.from_dict(json.loads(json.dumps(guidance.to_dict()))) == guidance
    assert eval(repr(guidance)) == guidance


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"seeds": [1]}, {"output": "jpg"}, {"guidance": 7.5}, {"height": 63}, {"prompts": []}],
    ids=lambda change: next(iter(change)),
)
def test_bad_arguments_are_named(pipe, change):
    arguments = {"prompts": PROMPTS, "seeds": SEEDS, "steps": STEPS, "progress": False} | change
    with pytest.raises(ValueError, match=next(iter(change))):
        Sampler.from_pipeline(pipe)(**arguments)


@pytest.mark.parametrize(("kind", "size"), [("sd", 16), ("sdxl", 16)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pipelines_of_other_shapes_give_the_pipelines_own_images(random_pipeline, kind, size, prediction):
    own = random_pipeline(kind, size, prediction)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    settings = {"negative_prompt": "fog", "height": 32, "width": 48}
    expected = own(
        ["a cat", "frog"],
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=generators,
        output_type="np",
        **{**settings, "negative_prompt": ["fog"] * 2},
    ).images
    sampler = Sampler.from_pipeline(own)
    found = sampler(["a cat", "frog"], [5, 6], 3, Guidance.cfg(4.0), output="np", progress=False, **settings).images
    assert found.shape == (2, 32, 48, 3)
    assert np.abs(found - expected).max() <= 1 / 255


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention": "flash"}, "attention"),
        ({"attention": "xformers"}, "xformers"),
        ({"capture": True}, "capture"),
        ({"scheduler": "nope"}, "scheduler"),
    ],
)
def test_a_sampler_that_cannot_be_made_says_why(pipe, change, says):
    with pytest.raises(ValueError, match=says):
        Sampler.from_pipeline(pipe, **change)


def test_a_pipeline_that_cannot_be_followed_is_refused(pipe, exact):
    decoderless = type(pipe)(**pipe.components)
    decoderless.vae = None
    for unfit, says in ((exact, "float64.*use pipe.to"), (decoderless, "pipe has no vae")):
        with pytest.raises(ValueError, match=says):
            Sampler.from_pipeline(unfit)


def test_pickled_weights_are_refused_unless_asked_for(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="pickle"):
        Sampler.from_pretrained(tmp_path, device="cpu")
    loaded = Sampler.from_pretrained(tmp_path, device="cpu", allow_pickle=True).pipe.unet.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in pipe.unet.state_dict().items())


def test_what_is_printed_can_be_read(small):
    """A line each, with what a person asks first: a tensor's numbers are in the fields."""
    sampler = Sampler.from_pipeline(small)
    out = sampler(["a cat", "a dog"], 0, 2, Guidance.guard(5.0, threshold=-9.0, attempts=[]), progress=False)
    said = repr(out)
    assert "\n" not in said and "2 images" in said and "2 suspect" in said and f"{out.score[0]:.2f}".rstrip("0") in said
    assert said.startswith("Output(2 images, latents 4 x 16 x 16, transition steps [0, 0], scores [")
    plain = replace(out, score=None, finite=torch.tensor([True, False]))
    assert repr(plain) == "Output(2 images, latents 4 x 16 x 16, transition steps [0, 0], 1 not finite)"
    assert repr(sampler).startswith(f"Sampler({type(small).__name__} on cpu, float32, ")


@pytest.mark.parametrize("calibration", ["tiny", Sampler.model_path("tiny"), Sampler.model_path("tiny") / "calibration.json"])
def test_a_guard_says_the_call_that_reads_a_calibration(calibration):
    with pytest.raises(ValueError, match=r"calibration must be a Calibration, got .*: give Calibration\.load\('") as refused:
        Guidance.guard(7.5, calibration)
    said = str(refused.value).partition(": give ")[2]
    assert Guidance.guard(7.5, eval(said, {"Calibration": Calibration})).early is not None


def test_steps_and_scale_are_those_of_the_models_own_pipeline(words):
    pipe = sd3(words)
    sampler, own = Sampler.from_pipeline(pipe), inspect.signature(type(pipe).__call__).parameters
    steps, scale = own["num_inference_steps"].default, own["guidance_scale"].default
    asked = sampler(["a cat"], 0, steps, Guidance.cfg(scale), output="latent", progress=False)
    assert torch.equal(sampler(["a cat"], output="latent", progress=False).latents, asked.latents)
