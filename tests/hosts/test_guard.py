"""Guards under `escape`: judged and begun again as our sampler does it, in every family; what else such a call may meet."""

import copy
import json
from dataclasses import replace
from itertools import islice
from unittest.mock import patch

import numpy as np
import pytest
import torch
from basinescape import At, Calibration, Guard, Guidance, Sampler, escape
from basinescape.detection.basin_score import Probe, nearer, noises
from basinescape.guidance.guard import PROBES, Attempt
from basinescape.hosts.pipeline_call import PipelineCall
from basinescape.models.fingerprint import fingerprint
from components import PIPELINES, SEEDS, WORDS, build, call, stable_diffusion
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from families import CASES
from rounding import close
from smallguards import FAILS, PASSES
from smallguards import delays as guard

FOUR = Guidance.cfg(4.0)


@pytest.fixture(scope="module")
def doubles():
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, build(name))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_is_judged_and_begun_again(doubles, name):
    """What passes keeps the bits of plain guidance; a verdict does not depend on the batch; the next attempt has new noise."""
    pipe = doubles(name)
    stock = call(name, pipe, 4.0)
    with escape(pipe, guard(PASSES, PASSES)) as run:
        assert torch.equal(call(name, pipe), stock)
    scores = run.score
    assert scores.isfinite().all() and run.attempts.tolist() == [1, 1] and not run.suspect.any() and run.calls == 3
    with escape(pipe, FOUR) as run:
        for i in range(2):
            call(name, pipe, rows=slice(i, i + 1))
            assert run.score is None and torch.allclose(run.judge().score, scores[i : i + 1], atol=1e-4)
            assert run.score is not None
    between = scores.mean().item()
    worse = int(scores.argmax())
    with escape(pipe, guard(between, PASSES)) as run:
        found = call(name, pipe)
    assert torch.equal(found[1 - worse], stock[1 - worse]) and not close(found[worse], stock[worse])
    assert run.attempts[worse] == 2 and run.attempts[1 - worse] == 1 and run.score[1 - worse] == scores[1 - worse]
    assert run.transition_step[1 - worse] == 0 and run.calls == 6 and not run.suspect.any()


STOCK = ["sd", "sdxl", *CASES]
UNPACKED = [name for name in STOCK if name not in ("flux", "qwen")]  # our sampler draws a further attempt's noise packed


@pytest.mark.parametrize(("name", "again"), [*((name, False) for name in STOCK), *((name, True) for name in UNPACKED)], ids=str)
def test_verdicts_are_the_samplers(tiny, random_pipeline, name, again):
    """Of a few steps, whatever the layout of latents and what the network is told of the time."""
    steps, attempts = 3, guard(FAILS, FAILS, PASSES) if again else guard(PASSES)
    if name in ("sd", "sdxl"):
        pipe, options = random_pipeline(name, 8, "v_prediction"), {}
    else:
        pipe, options = CASES[name].make(tiny.tokenizer), CASES[name].options
    out = Sampler.from_pipeline(pipe)(WORDS, SEEDS, steps, attempts, output="np", progress=False, **options)
    with escape(pipe, attempts) as run:
        if name in ("sd", "sdxl"):
            images = stable_diffusion(pipe, num_inference_steps=steps, output_type="np")
        else:
            images = CASES[name].stock(pipe, WORDS, SEEDS, steps, 2.0, ["", ""])
    assert run.attempts.tolist() == out.attempts.tolist() == [3 if again else 1] * 2
    assert torch.equal(run.transition_step, out.transition_step) and np.abs(images - out.images).max() <= 1 / 255
    whole = 1e-4 if name == "wan" else 1e-6  # its network is told whole timesteps by its pipeline
    assert torch.allclose(run.score, out.score, rtol=1e-2, atol=whole)


