"""Options, dtypes, offloading and pictures, each against the stock pipeline at equal settings."""

import copy
import logging

import numpy as np
import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.models import adapt
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from rounding import assert_same_but_for_rounding
from stockruns import PROMPTS, SCALE, SEEDS, STEPS, assert_stock, ours, stock


def embeddings(pipe, xl):
    """Of two prompts, as a user would have them."""
    rng = torch.Generator().manual_seed(7)
    shape = (2, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    names = {"prompt_embeds": shape, "negative_prompt_embeds": shape}
    if xl:
        names |= {"pooled_prompt_embeds": (2, 32), "negative_pooled_prompt_embeds": (2, 32)}
    return {name: torch.randn(shape, generator=rng) for name, shape in names.items()}


SD = {
    "negative": {"negative_prompt": ["fog", "a dog"]},
    "size": {"height": 24, "width": 40},
    "kwargs": {"cross_attention_kwargs": {"scale": 0.5}},
}
XL = {
    **SD,
    "clip_skip": {"clip_skip": 1},
    "second prompt": {"prompt_2": ["a dog", "a fish"], "negative_prompt": ["fog"] * 2, "negative_prompt_2": ["rain"] * 2},
    "sizes": {"original_size": (64, 96), "crops_coords_top_left": (8, 4), "target_size": (128, 32)},
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("sd", options) for options in SD.values()] + [("sdxl", options) for options in XL.values()],
    ids=[f"sd, {name}" for name in SD] + [f"sdxl, {name}" for name in XL],
)
def test_an_option_is_the_stock_pipelines(random_pipeline, kind, options):
    pipe = random_pipeline(kind, 8, "epsilon")
    found = assert_stock(pipe, **options)
    plain = ours(pipe).latents
    assert "cross_attention_kwargs" in options or found.shape != plain.shape or not torch.equal(found, plain)


def test_clip_skip_reads_an_earlier_layer_of_sds_text_encoder(random_pipeline):
    """The stock pipeline's own clip_skip does not run with every version of transformers."""
    pipe = random_pipeline("sd", 8, "epsilon")
    encoder = pipe.text_encoder
    ids = pipe.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        layer = encoder(ids, output_hidden_states=True).hidden_states[-2]
        states = getattr(encoder, "text_model", encoder).final_layer_norm(layer)
    found, given = ours(pipe, clip_skip=1).latents, {"prompts": None, "prompt_embeds": states, "negative_prompt": [""] * 2}
    assert_same_but_for_rounding(found, stock(pipe, **given), pipe, lambda: stock(pipe, **given))
    assert not torch.equal(found, ours(pipe).latents)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_embeddings_stand_for_prompts(random_pipeline, kind):
    pipe = random_pipeline(kind, 8, "epsilon")
    assert_stock(pipe, prompts=None, **embeddings(pipe, kind == "sdxl"))


def test_the_negatives_of_sizes_are_the_unconditional_halfs(random_pipeline):
    """For each sample; the stock pipeline mixes the two where there are several, so it is asked for one."""
    pipe = random_pipeline("sdxl", 8, "epsilon")
    negative = {"negative_original_size": (16, 16), "negative_crops_coords_top_left": (2, 2), "negative_target_size": (96, 96)}
    both = ours(pipe, **negative).latents
    for i in range(2):
        one = {"prompts": PROMPTS[i : i + 1], "seeds": SEEDS[i : i + 1], **negative}
        assert_same_but_for_rounding(both[i : i + 1], stock(pipe, **one), pipe, lambda one=one: stock(pipe, **one))
    assert not torch.equal(both, ours(pipe).latents)


def test_one_text_or_embedding_stands_for_all_prompts(random_pipeline):
    pipe = random_pipeline("sdxl", 8, "epsilon")
    negative = {name: x[:1] for name, x in embeddings(pipe, True).items() if name.startswith("negative")}
    one = ours(pipe, prompt_2="a dog", **negative)
    each = ours(pipe, prompt_2=["a dog"] * 2, **{name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in negative.items()})
    assert torch.equal(one.latents, each.latents) and not torch.equal(one.latents, ours(pipe, prompt_2="a dog").latents)
    using = Sampler.from_pipeline(pipe).using(prompt_2="a dog", **negative)
    settings = {"guidance": Guidance.cfg(SCALE), "output": "latent", "progress": False}
    assert torch.equal(using(PROMPTS, SEEDS, STEPS, **settings).latents, one.latents)
    with pytest.raises(ValueError, match="negative_prompt: no option of StableDiffusionXLPipeline"):
        using.using(negative_prompt="fog")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_several_images_a_prompt_each_have_their_seed(random_pipeline, kind):
    pipe = random_pipeline(kind, 8, "epsilon")
    found = assert_stock(pipe, seeds=[3, 4, 5, 6], num_images_per_prompt=2, negative_prompt=["fog", "rain"])
    assert len({tuple(x.flatten()[:3].tolist()) for x in found}) == 4


