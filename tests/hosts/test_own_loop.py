"""Escape, in a loop that knows nothing of ours: against the definition, against the sampler, alone and in a batch."""

import math

import pytest
import torch
from basinescape import At, Escape, Fallen, FirstMinimum, Guidance, Sampler, Settled
from basinescape.detection.basin_score import Probe
from basinescape.hosts.own_loop import judge
from basinescape.kernels import definition
from basinescape.kernels.table import Column
from diffusers import DDIMScheduler, StableDiffusionPipeline
from rounding import assert_same_but_for_rounding

STEPS, BATCH = 8, 3
LEVELS = [900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 200.0, 50.0]
GUIDANCES = [
    Guidance.cfg(4.0),
    Guidance.cfg(7.5, shape="cosine", interval=(100, 850)),
    Guidance.delayed(7.5, until=At(650)),
    Guidance.delayed(5.0, until=Settled((6.0,) * STEPS, wait=2)),
    Guidance.opposite(2.0, scale=7.5, until=FirstMinimum(drop=0.05)),
    Guidance.opposite(1.0, scale=3.0, until=Fallen(0.7), rule="apg", eta=0.5),
    Guidance.delayed(6.0, until=FirstMinimum(latest=5), before=1.0, rule="rescale"),
]


def predictions(calls, batch=BATCH, seed=0):
    """(uncond, cond) of each call, with gaps that go up and down."""
    rng = torch.Generator().manual_seed(seed)
    uncond, cond = torch.randn((2, calls, batch, 4, 6, 5), generator=rng).unbind()
    swing = 1 + 0.5 * torch.cos(torch.arange(calls)[:, None] + torch.arange(batch))
    return list(zip(uncond, uncond + swing[..., None, None, None] * cond, strict=True))


def expected(guidance, given, step, sample):
    """Guided predictions, gaps and transition of one sample, by the definition."""
    first = [k == 0 or step[k] != step[k - 1] for k in range(len(step))]
    columns = guidance.calls(LEVELS, torch.tensor(step), torch.tensor(first))
    table = torch.stack([columns.get(name, torch.zeros(len(step))) for name in Column], dim=1)
    way = definition.Sample(given[0][0][sample], (math.nan,) * (step[-1] + 1), 0, len(step) - 1)
    guided = []
    for row, (uncond, cond) in enumerate(given):
        way, prediction = definition.look(way, uncond[sample], cond[sample], table, guidance.rule)
        way = definition.replace(way, row=row + 1)
        guided.append(prediction)
    return torch.stack(guided), way.gaps, way.transition if way.transition <= step[-1] else -1


@pytest.mark.parametrize("step", [list(range(STEPS)), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]], ids=["first", "second"])
@pytest.mark.parametrize("guidance", GUIDANCES, ids=repr)
def test_each_call_is_the_definitions(guidance, step):
    given = predictions(len(step))
    state = Escape(guidance, LEVELS, BATCH, step=step)
    guided = torch.stack([state(uncond, cond) for uncond, cond in given])
    for sample in range(BATCH):
        wanted, gaps, transition = expected(guidance, given, step, sample)
        assert state.transition_step[sample] == transition
        assert torch.allclose(state.noise_gap[sample], torch.tensor(gaps), rtol=1e-5)
        assert torch.allclose(guided[:, sample].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
def test_the_kernel_does_the_same():
    test_each_call_is_the_definitions(GUIDANCES[4], list(range(STEPS)))


def test_each_sample_may_have_a_guidance_of_its_own():
    guidances, given = GUIDANCES[2:5], predictions(STEPS)
    state = Escape(guidances, LEVELS, BATCH)
    together = [state(uncond, cond) for uncond, cond in given]
    assert len(set(state.transition_step.tolist())) == BATCH
    for i, guidance in enumerate(guidances):
        alone = Escape(guidance, LEVELS, 1)
        for (uncond, cond), guided in zip(given, together, strict=True):
            assert torch.equal(alone(uncond[i : i + 1], cond[i : i + 1])[0], guided[i])
        assert alone.transition_step[0] == state.transition_step[i]


@pytest.mark.parametrize("guidance", GUIDANCES, ids=repr)
def test_timesteps_may_be_told_one_by_one(guidance):
    known, told = Escape(guidance, LEVELS, BATCH), Escape(guidance, STEPS, BATCH)
    for (uncond, cond), level in zip(predictions(STEPS), LEVELS, strict=True):
        assert torch.equal(known(uncond, cond), told(uncond, cond, timestep=level))
        assert torch.equal(known.weight, told.weight)
    assert torch.equal(known.transition_step, told.transition_step)


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [
        (GUIDANCES[0], ["both"] * STEPS),
        (GUIDANCES[2], ["uncond"] * 3 + ["both"] * 5),
        (Guidance.delayed(1.0, until=At(400)), ["uncond"] * 5 + ["cond"] * 3),
        (GUIDANCES[6], ["both"] * STEPS),
        ([GUIDANCES[2], GUIDANCES[2], Guidance.delayed(7.5, until=At(850))], ["uncond"] + ["both"] * 7),
    ],
    ids=repr,
)
def test_a_prediction_that_nobody_needs_is_not_asked_for(guidance, branches):
    whole, state = Escape(guidance, LEVELS, BATCH), Escape(guidance, STEPS, BATCH)
    for (uncond, cond), level, branch in zip(predictions(STEPS), LEVELS, branches, strict=True):
        assert whole.branch() == state.branch(level) == branch
        given = {"both": (uncond, cond), "uncond": (uncond, None), "cond": (cond, None)}[branch]
        assert torch.allclose(state(*given, timestep=level), whole(uncond, cond), atol=1e-6)
    assert torch.equal(state.transition_step, whole.transition_step)
    assert state.noise_gap.isnan()[0].tolist() == [branch != "both" for branch in branches]
    with pytest.raises(ValueError, match="this call needs both predictions"):
        Escape(GUIDANCES[0], LEVELS, BATCH)(uncond, None)


