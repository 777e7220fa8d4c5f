"""`escape` beside what else changes a call: callbacks, other options, faulty numbers, caches; and what it leaves behind."""

import logging

import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, escape
from components import PIPELINES, build, call, stable_diffusion
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from rounding import close
from smallguards import FAILS, PASSES
from smallguards import delays as guard
from variants import VARIANTS

FOUR = Guidance.cfg(4.0)


def one(pipe, scale=4.0, **options):
    """A picture of one prompt: diffusers' callbacks that cut guidance off are for one."""
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 6, "output_type": "latent", "generator": generator, "guidance_scale": scale}
    return pipe("a picture of a cat signed by arno", **settings | options).images


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("sd", SDCFGCutoffCallback(cutoff_step_ratio=0.5)),
        ("sd", MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)])),
        ("sdxl", SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)),
    ],
    ids=["sd", "several", "sdxl"],
)
def test_guidance_that_a_callback_cuts_off_stays_off(random_pipeline, kind, cut):
    pipe = random_pipeline(kind, 8, "epsilon")
    expected = one(pipe, callback_on_step_end=cut)
    assert not torch.equal(expected, one(pipe))
    with escape(pipe, guard(FAILS, PASSES, until=1000)) as run:
        one(pipe, callback_on_step_end=cut)
    assert run.attempts.tolist() == [2] and run.score.isfinite().all()
    with escape(pipe, FOUR) as run:
        assert torch.equal(one(pipe, callback_on_step_end=cut), expected)
    assert run.calls < 6 and run.noise_gap.isnan().any()


def test_a_callback_that_sets_another_scale_is_refused(random_pipeline):
    def change(pipe, step, timestep, given):
        pipe._guidance_scale = 5.0
        return given

    pipe = random_pipeline("sd", 8, "epsilon")
    with escape(pipe, FOUR), pytest.raises(ValueError, match=r"has set guidance_scale to 5\.0, which escape cannot follow"):
        stable_diffusion(pipe, callback_on_step_end=change)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("LTXPipeline", "guidance_rescale"),
        ("ZImagePipeline", "cfg_normalization"),
    ],
)
def test_a_callback_that_sets_what_follows_guidance_is_refused(name, option):
    """The pipeline would do it to predictions that are guided already, where it changes nothing."""

    def change(pipe, step, timestep, given):
        setattr(pipe, "_" + option, 0.5)
        return given

    pipe = build(name)
    with escape(pipe, FOUR), pytest.raises(ValueError, match=rf"has set {option} to 0\.5, which escape cannot follow"):
        call(name, pipe, callback_on_step_end=change)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "QwenImagePipeline", "WanPipeline"])
def test_what_a_callback_returns_is_followed(name):
    """Prompts in the middle of a run, and latents at its end, which are what is judged."""
    pipe, shown = build(name), []

    def change(pipe, step, timestep, given):
        shown.append(sorted(given))
        return {"latents": 0.5 * given["latents"], "prompt_embeds": 0.5 * given["prompt_embeds"]}

    def plain(pipe, step, timestep, given):
        return {"prompt_embeds": 0.5 * given["prompt_embeds"]}

    watched = {"callback_on_step_end_tensor_inputs": ["prompt_embeds", "latents"]}
    expected = call(name, pipe, 4.0, callback_on_step_end=change, **watched)
    with escape(pipe, FOUR) as run:
        assert torch.equal(call(name, pipe, callback_on_step_end=change, **watched), expected)
        assert torch.equal(run._latents, expected) and run.judge().score.isfinite().all()
        shown.clear()
        only = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        found = call(name, pipe, callback_on_step_end=plain, **only)
    assert torch.equal(found, call(name, pipe, 4.0, callback_on_step_end=plain, **only))