def test_noise_is_given_and_scaled_by_us(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # whose initial sigma is not 1
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    assert_stock(pipe, latents=noise)


def test_one_line_without_a_negative_prompt_is_as_alone(random_pipeline):
    """SDXL takes zeros for no negative prompt, and the embedding of "" for an empty one."""
    pipe = random_pipeline("sdxl", 8, "epsilon")
    mixed = ours(pipe, negative_prompt=[None, ""]).latents
    for i, negative in enumerate((None, [""])):
        one = {"prompts": PROMPTS[i : i + 1], "seeds": SEEDS[i : i + 1], "negative_prompt": negative}
        assert_same_but_for_rounding(mixed[i : i + 1], stock(pipe, **one), pipe, lambda one=one: stock(pipe, **one))


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("sd", {"prompt_2": "x"}, "prompt_2"),
        ("sd", {"nonsense": 1}, "nonsense"),
        ("sd", {"clip_skip": 5}, "clip_skip"),
        ("sd", {"clip_skip": 1.0}, "clip_skip"),
        ("sd", {"cross_attention_kwargs": 0.5}, "cross_attention_kwargs"),
        ("sd", {"negative_prompt": ["fog"]}, "negative_prompt"),
        ("sd", {"latents": torch.zeros(1, 4, 8, 8)}, "latents"),
        ("sd", {"prompt_embeds": torch.zeros(2, 32, 32)}, "prompt_embeds"),
        ("sd", {"prompt_embeds": np.zeros((2, 77, 32)), "prompts": None}, "prompt_embeds must be a tensor, got a ndarray"),
        ("sd", {"negative_prompt_embeds": torch.zeros(2, 5, 32)}, "must be alike, a row a prompt"),
        ("sd", {"negative_prompt_embeds": torch.zeros(3, 77, 32)}, "negative_prompt_embeds has 3 entries for 2 prompts"),
        ("sd", {"negative_prompt": 3}, "negative_prompt must be a string, or a list"),
        ("sd", {"count": 2}, "count: no option"),
        ("sd", {"prompt": "x", "prompts": None}, "say prompts in place of prompt"),
        ("sd", {"ip_adapter_image": "x"}, "ip_adapter_image"),
        ("sd", {"prompts": None}, "prompts"),
        ("sd", {"prompts": ["a \ud83d"], "seeds": 1}, "prompts"),
        ("sd", {"seeds": 3.0}, "seeds"),
        ("sd", {"seeds": [1, True]}, "seeds"),
        ("sd", {"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ("sdxl", {"prompts": None, "prompt_embeds": torch.zeros(2, 32, 64)}, "pooled_prompt_embeds"),
        ("sdxl", {"target_size": 64}, "target_size"),
        ("sdxl", {"negative_target_size": (64, 64)}, "negative_original_size"),
        ("sdxl", {"prompt_2": ["x"]}, "prompt_2"),
    ],
)
def test_what_does_not_fit_is_named(random_pipeline, kind, options, says):
    with pytest.raises(ValueError, match=says):
        ours(random_pipeline(kind, 8, "epsilon"), **options)


def test_numpys_numbers_are_numbers(random_pipeline):
    assert Guidance.cfg(np.float32(SCALE)) == Guidance.cfg(np.int64(SCALE)) == Guidance.cfg(SCALE)
    sampler = Sampler.from_pipeline(random_pipeline("sd", 8, "epsilon"))
    settings = {"guidance": Guidance.cfg(SCALE), "output": "latent", "progress": False}
    found = [sampler(PROMPTS, seeds, np.int64(STEPS), **settings).latents for seeds in (np.int64(3), np.array([3, 4]))]
    assert torch.equal(*found) and torch.equal(found[0], sampler(PROMPTS, 3, STEPS, **settings).latents)


def test_what_is_cut_off_a_prompt_is_told(random_pipeline):
    pipe = random_pipeline("sdxl", 8, "epsilon")
    long = "a picture of " + "a cat " * 40 + "signed by arno"
    assert ours(pipe, ["a cat", long]).truncated[0] == ""
    kept = pipe.tokenizer(long, truncation=True).input_ids[1:-1]
    cut = ours(pipe, ["a cat", long]).truncated[1]
    assert cut.endswith("signed by arno")
    assert kept + pipe.tokenizer(cut).input_ids[1:-1] == pipe.tokenizer(long, verbose=False).input_ids[1:-1]
    assert ours(pipe, ["a cat"], [1], prompt_2=[long]).truncated == [cut]


def test_the_results_are_ordinary_tensors(random_pipeline):
    out = ours(random_pipeline("sd", 8, "epsilon"), output="pt")
    for tensor in (out.images, out.latents, out.noise_gap, out.transition_step, out.timesteps, out.finite):
        assert not tensor.is_inference()
    kept = out.timesteps.clone()
    out.latents += 1
    out.timesteps += 1
    again = ours(random_pipeline("sd", 8, "epsilon"))
    assert torch.equal(again.timesteps, kept)


class Mine(StableDiffusionPipeline):
    def __call__(self, *given, **named):
        raise AssertionError


def test_a_pipeline_with_a_loop_of_its_own_is_refused(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    with pytest.raises(ValueError, match=r"__call__.*StableDiffusionPipeline\(\*\*pipe.components\)"):
        Sampler.from_pipeline(Mine(**pipe.components, requires_safety_checker=False))


def test_sdxl_without_a_size_or_a_text_encoder(random_pipeline):
    whole = random_pipeline("sdxl", 8, "epsilon")
    config = {**whole.unet.config, "sample_size": None}
    unet = type(whole.unet).from_config(config)
    unet.load_state_dict(whole.unet.state_dict())
    sizeless = StableDiffusionXLPipeline(**{**whole.components, "unet": unet}, add_watermarker=False)
    sizeless.set_progress_bar_config(disable=True)
    assert_stock(sizeless, height=24, width=40)
    with pytest.raises(ValueError, match="height"):
        ours(sizeless)
    whole.text_encoder_2 = whole.tokenizer_2 = None
    with pytest.raises(ValueError, match="text_encoder_2"):
        ours(whole)
    whole.text_encoder = whole.tokenizer_2 = None
    given = embeddings(whole, xl=True)
    assert_stock(whole, prompts=None, **given)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_parts_of_other_dtypes_are_cast_to_the_networks(random_pipeline, part):
    pipe = random_pipeline("sd", 8, "epsilon")
    expected = ours(pipe, output="pt").images
    getattr(pipe, part).to(torch.bfloat16)
    out = ours(pipe, output="pt")
    assert out.latents.dtype == torch.float32
    assert (out.images.float() - expected).abs().mean() < 0.1 * expected.std() and not torch.equal(out.images, expected)


def test_the_pipeline_that_ships_runs_as_diffusers_loads_it():
    pipe = StableDiffusionPipeline.from_pretrained(Sampler.model_path("tiny"))
    pipe.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipe.text_encoder, pipe.unet, pipe.vae)} == {torch.float32}
    expected = torch.from_numpy(stock(pipe, output="np"))
    assert expected.isfinite().all()
    assert (torch.from_numpy(ours(pipe, output="np").images) - expected).abs().max() <= 1 / 255


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_means_of_latents_are_the_sdxl_pipelines_alone(random_pipeline, kind):
    pipe = random_pipeline(kind, 8, "epsilon")
    pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 0.3, 2.0], latents_std=[1.0, 2.0, 0.5, 3.0])
    expected = torch.from_numpy(stock(pipe, output="np"))
    found = torch.from_numpy(ours(pipe, output="np").images)
    assert_same_but_for_rounding(found, expected, pipe, lambda: torch.from_numpy(stock(pipe, output="np")))