def test_predictions_may_lie_in_memory_as_they_like_and_the_result_have_another_dtype():
    uncond, cond = (x.to(torch.bfloat16) for x in predictions(1)[0])
    plain = Escape(Guidance.cfg(3.0), [500.0], BATCH)(uncond, cond)
    assert plain.dtype == torch.bfloat16
    skipping = [torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in (uncond, cond)]
    assert torch.equal(Escape(Guidance.cfg(3.0), [500.0], BATCH)(*skipping), plain)
    last = [x.to(memory_format=torch.channels_last) for x in (uncond, cond)]
    wide = Escape(Guidance.cfg(3.0), [500.0], BATCH)(*last, dtype=torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.to(torch.bfloat16), plain)


def test_a_run_begun_in_inference_mode_goes_on_outside():
    given = predictions(2)
    with torch.inference_mode():
        state = Escape(Guidance.cfg(3.0), [500.0, 400.0], BATCH)
        state(*given[0])
    assert torch.equal(state(*given[1]), Escape(Guidance.cfg(3.0), [400.0], BATCH)(*given[1]))


def own_loop(pipe, guidance, prompt, seed):
    """What a user would write around the pipeline's parts; the state after it, and the latents."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    cond, uncond = pipe.encode_prompt(prompt, "cpu", 1, True)
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    state = Escape(guidance, scheduler.timesteps, 1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = pipe.unet(torch.cat([latents] * 2), t, torch.cat([uncond, cond])).sample.chunk(2)
            latents = scheduler.step(state(*both), t, latents).prev_sample
    return state, latents


@pytest.mark.parametrize("guidance", [GUIDANCES[2], GUIDANCES[6]], ids=repr)
def test_a_loop_of_ones_own_is_the_sampler(pipe, guidance):
    prompt = "a picture of a cat signed by arno"

    def sampled():
        out = Sampler.from_pipeline(pipe, "ddim")(prompt, 3, STEPS, guidance, output="latent", progress=False)
        return out.latents, out.transition_step

    pipe = StableDiffusionPipeline(**{**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config)})
    state, latents = own_loop(pipe, guidance, prompt, 3)
    assert_same_but_for_rounding((latents, state.transition_step), sampled(), pipe, sampled)


def test_a_transition_may_be_a_log_snr():
    """Of the steps' own, where they are given; told one by one they are not known."""
    given, noise = predictions(STEPS), [-6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 2.0, 5.0]
    told = [Guidance.delayed(7.5, until=At(log_snr=-3.0)), Guidance.delayed(7.5, until=At(log_snr=9.0)), Guidance.cfg(7.5)]
    state = Escape(told, LEVELS, BATCH, log_snrs=noise)
    for uncond, cond in given:
        state(uncond, cond)
    assert state.transition_step.tolist() == [2, -1, 0]
    with pytest.raises(ValueError, match="asks for the noise levels of the steps, and they are not known"):
        Escape(told, LEVELS, BATCH)
    with pytest.raises(ValueError, match="log_snrs must be one for each of 8 steps, got"):
        Escape(told, LEVELS, BATCH, log_snrs=noise[1:])


def test_a_loop_of_ones_own_judges_as_the_sampler(pipe):
    """Whatever else the network is given, alone and in a batch."""
    words, seeds = ["a picture of a cat signed by arno", "a picture of a frog"], [3, 8]
    sampler = Sampler.from_pipeline(pipe, "ddim")
    latents = sampler(words, seeds, STEPS, Guidance.cfg(7.5), output="latent", progress=False).latents
    expected = sampler.judge(latents, words, seeds)

    def asked(rows):
        cond, uncond = pipe.encode_prompt(words[rows], "cpu", 1, True)

        def predict(x, timesteps):
            return pipe.unet(torch.cat([x, x]), torch.cat([timesteps] * 2), torch.cat([uncond, cond])).sample.chunk(2)

        return predict

    found = judge(asked(slice(None)), sampler.scheduler, latents, seeds)
    assert torch.allclose(found.score, expected.score, atol=1e-5) and torch.equal(found.suspect, expected.suspect)
    alone = judge(asked(slice(1, 2)), Probe.of(sampler.scheduler), latents[1:], 8)
    assert torch.allclose(alone.score, found.score[1:], atol=1e-5)
    between = found.score.mean().item()
    assert judge(asked(slice(None)), sampler.scheduler, latents, seeds, between).suspect.sum() == 1
    for message, given in {
        "seeds must be as many as images": {"seeds": [1]},
        "probes must be a whole number of at least 1": {"probes": 0},
        "threshold must be a finite number": {"threshold": math.nan},
        "scheduler must be a scheduler of diffusers or a Probe, got 'ddim'": {"scheduler": "ddim"},
        "latents are torch.uint8; they must be numbers with a fraction": {"latents": latents.to(torch.uint8)},
    }.items():
        with pytest.raises(ValueError, match=message):
            judge(**{"predict": asked(slice(None)), "scheduler": sampler.scheduler, "latents": latents} | given)