def test_numbers_that_are_not_finite_are_the_pipelines_own(random_pipeline):
    """From the first prediction on, in one sample: nothing is refused, the other stays, and the verdict is suspect."""
    pipe = random_pipeline("sd", 8, "epsilon")

    def spoil(module, given, output):
        output[0][[0, 2]] = torch.nan

    expected = stable_diffusion(pipe, 4.0)
    handle = pipe.unet.register_forward_hook(spoil)
    with escape(pipe, guard(PASSES, PASSES)) as run:
        found = stable_diffusion(pipe)
    handle.remove()
    assert torch.equal(found[1], expected[1]) and found[0].isnan().all()
    assert (
        run.suspect.tolist() == [True, False]
        and run.attempts.tolist() == [2, 1]
        and run.score.isnan().tolist() == [True, False]
    )


def test_double_precision_is_refused_before_work(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon").to(torch.float64)
    work = pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with escape(pipe, FOUR), pytest.raises(ValueError, match=r"in torch.float64.*use pipe.to\(torch.float32\)"):
        stable_diffusion(pipe)
    work.remove()


def test_scales_are_left_as_they_were(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    stable_diffusion(pipe, 3.0, guidance_rescale=0.3)
    before = dict(vars(pipe))
    with escape(pipe, FOUR):
        stable_diffusion(pipe, 5.0, guidance_rescale=0.6)
        assert pipe.guidance_scale == 5.0 and pipe.guidance_rescale == 0.6  # as after any call
    assert {name: vars(pipe)[name] for name in before} == before and set(vars(pipe)) == set(before)
    fresh = random_pipeline("sd", 8, "epsilon")
    with escape(fresh, FOUR):
        stable_diffusion(fresh, 5.0)
    assert fresh.guidance_scale == 5.0


def test_it_holds_without_with_until_it_is_left(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    stock, host = stable_diffusion(pipe, 4.0), type(pipe)
    run = escape(pipe, Guidance.cfg(3.0))
    assert torch.equal(stable_diffusion(pipe, 4.0), stable_diffusion(pipe)) and run.weight.tolist() == [3.0, 3.0]
    run.leave()
    run.leave()
    assert type(pipe) is host and torch.equal(stable_diffusion(pipe, 4.0), stock) and run.noise_gap.isfinite().all()
    with escape(pipe, Guidance.cfg(2.0)) as other:
        run.leave()  # which leaves the other one as it is
        with pytest.raises(ValueError, match="this run has been left"):
            run.__enter__()
        stable_diffusion(pipe, 4.0)
    assert other.weight.tolist() == [2.0, 2.0] and type(pipe) is host


@pytest.mark.parametrize(
    ("guidance", "steps", "said"),
    [
        (Guidance.delayed(4.0, until=At(680)), 1, "none of 1 steps comes so far"),
        (Guidance.delayed(4.0, until=At(1000)), 3, "the first of 3 steps is past the transition already"),
        (Guidance.delayed(4.0, until=At(log_snr=-99)), 3, "the first of 3 steps is past the transition already"),
        (Guidance.delayed(4.0, until=FirstMinimum()), 2, "none of 2 steps comes so far"),
        (Guidance.delayed(4.0, until=At(log_snr=-2.0)), 6, None),
        (FOUR, 1, None),
    ],
    ids=repr,
)
def test_a_transition_that_changes_nothing_is_said(random_pipeline, caplog, guidance, steps, said):
    pipe = random_pipeline("sd", 8, "epsilon")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with caplog.at_level(logging.WARNING, "basinescape"), escape(pipe, guidance):
        stable_diffusion(pipe, num_inference_steps=steps)
    lines = [line for line in caplog.messages if "transition" in line]
    assert (said in lines[0] and len(lines) == 1) if said else not lines


def test_a_transition_that_never_came_is_said(random_pipeline, caplog):
    """The first minimum may be so shallow that it does not count: the log says so at the end, once."""
    pipe = random_pipeline("sd", 8, "epsilon")
    never = Guidance.delayed(4.0, until=FirstMinimum(drop=0.99))
    with caplog.at_level(logging.WARNING, "basinescape"), escape(pipe, [never, FOUR]) as run:
        stable_diffusion(pipe, 4.0)
    assert run.transition_step.tolist() == [-1, 0]
    assert [line for line in caplog.messages if "1 of 2 samples had no transition in 6 steps" in line]
    caplog.clear()
    with escape(pipe, FOUR):
        stable_diffusion(pipe, 4.0)
    assert not caplog.messages


def test_a_call_that_failed_has_no_pictures_to_judge(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")

    def fail(pipe, step, timestep, given):
        if step == 2:
            raise RuntimeError("in the middle")
        return given

    with escape(pipe, FOUR) as run:
        with pytest.raises(RuntimeError, match="in the middle"):
            stable_diffusion(pipe, callback_on_step_end=fail)
        assert run.calls == 3
        with pytest.raises(ValueError, match="was stopped in its last call"):
            run.judge()
        stable_diffusion(pipe)
        assert run.judge().score.isfinite().all() and run.calls == 6


@pytest.mark.parametrize(("given", "found"), [(7.5, 7.5), (1.0, 2.0)])
def test_a_callback_finds_the_scale_of_the_call_where_that_guides(random_pipeline, given, found):
    pipe, seen = random_pipeline("sd", 8, "epsilon"), []
    expected = stable_diffusion(pipe, 4.0)

    def look(pipe, step, timestep, latents):
        seen.append(pipe.guidance_scale)
        return latents

    with escape(pipe, FOUR):
        assert torch.equal(stable_diffusion(pipe, given, callback_on_step_end=look), expected)
        assert set(seen) == {found} and pipe.guidance_scale == given


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_whatever_a_pipeline_can_do_its_pictures_are_judged(random_pipeline, variant):
    pipe, options = variant(random_pipeline("sd", 8, "epsilon"))
    pipe.set_progress_bar_config(disable=True)
    expected = stable_diffusion(pipe, 4.0, **options)
    with escape(pipe, guard(PASSES)) as run:
        assert torch.equal(stable_diffusion(pipe, **options), expected)
    assert run.score.isfinite().all() and run.score.unique().numel() == 2 and torch.equal(run._latents, expected)
    before = run.score
    assert torch.equal(run.judge().score, before)


def test_a_network_that_keeps_parts_of_its_calls_judges_anew():
    """diffusers' caches: a probe is computed, and nothing of it is left for the next run."""
    name = "FluxPipeline"
    pipe = build(name, transformer=make_flux())
    with escape(pipe, FOUR) as run:
        plain = call(name, pipe)
        expected = run.judge().score
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    with escape(pipe, FOUR) as run:
        for _ in range(2):
            assert close(call(name, pipe), plain) and torch.allclose(run.judge().score, expected, atol=1e-5)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with escape(pipe, FOUR) as run:
        call(name, pipe)
        first = run.judge().score
        assert torch.equal(run.judge().score, first) and (first - expected).abs().max() < 1


@pytest.mark.parametrize("config", [PyramidAttentionBroadcastConfig, FasterCacheConfig])
def test_a_cache_that_asks_for_the_timestep_does_not_change_a_verdict(config):
    """Of the same latents: a pipeline has none between its calls, and what such a cache keeps is left out."""
    name, ranges = "CogVideoXPipeline", {"spatial_attention_block_skip_range": 2}
    if config is FasterCacheConfig:
        ranges |= {"unconditional_batch_skip_range": 2, "attention_weight_callback": lambda _: 0.3, "tensor_format": "BFCHW"}
    pipe = build(name)
    with escape(pipe, FOUR) as run:
        plain = call(name, pipe, steps=6)
        uncached = run._calls[-1]
    pipe.transformer.enable_cache(config(**ranges, current_timestep_callback=lambda: pipe.current_timestep))
    with escape(pipe, FOUR) as run:
        latents = call(name, pipe, steps=6)
        found = run.judge().score
    assert pipe.current_timestep is None and not torch.equal(latents, plain)
    pipe.transformer.disable_cache()
    assert torch.allclose(found, uncached.judge(0.3, 2, latents).score, atol=1e-4)


def make_flux():
    from components import make

    network, config = PIPELINES["FluxPipeline"].network
    torch.manual_seed(0)
    return make(network, config | {"num_layers": 2, "num_single_layers": 2})