def overflowing(pipe):
    """A decoder whose inner values are beyond float16, and whose pixels are not."""
    pipe.to(torch.float16)
    inner = pipe.vae.decoder
    inner.conv_in.register_forward_hook(lambda module, given, result: 1e5 * result)
    inner.mid_block.register_forward_pre_hook(lambda module, given: (1e-5 * given[0], *given[1:]))


def test_an_autoencoder_that_overflows_decodes_in_float32_and_says_so_once(random_pipeline, caplog):
    pipe = random_pipeline("sd", 8, "epsilon")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = adapt(pipe).decode(latents, "pt").images
    overflowing(pipe)
    model, bits = adapt(pipe), copy.deepcopy(pipe.vae.state_dict())
    with caplog.at_level(logging.WARNING, "basinescape"), torch.inference_mode():
        made = [model.decode(latents.half(), "pt") for _ in range(2)]
    assert torch.isfinite(made[0].images).all() and made[0].finite.all()
    assert (made[0].images.float() - expected).abs().max() < 0.02 * expected.abs().max()
    said = [record.message for record in caplog.records if record.name.startswith("basinescape")]
    assert ["float32" in message for message in said] == [True]
    assert all(torch.equal(value, bits[name]) for name, value in pipe.vae.state_dict().items())


def test_what_is_not_finite_is_told_by_sample(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    noise = torch.zeros(2, 4, 8, 8)
    noise[1, 0, 0, 0] = torch.nan
    for output in ("latent", "np"):
        assert ours(pipe, latents=noise, output=output).finite.tolist() == [True, False]
    pipe.vae.decoder.conv_out.register_forward_hook(lambda module, given, result: torch.full_like(result, torch.inf))
    assert ours(pipe, output="pt").finite.tolist() == [False, False]


def test_the_safety_checkers_verdict_comes_with_the_picture(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    assert ours(pipe, output="pt").nsfw_content_detected is None

    class Checker(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, images, clip_input):
            images = images.clone()
            images[1] = 0
            return images, [False, True]

    pipe.safety_checker = Checker()
    pipe.feature_extractor = lambda images, return_tensors: type(
        "Given", (), {"pixel_values": torch.zeros(2, 3, 8, 8), "to": lambda self, device: self}
    )()
    out = ours(pipe, output="pt")
    assert out.nsfw_content_detected == [False, True]
    assert not out.images[1].any() and out.images[0].any() and out.finite.all()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_in_float32_the_same_weights_compute_in_float32(random_pipeline, kind, monkeypatch):
    """Compiled or not, and afterwards nothing is compiled again."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiled.append(network) or network)
    pipe = random_pipeline(kind, 8, "epsilon").to(torch.bfloat16)
    full = copy.deepcopy(pipe).to(torch.float32)
    bits = {name: dict(part.state_dict()) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    sampler = Sampler.from_pipeline(pipe, compile=True)

    def sample(sampler):
        return sampler(PROMPTS, SEEDS, STEPS, Guidance.cfg(SCALE), output="latent", progress=False).latents

    before, count = sample(sampler), len(compiled)
    with sampler.in_float32():
        inside = sample(sampler)
    assert inside.dtype == torch.float32
    expected = sample(Sampler.from_pipeline(full))
    assert_same_but_for_rounding(inside, expected, full, lambda: sample(Sampler.from_pipeline(full)))
    assert torch.equal(sample(sampler), before) and len(compiled) == count
    for name, values in bits.items():
        now = getattr(pipe, name).state_dict()
        assert all(value.dtype == now[key].dtype and torch.equal(value, now[key]) for key, value in values.items())


def test_a_pipeline_offloaded_part_by_part_runs_on_its_execution_device(random_pipeline, device):
    pipe = random_pipeline("sd", 8, "epsilon")
    plain = copy.deepcopy(pipe)
    expected = ours(plain).latents
    pipe.enable_model_cpu_offload(device="cuda")
    sampler = Sampler.from_pipeline(pipe, capture=True)
    for _ in range(2):
        out = sampler(PROMPTS, SEEDS, STEPS, Guidance.cfg(SCALE), output="latent", progress=False)
        assert out.latents.device.type == "cuda" and pipe.unet.device.type == "cpu"  # given back after the call
        assert_same_but_for_rounding(out.latents.cpu(), expected, plain, lambda: ours(plain).latents)


def test_weights_that_hooks_bring_for_each_call_are_brought(random_pipeline):
    """As under sequential offloading: the network's own weights are spoilt until its hook has been asked."""
    hooks = pytest.importorskip("accelerate.hooks")
    pipe = random_pipeline("sd", 8, "epsilon")
    expected, weight = ours(pipe).latents, pipe.unet.conv_in.weight.detach().clone()

    class Brings(hooks.ModelHook):
        def pre_forward(self, module, *given, **named):
            module.weight.data.copy_(weight)
            return given, named

        def post_forward(self, module, result):
            module.weight.data.fill_(torch.nan)
            return result

    hooks.add_hook_to_module(pipe.unet.conv_in, Brings())
    pipe.unet.conv_in.weight.data.fill_(torch.nan)
    sampler = Sampler.from_pipeline(pipe)
    sampler.model = adapt(pipe, lean=True)
    out = sampler(PROMPTS, SEEDS, STEPS, Guidance.cfg(SCALE), output="latent", progress=False)
    assert torch.equal(out.latents, expected)
