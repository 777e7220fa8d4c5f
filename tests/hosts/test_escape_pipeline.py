"""`escape` in stock diffusers pipelines of all families, against the pipelines themselves."""

import copy

import numpy as np
import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, escape
from components import PIPELINES, WORDS, build, call, prompts, stable_diffusion
from diffusers import DDIMPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, WanTransformer3DModel
from PIL import Image
from rounding import close
from smallguards import FAILS, PASSES
from smallguards import delays as guard

FOUR = Guidance.cfg(4.0)
PICTURE = Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def doubles():
    """Each pipeline of the matrix, made once."""
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, build(name))


@pytest.mark.parametrize("name", PIPELINES)
def test_plain_cfg_is_the_pipelines_own(doubles, name):
    """To the bit, but where our formula is not the pipeline's (c + s (c - u) is u + (s + 1) (c - u) rounded otherwise)."""
    pipe = doubles(name)
    stock = call(name, pipe, 4.0)
    assert (stock - call(name, pipe, 2.0)).abs().max() > 1e-3
    with escape(pipe, FOUR) as run:
        found = call(name, pipe, 3.0)
    assert close(found, stock) if PIPELINES[name].shift else torch.equal(found, stock)
    assert run.transition_step.tolist() == [0, 0] and run.calls == 3 and run.noise_gap.isfinite().all()
    assert torch.equal(call(name, pipe, 4.0), stock)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_scale_in_the_call_that_does_not_count_is_said_once(doubles, caplog, name):
    """Not one that is left out, nor one that means what the guidance says; images are the guidance's in each case."""
    pipe, own = doubles(name), PIPELINES[name].scale
    off, stock = (call(name, pipe, weight) for weight in (1.0, 4.0))
    caplog.clear()
    with escape(pipe, FOUR):
        expected = call(name, pipe, None)
        assert close(expected, stock) and torch.equal(call(name, pipe, 4.0), expected) and not scales_told(caplog)
        for weight in (7.0, 7.0, 1.0, 0.0):
            assert torch.equal(call(name, pipe, weight), expected)
    told = scales_told(caplog)
    assert len(told) == 3 and all(own in message and message.endswith("own scale does, 4") for message in told)
    assert ["switches guidance off" in message for message in told] == [False, True, True]
    caplog.clear()
    with escape(pipe, Guidance.cfg(1.0)):  # what the pipeline does where guidance is off
        assert close(call(name, pipe, 1.0), off) and not scales_told(caplog)
        call(name, pipe, 4.0)
    assert f"{own}={4.0 - PIPELINES[name].shift:g} in the call of {name}" in caplog.text


def test_a_scale_in_the_call_is_compared_with_all_of_the_guidances(random_pipeline, caplog):
    """Given by place as by name; of a guard once, whatever it begins again."""
    pipe = random_pipeline("sd", 8, "epsilon")
    with escape(pipe, [FOUR, Guidance.cfg(3.0)]):
        stable_diffusion(pipe, 4.0)
    assert caplog.text.count("guidance_scale=4 in the call") == 1 and "own scale does, 4, 3" in caplog.text
    caplog.clear()
    with escape(pipe, guard(FAILS, PASSES)) as run:
        pipe(WORDS, None, None, 6, None, None, torch.tensor(4.0), output_type="latent")
        assert not scales_told(caplog)
        pipe(WORDS, None, None, 6, None, None, torch.tensor([5.0]), output_type="latent")
    assert run.attempts.tolist() == [2, 2] and len(scales_told(caplog)) == 1


def scales_told(caplog):
    return [message for message in caplog.messages if "does not count: the guidance's own scale does" in message]


@pytest.mark.parametrize("name", ["SanaPipeline", "LTXPipeline", "CogVideoXPipeline"])
def test_predictions_in_half_are_combined_in_the_pipelines_dtype(name):
    pipe = build(name).to(torch.bfloat16)
    expected = call(name, pipe, 4.0)
    with escape(pipe, FOUR):
        assert torch.equal(call(name, pipe), expected)


@pytest.mark.slow
def test_a_compiled_network_stays_compiled():
    """By the module's own `compile`, and by torch's, which wraps it."""
    name = "StableDiffusion3Pipeline"
    pipe, graphs = build(name), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = call(name, pipe, 4.0)
    for outside in (False, True):
        if outside:
            pipe.transformer = torch.compile(pipe.transformer, backend=backend)
        else:
            pipe.transformer.compile(backend=backend)
        assert torch.equal(call(name, pipe, 4.0), expected)
        before = len(graphs)
        with escape(pipe, FOUR) as run:
            assert torch.equal(call(name, pipe), expected)
            assert run.judge().score.isfinite().all()
        assert len(graphs) == before > 0