@pytest.mark.parametrize("name", ["FluxPipeline", "ZImagePipeline", "Lumina2Pipeline", "SanaPipeline", "WanPipeline"])
def test_half_precision_is_judged_nearly_alike(doubles, name):
    """What a network is told of the time is rounded there, and still known."""
    with escape(doubles(name), FOUR) as run:
        call(name, doubles(name))
    expected, pipe = run.judge().score, build(name).to(torch.bfloat16)
    with escape(pipe, FOUR) as run:
        stock = call(name, pipe)
        found = run.judge().score
    assert stock.isfinite().all() and found.dtype == torch.float32 and torch.allclose(found, expected, atol=0.05)


@pytest.mark.parametrize("name", ["AuraFlowPipeline", "ZImagePipeline", "Lumina2Pipeline"])
def test_what_a_pipeline_negates_is_judged_in_its_own_sign(doubles, name):
    """Networks that predict shares of what they are given: the scores follow from the noises alone."""
    pipe, shares, sign = doubles(name), (0.9, 0.2), 1 if name == "AuraFlowPipeline" else -1

    def predict(module, given, named, output):
        sample = given[0] if given else named["hidden_states"]
        if isinstance(sample, list):  # the conditional ones come first
            half = len(sample) // 2
            return ([sign * shares[i >= half] * x for i, x in enumerate(sample)],)
        if pipe_pairs:
            seen.append(0)
            return (sign * shares[(len(seen) - 1) % 2] * sample,)
        uncond, cond = sample.chunk(2)
        return (sign * torch.cat([shares[1] * uncond, shares[0] * cond]),)

    seen, pipe_pairs = [], name == "Lumina2Pipeline"
    handle = pipe.transformer.register_forward_hook(predict, with_kwargs=True)
    with escape(pipe, FOUR) as run:
        x0 = call(name, pipe)
        run.judge()
    handle.remove()
    probe = Probe.of(pipe.scheduler)
    for i in range(2):
        expected = []
        for noise in islice(noises(i, x0.shape[1:]), 2):
            given, target = probe.question(x0[i : i + 1], noise[None])
            expected.append(nearer(target, shares[1] * given, shares[0] * given))
        assert torch.allclose(run.score[i], torch.stack(expected).mean(), atol=1e-4)


@pytest.mark.slow
def test_the_pipelines_that_ship_agree_with_the_sampler():
    folder = Sampler.model_path("flow")
    captions = [json.loads(line)["prompt"] for line in (folder / "memorized.jsonl").read_text().splitlines()]
    words, seeds, steps = [captions[1], captions[5]], [20001, 20005], 14
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    plan = Guidance.guard(
        7.0, attempts=[Guidance.delayed(7.0, until=At(log_snr=-2.8)), Guidance.delayed(7.0, until=At(log_snr=-1.5))]
    )
    out = Sampler.from_pipeline(pipe)(words, seeds, steps, plan, output="np", progress=False)
    with escape(pipe, plan) as run:
        made = pipe(
            words, num_inference_steps=steps, generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="np"
        )
    assert torch.equal(run.attempts, out.attempts) and run.attempts.max() > 1 and run.attempts.min() == 1
    assert torch.equal(run.suspect, out.suspect) and torch.allclose(run.score, out.score, atol=0.02)
    assert np.abs(made.images - out.images).max() <= 2 / 255


def test_a_guard_of_another_models_calibration_is_said(random_pipeline, caplog):
    """Not of the same model in another dtype or under offload; also of a guard that was written and read back."""
    pipe, other = random_pipeline("sd", 8, "epsilon"), random_pipeline("sd", 8, "epsilon")
    for parameter in other.unet.parameters():
        parameter.data.mul_(0.9)
    own = fingerprint(pipe)
    measured = Calibration({}, 6, 4.0, (900.0, 500.0), (1.0, 1.0), (0.0,) * 400, ((1.0, 1.0),) * 400, own)
    made = Guidance.guard(4.0, measured)
    for guarded, said in ((made, True), (replace(made, early=None), False)):
        caplog.clear()
        with escape(pipe, guarded):
            assert ["early look is left out" in message for message in caplog.messages] == [True] * said
    caplog.clear()
    with escape(other, replace(made, early=None)):
        assert "made on another model (its unet" in caplog.text
    for model, said in ((other, 1), (pipe, 0)):  # a sampler says it once a guard
        caplog.clear()
        sampler, guarded = Sampler.from_pipeline(model), replace(made, early=None)
        for seed in range(2):
            sampler(["a cat"], seed, 2, guarded, output="latent", progress=False)
        assert caplog.text.count("made on another model (its unet") == said
    caplog.clear()
    read = Guidance.from_dict(json.loads(json.dumps(replace(made, early=None).to_dict())))
    assert read == replace(made, early=None) and hash(read) == hash(replace(made, early=None))
    with escape(other, read):
        assert caplog.text.count("made on another model (its unet") == 1
    caplog.clear()
    with escape(copy.deepcopy(pipe).to(torch.bfloat16), replace(made, early=None)), escape(pipe, read):
        pass
    pipe.enable_sequential_cpu_offload(device="cpu")
    with escape(pipe, replace(made, early=None)):
        assert "another model" not in caplog.text