GUARD = Guidance.guard(4.0)


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("guidance must be a Guidance", {"guidance": 7.5}),
        ("guidance has 1 entries for 3 samples", {"guidance": [Guidance.cfg(1.0)]}),
        ("one rule in a batch, got 'apg' beside 'cfg'", {"guidance": [*GUIDANCES[:2], GUIDANCES[5]]}),
        (r"use Sampler or escape\(pipe, guard\), or plain guidance here", {"guidance": GUARD}),
        ("needs a loop that can: use Sampler", {"guidance": Guidance.cfg(4.0, restart=(300, 500, 1))}),
        ("asks for timesteps in 0..1000", {"timesteps": [math.nan] * STEPS}),
        ("ordinary has 8 gaps, but the sampler takes 2 steps", {"guidance": GUIDANCES[3], "timesteps": [900.0, 50.0]}),
        (r"timesteps must be one or more numbers in 0\.\.1000", {"timesteps": [9000.0]}),
        ("timesteps must be a whole number", {"timesteps": 0}),
        (r"timesteps must be one or more numbers in 0\.\.1000.*got 'all'", {"timesteps": "all"}),
        (r"asks for timesteps that fall, in 0\.\.1000", {"timesteps": LEVELS[::-1]}),
        (r"asks for timesteps that fall, in 0\.\.1000 \(a flow's t times 1000\)", {"timesteps": torch.linspace(1, 0.1, STEPS)}),
        ("asks for steps whose log SNRs rise", {"log_snrs": LEVELS, "guidance": Guidance.delayed(7.5, until=At(log_snr=-1.0))}),
        ("step must count the 8 timesteps", {"step": [0, 8]}),
        ("step must count the 8 timesteps", {"step": [0, 1]}),
        ("step must count the 8 timesteps", {"step": range(STEPS)[::-1]}),
        ("batch must be a whole number", {"batch": 0}),
    ],
)
def test_what_it_cannot_do_is_one_line(message, given):
    with pytest.raises(ValueError, match=message) as error:
        Escape(**{"guidance": Guidance.delayed(7.5, until=At(500)), "timesteps": LEVELS, "batch": BATCH} | given)
    assert "\n" not in str(error.value)


def test_a_call_that_does_not_fit_is_refused():
    state = Escape(Guidance.delayed(7.5, until=At(500)), 1, BATCH)
    uncond, cond = predictions(1)[0]
    with pytest.raises(ValueError, match="asks for timesteps"):
        state(uncond, cond)
    with pytest.raises(ValueError, match="uncond has 2 samples; the run was made for 3"):
        state(uncond[:2], cond[:2], timestep=400)
    with pytest.raises(ValueError, match="cond has shape"):
        state(uncond, cond[..., :1], timestep=400)
    with pytest.raises(ValueError, match=r"uncond is a NoneType; it must be a torch\.Tensor"):
        state(None, cond, timestep=400)
    with pytest.raises(ValueError, match=r"timesteps must be one or more numbers in 0\.\.1000"):
        state(uncond, cond, timestep=torch.tensor([400, 400, 400]))
    with pytest.raises(ValueError, match=r"dtype must be one of float32, float16, bfloat16, got torch\.int32"):
        state(uncond, cond, timestep=400, dtype=torch.int32)
    state(uncond, cond, timestep=400)
    for call in (state, lambda *_, timestep: state.branch(timestep)):
        with pytest.raises(ValueError, match="the run has 1 calls of the network"):
            call(uncond, cond, timestep=300)


def test_each_result_has_the_dtype_of_its_own_call():
    state = Escape(Guidance.opposite(1.0, scale=4.0, until=FirstMinimum()), STEPS, BATCH)
    for k, (uncond, cond) in enumerate(predictions(STEPS)):
        own, asked = ((torch.float32, None), (torch.float16, None), (torch.float16, torch.float32))[k % 3]
        uncond, cond = uncond.to(own), cond.to(own)
        guided = state(uncond, cond, dtype=asked)
        exact = torch.stack([definition.guided(u, c, w) for u, c, w in zip(uncond, cond, state.weight.tolist(), strict=True)])
        assert guided.dtype == (asked or own)
        assert torch.allclose(guided.double(), exact, rtol=2e-3 if guided.dtype == torch.float16 else 1e-5, atol=1e-3)