@pytest.mark.parametrize("name", PIPELINES)
def test_other_weights_are_the_predictions_they_say(doubles, name):
    """Weight 0 is what the negative prompt alone predicts; u - 2 (c - u) is c + 3 (u - c), the two prompts exchanged."""
    pipe, given = doubles(name), prompts(name)
    negative = {part: given["negative_" + part] for part in PIPELINES[name].prompt}
    positive = {"negative_" + part: given[part] for part in PIPELINES[name].prompt}
    with escape(pipe, Guidance.cfg(0.0)):
        assert torch.equal(call(name, pipe), call(name, pipe, **negative))
    if name == "QwenImagePipeline":  # which renormalises; weights below 1 are as they are
        return
    plain = {"cfg_normalization": False} if name == "Lumina2Pipeline" else {}
    with escape(pipe, Guidance.cfg(-2.0)):
        found = call(name, pipe)
    assert close(found, call(name, pipe, 3.0, **negative, **positive, **plain))


@pytest.mark.parametrize("name", PIPELINES)
def test_samples_of_a_batch_go_their_own_ways(doubles, name):
    pipe = doubles(name)
    guidance = [Guidance.delayed(4.0, until=At(900)), Guidance.opposite(1.0, scale=3.0, until=FirstMinimum(latest=2))]
    batch = call(name, pipe)
    with escape(pipe, guidance) as run:
        together = call(name, pipe)
    transitions = run.transition_step
    assert len(set(transitions.tolist())) == 2
    for i, one in enumerate(guidance):
        rows = slice(i, i + 1)
        own = (call(name, pipe, rows=rows) - batch[rows]).abs().max()
        with escape(pipe, one) as run:
            alone = call(name, pipe, rows=rows)
        assert run.transition_step == transitions[i] and close(together[rows], alone, own)


def test_the_norm_is_capped_as_the_pipeline_does(doubles):
    pipe, name = doubles("ZImagePipeline"), "ZImagePipeline"
    expected = call(name, pipe, 4.0, cfg_normalization=0.5)
    with escape(pipe, FOUR):
        found = call(name, pipe, cfg_normalization=0.5)
    assert close(found, expected) and not close(found, call(name, pipe, 4.0))


def test_a_network_for_each_noise_level(doubles):
    """Wan 2.2: another transformer takes the later steps; its scale is the guidance's as well."""
    name, first = "WanPipeline", doubles("WanPipeline")
    second = copy.deepcopy(first.transformer)
    for parameter in second.parameters():
        parameter.data *= 0.9
    pipe = build(name, transformer_2=second, boundary_ratio=0.7)
    assert isinstance(pipe.transformer_2, WanTransformer3DModel)
    expected = call(name, pipe, 4.0)
    assert not close(expected, call(name, first, 4.0))
    with escape(pipe, FOUR) as run:
        assert torch.equal(call(name, pipe), expected) and run.calls == 3
        assert run.judge().score.isfinite().all()  # by the one that has the noise of a judged picture
        with pytest.raises(ValueError, match=r"guidance_scale_2 is 3\.0, which escape cannot follow"):
            call(name, pipe, guidance_scale_2=3.0)


def test_a_negative_prompt_is_given_where_guidance_needs_one(doubles):
    name = "FluxPipeline"
    pipe, asked, given = copy.copy(doubles(name)), [], prompts(name)

    def encoded(prompt=None, prompt_2=None, prompt_embeds=None, pooled_prompt_embeds=None, **named):
        asked.append((prompt, prompt_2))
        if prompt_embeds is None:
            prompt_embeds, pooled_prompt_embeds = given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"]
        return prompt_embeds, pooled_prompt_embeds, torch.zeros(prompt_embeds.shape[1], 3)

    pipe.encode_prompt = encoded
    expected = call(name, pipe, 4.0)
    with escape(pipe, FOUR):
        for second in (None, "a dog"):  # which the pipeline takes no guidance from alone
            none = {"negative_prompt_embeds": None, "negative_pooled_prompt_embeds": None, "negative_prompt_2": second}
            assert torch.equal(call(name, pipe, **none), expected)
    assert asked == [(None, None)] * 3 + [("", None), (None, None), ("", "a dog")]


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "SanaPipeline", "QwenImagePipeline", "WanPipeline"])
def test_an_exception_leaves_the_pipeline_as_it_was(doubles, random_pipeline, name):
    sd = name == "StableDiffusionPipeline"
    pipe = random_pipeline("sd", 8, "epsilon") if sd else doubles(name)
    network, take = (pipe.unet, stable_diffusion) if sd else (pipe.transformer, lambda pipe, **more: call(name, pipe, **more))
    expected = take(pipe)
    before = what_it_is(pipe, network)

    def fail(pipe, i, t, given):
        if i == 1:
            raise RuntimeError("in the middle")
        return given

    with pytest.raises(RuntimeError, match="in the middle"), escape(pipe, FOUR):
        assert isinstance(pipe, type(pipe).__mro__[2]) and type(pipe).__name__ == name
        take(pipe, callback_on_step_end=fail)
    assert what_it_is(pipe, network) == before
    handle = network.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), escape(pipe, FOUR):
        take(pipe)
    handle.remove()
    assert what_it_is(pipe, network) == before
    assert torch.equal(take(pipe), expected)