def test_the_output_is_the_pipelines_own_class(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    plain = stable_diffusion(pipe, 4.0, output_type="np")
    with escape(pipe, guard(PASSES)) as run:
        stable_diffusion(pipe)
    between, worse = run.score.mean().item(), int(run.score.argmax())
    images = {}
    with escape(pipe, guard(between, PASSES)) as run:
        for kind in ("pil", "np", "pt", "latent"):
            generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
            made = pipe(WORDS, num_inference_steps=6, output_type=kind, generator=generators)
            assert isinstance(made, StableDiffusionPipelineOutput) and len(made.images) == 2
            assert made.nsfw_content_detected is None and run.attempts[worse] == 2
            images[kind] = made.images
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        found, flagged = pipe(WORDS, num_inference_steps=6, output_type="np", generator=generators, return_dict=False)
    assert flagged is None and np.array_equal(found, images["np"])
    assert np.array_equal(found[1 - worse], plain[1 - worse]) and not np.allclose(found[worse], plain[worse], atol=1e-2)
    assert np.array_equal(np.asarray(images["pil"][worse]), (found[worse] * 255).round().astype(np.uint8))
    assert torch.equal(images["pt"][worse].permute(1, 2, 0), torch.from_numpy(found[worse]))


def test_what_stays_suspect_is_the_last_attempts_and_marked(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    with escape(pipe, guard(FAILS, FAILS, FAILS)) as run:
        stable_diffusion(pipe)
    assert run.attempts.tolist() == [3, 3] and run.suspect.all() and run.calls == 18 and run.weight.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("fails", ["the network", "the verdict"])
def test_an_error_in_a_later_attempt_keeps_what_there_is(random_pipeline, caplog, monkeypatch, fails):
    """The samples stay marked, the log says so, and the error is at hand; one in the first attempt is raised."""
    pipe, calls = random_pipeline("sd", 8, "epsilon"), []
    with escape(pipe, guard(FAILS)) as run:
        expected = stable_diffusion(pipe)
        score = run.score

    class Broken(Exception):
        pass

    def breaks(*given):
        calls.append(given)
        if len(calls) > steps:
            raise Broken

    with escape(pipe, guard(FAILS, PASSES, PASSES)) as run:
        if fails == "the verdict":
            own = PipelineCall.judge
            monkeypatch.setattr(PipelineCall, "judge", lambda call, *given: (breaks(), own(call, *given))[1])
            steps = 1
        else:
            handle, steps = pipe.unet.register_forward_pre_hook(lambda *given: breaks(given)), 6 + PROBES + 2
        found = stable_diffusion(pipe)
        assert torch.equal(found, expected) and torch.equal(run.score, score)
        assert run.suspect.all() and run.attempts.tolist() == [1, 1] and isinstance(run.error, Broken)
        assert "attempt 2 of the guard failed: 2 of 2 samples stay suspect" in caplog.text
        assert run.transition_step.tolist() == [0, 0] and run.calls == 6
        if fails == "the network":
            steps = 0
            with pytest.raises(Broken):
                stable_diffusion(pipe)
            handle.remove()
        else:
            calls.clear()
            monkeypatch.setattr(PipelineCall, "judge", own)
        stable_diffusion(pipe)
        assert run.error is None and not run.suspect.any()


def test_given_latents_are_the_first_attempts_alone(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    with escape(pipe, guard(FAILS, FAILS, until=1000)):  # delayed until the first step: plain guidance
        again = stable_diffusion(pipe, latents=latents)
    assert torch.equal(again, stable_diffusion(pipe, 4.0))
    with escape(pipe, guard(PASSES)):
        assert torch.equal(stable_diffusion(pipe, latents=latents), stable_diffusion(pipe, 4.0, latents=latents))


def test_noises_of_a_judgement_come_from_the_generators_seeds_and_change_no_other(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    state = torch.random.get_rng_state()
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    scores = []
    with escape(pipe, FOUR) as run:
        for generator in (None, torch.Generator().manual_seed(0), [torch.Generator().manual_seed(seed) for seed in (0, 5)]):
            pipe(WORDS, num_inference_steps=3, latents=latents, generator=generator, output_type="latent")
            scores.append(run.judge().score)
        assert torch.equal(run.judge(probes=1).score, run.judge(probes=1).score)
    assert torch.equal(scores[0], scores[1]) and scores[2][0] == scores[0][0] and scores[2][1] != scores[0][1]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_run_without_generators_goes_on_with_the_global_one(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    torch.manual_seed(11)
    with escape(pipe, guard(FAILS, FAILS, until=1000)) as run:
        found = pipe(WORDS, num_inference_steps=3, output_type="latent").images
    assert run.attempts.tolist() == [2, 2]
    torch.manual_seed(11)
    for _ in range(2):
        expected = pipe(WORDS, num_inference_steps=3, guidance_scale=4.0, output_type="latent").images
    assert torch.equal(found, expected)


def test_a_stopped_run_is_not_begun_again(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")

    def stop(pipe, step, timestep, given):
        pipe._interrupt = step == 1
        return given

    with escape(pipe, guard(FAILS, PASSES)) as run:
        stable_diffusion(pipe, callback_on_step_end=stop)
    assert run.calls == 2 and run.score is None and run.attempts.tolist() == [1, 1]
    with pytest.raises(ValueError, match="was stopped in its last call"):
        run.judge()


def test_pictures_that_cannot_be_judged_are_refused_before_work(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    pipe.scheduler.register_to_config(prediction_type="something")
    work = pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with escape(pipe, guard(PASSES)), pytest.raises(ValueError, match="scheduler predicts 'something'"):
        stable_diffusion(pipe)
    work.remove()
    restarting = Guidance.cfg(4.0, restart=(300, 500, 1))
    with pytest.raises(ValueError, match=r"restart.*use Sampler"):
        escape(pipe, Guard((Attempt(restarting, 0.3),)))
    pipe.scheduler.register_to_config(prediction_type="epsilon")
    with escape(pipe, FOUR) as run, pytest.raises(ValueError, match="judge is known when the pipeline has been called"):
        run.judge()


@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_an_offloaded_pipeline_is_judged_where_it_runs(tiny, device, name):
    """Parts that come and go: a verdict as without, and the network away again afterwards."""
    case, plain = CASES[name], CASES[name].make(tiny.tokenizer)
    given = WORDS, SEEDS, 2, 2.0, ["", ""], "latent"
    with patch("basinescape.kernels.dispatch.INTERPRETED", False), escape(plain, guard(PASSES)) as run:
        case.stock(plain, *given)
    expected, pipe = run.score, CASES[name].make(tiny.tokenizer)
    pipe.enable_model_cpu_offload(device="cuda")
    with escape(pipe, guard(FAILS, PASSES)) as run:
        case.stock(pipe, *given)
        assert run.attempts.tolist() == [2, 2] and pipe.transformer.device.type == "cpu"
    with escape(pipe, FOUR) as run:
        case.stock(pipe, *given)
        assert torch.allclose(run.judge().score, expected, rtol=1e-2, atol=1e-5) and pipe.transformer.device.type == "cpu"
    assert run.score.device.type == run.suspect.device.type == "cpu"