def what_it_is(pipe, network):
    """All that `escape` touches."""
    hooks = [len(getattr(network, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")]
    return (
        type(pipe),
        set(vars(pipe)),
        hooks,
        network._compiled_call_impl,
        set(vars(pipe.scheduler)),
        pipe.scheduler.step.__func__,
    )


def test_what_cannot_be_is_refused_in_a_line(random_pipeline, doubles):
    sd, flux = random_pipeline("sd", 8, "epsilon"), doubles("FluxPipeline")
    refused = {
        "must be a diffusers pipeline, got Linear": lambda: escape(torch.nn.Linear(1, 1), FOUR),
        "not among those whose two predictions are known": lambda: escape(other(sd), FOUR),
        "guidance must be a Guidance": lambda: escape(sd, [7.5]),
        "a guard begins samples again": lambda: escape(sd, [Guidance.guard(4.0)] * 2),
        "restart.*use Sampler": lambda: escape(sd, Guidance.cfg(4.0, restart=(300, 500, 1))),
        "is distilled": lambda: escape(distilled(sd), FOUR),
    }
    for message, ask in refused.items():
        with pytest.raises(ValueError, match=message) as error:
            ask()
        assert "\n" not in str(error.value)
    with escape(sd, FOUR) as run:
        with pytest.raises(ValueError, match="inside another escape"):
            escape(sd, FOUR)
        with pytest.raises(ValueError, match="noise_gap is known when the pipeline has been called"):
            run.noise_gap  # noqa: B018
        with pytest.raises(AttributeError, match="no attribute 'gap'"):
            run.gap  # noqa: B018
    with escape(sd, [FOUR]), pytest.raises(ValueError, match="guidance has 1 entries for 2 samples"):
        stable_diffusion(sd)
    handle = flux.transformer.register_forward_pre_hook(copying)
    with escape(flux, FOUR), pytest.raises(ValueError, match="did not step with the guided prediction"):
        call("FluxPipeline", flux)
    handle.remove()
    flux.transformer._forward_hooks.clear()


def test_what_would_go_unguided_in_silence_is_refused(random_pipeline):
    """A run that was left, a copy of a pipeline inside `escape`, and a class that hides what it is called with."""
    pipe = random_pipeline("sd", 8, "epsilon")
    with escape(pipe, FOUR) as run:
        made = copy.copy(pipe)
        with pytest.raises(ValueError, match="a copy of one inside escape"):
            stable_diffusion(made)
        with pytest.raises(ValueError, match="transition_step is known when"):
            run.transition_step  # noqa: B018
    with pytest.raises(ValueError, match="has been left"):
        run.__enter__()

    class Wrapping(StableDiffusion3Pipeline):
        def __call__(self, *given, **named):
            return super().__call__(*given, **named)

    wrapped = Wrapping(**build("StableDiffusion3Pipeline").components)
    with pytest.raises(ValueError, match="__call__ does not name guidance_scale"):
        escape(wrapped, FOUR)


def test_a_with_that_guides_nothing_is_said(random_pipeline, caplog):
    """As where another pipeline is made from this one, and called."""
    pipe, said = random_pipeline("sd", 8, "epsilon"), "was not called inside escape, so nothing was guided"
    with escape(pipe, FOUR):
        made = StableDiffusionPipeline.from_pipe(pipe)
        made.set_progress_bar_config(disable=True)
        stable_diffusion(made)
    assert caplog.text.count(said) == 1
    caplog.clear()
    with pytest.raises(RuntimeError), escape(pipe, FOUR):
        raise RuntimeError
    with escape(pipe, FOUR):
        stable_diffusion(pipe)
    assert said not in caplog.text


def copying(network, given):
    """Whoever called the network gets a copy of what `escape` returned."""
    network.register_forward_hook(lambda _, given, output: (output[0].clone(), *output[1:]))


def other(pipe):
    return DDIMPipeline(unet=pipe.unet, scheduler=pipe.scheduler)


def distilled(pipe):
    made = copy.copy(pipe)
    made.unet = copy.deepcopy(pipe.unet)
    made.unet.register_to_config(time_cond_proj_dim=8)
    return made


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("StableDiffusion3Pipeline", "skip_guidance_layers", [0]),
        ("CogVideoXPipeline", "use_dynamic_cfg", True),
        ("ZImagePipeline", "cfg_truncation", 0.5),
        ("Lumina2Pipeline", "cfg_trunc_ratio", 0.5),
        ("Flux2KleinPipeline", "image", PICTURE),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused_before_work(doubles, name, option, value):
    pipe = doubles(name)
    work = pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with escape(pipe, FOUR), pytest.raises(ValueError, match=f"{option} is .* which escape cannot follow"):
        call(name, pipe, **{option: value})
    work.remove()
