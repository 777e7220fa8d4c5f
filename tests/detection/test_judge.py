"""Pictures made elsewhere: through every family's autoencoder, of every kind and size, each judged by itself."""

import io
import json
import logging
import sys
import types

import numpy as np
import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.bench.evaluation import experiment, roundtrip, trajectories
from basinescape.data.pictures import pixels
from basinescape.detection.verdict import fitted, picture
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma
from families import CASES
from PIL import ExifTags, Image

WORDS = ["a cat", "two frogs"]
CPU = {"device": "cpu"}


@pytest.fixture(scope="module", params=[*CASES, "sd", "sdxl", "sdxl-centred"])
def made(request, tiny, random_pipeline):
    """A sampler of a family with random weights, options of its calls, and two latents that it made."""
    name = request.param
    if name in CASES:
        pipe, options = CASES[name].make(tiny.tokenizer), dict(CASES[name].options)
    else:
        pipe, options = random_pipeline(name.partition("-")[0], 8, "epsilon"), {"height": 16, "width": 24}
    if name.endswith("centred"):
        pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0])
    sampler = Sampler.from_pipeline(pipe)
    how = {"guidance": Guidance.cfg(3.0), "steps": 2, "output": "latent", "progress": False}
    return sampler, options, sampler(WORDS, [1, 2], **how, **options).latents


def options_of_text(options):
    return {name: value for name, value in options.items() if name not in ("height", "width", "num_frames")}


def decoded(sampler, latents, options, output="pt"):
    with torch.inference_mode():
        return sampler.model.decode(latents, output, **options).images


def test_what_a_lossless_autoencoder_decoded_is_encoded_as_it_was(made, monkeypatch):
    """Whatever the family's scale, shift, packing, frames: all but the autoencoder itself is undone."""
    sampler, options, latents = made
    vae, shown, told = sampler.pipe.vae, [], {}
    own = vae.decode

    def decode(z, **given):
        shown.append(z)
        return own(z, **given)

    def encode(x):
        told["x"] = x
        mean = shown[0]
        return types.SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, 0 * mean - 30], dim=1)))

    monkeypatch.setattr(vae, "decode", decode)
    monkeypatch.setattr(vae, "encode", encode)
    images = decoded(sampler, latents, options)
    whole = torch.stack([picture(image, "image", video="num_frames" in options) for image in images])
    size = sampler.model.nearest_size(*whole.shape[-2:], **options_of_text(options))
    whole = torch.stack([fitted(one, *size) for one in whole])
    with torch.inference_mode():
        found = sampler.model.encode_pictures(whole)
    assert torch.allclose(found, latents, atol=1e-5) and found.dtype == sampler.model.dtype
    assert torch.equal(told["x"].reshape(whole.shape), whole)


def test_pictures_of_every_family_are_judged_alone_as_in_a_batch(made):
    sampler, options, latents = made
    images, texts = decoded(sampler, latents, options, "np"), options_of_text(options)
    together = sampler.judge(images, WORDS, [5, 6], **texts)
    assert together.score.shape == (2,) and together.score.isfinite().all() and together.suspect.dtype == torch.bool
    for i in range(2):
        alone = sampler.judge([images[i]], WORDS[i], 5 + i, **texts)
        assert alone.score.item() == pytest.approx(together.score[i].item(), abs=1e-5)
    assert torch.equal(sampler.judge(images, WORDS, [5, 6], batch_size=1, **texts).suspect, together.suspect)
    of_latents = sampler.judge(latents, WORDS, [5, 6], **options).score
    assert of_latents.isfinite().all() and not torch.equal(of_latents, together.score)


def test_every_family_runs_under_a_guard_alone_as_in_a_batch(made):
    sampler, options, _ = made
    how = {"guidance": Guidance.guard(3.0), "steps": 6, "output": "latent", "progress": False, **options}
    together = sampler(WORDS, [1, 2], **how)
    assert together.score.isfinite().all() and together.attempts.tolist() == [1, 1] and not together.suspect.any()
    assert torch.equal(together.latents, sampler(WORDS, [1, 2], **how | {"guidance": Guidance.cfg(3.0)}).latents)
    judged = sampler.judge(together.latents, WORDS, [1, 2], **options).score
    assert torch.allclose(judged, together.score, atol=1e-5)
    for i in range(2):
        alone = sampler(WORDS[i], [1 + i], **how)
        assert alone.score.item() == pytest.approx(together.score[i].item(), abs=1e-4)
        assert torch.allclose(alone.latents[0], together.latents[i], atol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "flow"])
def test_what_is_encoded_is_what_was_decoded(name):
    """By the autoencoders that ship, on training images, of which they keep nearly all."""
    sampler = Sampler.from_pretrained(name, **CPU)
    files = sorted((Sampler.model_path(name) / "memorized").glob("*.png"))[:6]
    images = [Image.open(file) for file in files]
    with torch.inference_mode():
        latents = sampler.model.encode_pictures(pixels(images))
        assert torch.equal(latents, sampler.model.encode_pictures(pixels(images)))
        again = sampler.model.decode(latents, "pt", height=64, width=64).images * 2 - 1
        off = sampler.model.encode_pictures(again) - latents
    assert (again - pixels(images)).square().mean().sqrt() < 0.15
    assert (off.flatten(1).norm(dim=1) / latents.flatten(1).norm(dim=1)).max() < 0.2
    assert 0.7 < latents.std() < 1.3  # in the network's scale


@pytest.mark.parametrize("name", ["tiny", "flow"])
@pytest.mark.slow
def test_training_images_are_suspect_and_pictures_of_other_captions_are_not(name):
    from basinescape.bench.scenario import PRESETS, prompts

    found = [prompt for prompt in prompts(PRESETS[name])["memorized"] if len(prompt.text) < 60][:8]
    images = [Image.open(prompt.image).convert("RGB") for prompt in found]
    sampler = Sampler.from_pretrained(name, **CPU)
    own = sampler.judge(images, [prompt.text for prompt in found], [0] * 8)
    others = sampler.judge(images[1:] + images[:1], [prompt.text for prompt in found], [0] * 8)
    assert own.suspect.sum() >= 5 and own.score.median() > 0.4
    assert others.score.median() < 0.3 and (own.score > others.score).sum() >= 7


@pytest.fixture(scope="module")
def sampler(small):
    return Sampler.from_pipeline(small)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16, width, 3), dtype=np.uint8)) for width in (16, 24, 16)]


def cut_off():
    """A picture whose file ends too early."""
    Image.effect_noise((64, 64), 50).save(file := io.BytesIO(), "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:-500]))


def scores(sampler, images, words="a cat", seeds=0, **options):
    seeds = [seeds] * len(images) if isinstance(seeds, int) else seeds
    return sampler.judge(images, words, seeds, **options).score


def test_pictures_of_every_kind_have_one_score(sampler, images):
    expected = scores(sampler, images)
    arrays = [np.asarray(image) for image in images]
    for same in (
        arrays,
        [array.astype(np.float32) / 255 for array in arrays],
        [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays],
        [torch.from_numpy(array.copy()).permute(2, 0, 1) / 255 for array in arrays],
        [images[0], arrays[1], images[2]],
        [images[0], arrays[1] / 255, arrays[2]],  # float64
    ):
        assert torch.allclose(scores(sampler, same), expected, atol=1e-5)
    square = [array for array in arrays if array.shape[1] == 16]
    for stacked in (np.stack(square), torch.from_numpy(np.stack(square)).permute(0, 3, 1, 2) / 255):
        assert torch.allclose(scores(sampler, stacked), expected[[0, 2]], atol=1e-5)
    assert torch.equal(scores(sampler, [image.convert("RGBA") for image in images]), expected)


def test_a_picture_that_pillow_opened_is_judged_as_its_file_is_read(sampler, images):
    """Turned as its EXIF data says, and of 16 bits in its own greys."""
    lying, note = images[1].transpose(Image.Transpose.ROTATE_90), Image.Exif()
    note[ExifTags.Base.Orientation] = 6
    lying.save(file := io.BytesIO(), "PNG", exif=note)
    grey = images[0].convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    given = [Image.open(file), deep]
    assert torch.equal(scores(sampler, given), scores(sampler, [images[1], grey])) and given[0].size == lying.size


def test_pictures_of_several_sizes_are_judged_as_each_alone(sampler, images):
    odd = [*images, images[1].resize((25, 15)), images[0].resize((7, 3))]
    words, seeds = [f"a cat {i}" for i in range(5)], [9, 7, 5, 3, 1]
    together = scores(sampler, odd, words, seeds)
    for i in range(5):
        assert scores(sampler, [odd[i]], words[i], [seeds[i]]).item() == pytest.approx(together[i].item(), abs=1e-5)
    for size in (1, 2, 16):
        assert torch.allclose(scores(sampler, odd, words, seeds, batch_size=size), together, atol=1e-5)
    resized = fitted(picture(odd[3], "image"), 16, 24)[None].add(1).div(2)
    assert scores(sampler, resized, words[3], [3]).item() == pytest.approx(together[3].item(), abs=1e-5)
    assert not torch.allclose(scores(sampler, odd, words, seeds, height=32, width=32), together, atol=1e-5)


def test_each_picture_is_judged_with_its_own_negative_prompt(sampler, images):
    negative = ["a dog", None, "a boat"]
    found = scores(sampler, images, negative_prompt=negative)
    assert not found.is_inference()
    for i in range(3):
        alone = scores(sampler, images[i : i + 1], negative_prompt=negative[i]).item()
        assert found[i].item() == pytest.approx(alone, abs=1e-5)
    plain = scores(sampler, images)
    assert torch.isclose(found, plain, atol=1e-5).tolist() == [False, True, False]


def test_texts_and_embeddings_of_pictures_of_several_sizes_are_each_pictures_own(random_pipeline):
    sampler, rng = Sampler.from_pipeline(random_pipeline("sdxl", 8, "epsilon")), torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, *size, generator=rng) for size in ((32, 32), (16, 24), (32, 32))]
    told = {"prompt_2": ["a dog", "a fish", "a hen"], "negative_prompt_embeds": torch.randn(3, 32, 64, generator=rng)}
    told["negative_pooled_prompt_embeds"] = torch.randn(3, 32, generator=rng)
    found = sampler.judge(pictures, "a cat", [1, 2, 3], **told).score
    for i, one in enumerate(pictures):
        own = {name: x[i : i + 1] for name, x in told.items()}
        torch.testing.assert_close(sampler.judge([one], "a cat", i + 1, **own).score, found[i : i + 1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="prompt_2 has 1 entries for 3 prompts"):
        sampler.judge(pictures, "a cat", prompt_2=["a dog"])


def test_a_resized_picture_keeps_its_proportions_and_loses_its_edges():
    image = torch.zeros(3, 20, 40)
    image[:, :, :10], image[:, :, 30:] = -1, 1
    assert torch.equal(fitted(image, 20, 40), image)
    found = fitted(image, 20, 20)
    assert found.shape == (3, 20, 20) and found.abs().max() < 0.6  # the middle alone
    assert torch.allclose(fitted(image.mT, 20, 20), found.mT, atol=1e-6)
    frames = torch.stack([image, -image], dim=1)
    assert torch.allclose(fitted(frames, 24, 30)[:, 1], fitted(-image, 24, 30), atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_nearest_size_is_one_that_the_model_makes(name, tiny):
    model = Sampler.from_pipeline(CASES[name].make(tiny.tokenizer)).model
    for height, width in ((1, 1), (15, 25), (17, 9), (40, 24), (999, 16)):
        options = {"num_frames": 5} if name == "wan" else {}
        found = model.nearest_size(height, width, **options)
        model.size(*found)
        assert model.nearest_size(*found, **options) == found
        if name == "pixart-binned":
            assert list(map(float, found)) in pipeline_pixart_sigma.ASPECT_RATIO_256_BIN.values()
        elif max(height, width) < 30:
            assert abs(found[0] - height) <= model.multiple and abs(found[1] - width) <= model.multiple


def test_every_size_of_pixart_is_its_own_nearest(tiny):
    model = Sampler.from_pipeline(CASES["pixart-binned"].make(tiny.tokenizer)).model
    for height, width in pipeline_pixart_sigma.ASPECT_RATIO_256_BIN.values():
        assert model.nearest_size(int(height), int(width)) == (height, width)
    assert model.nearest_size(47, 101, use_resolution_binning=False) == (48, 96)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a.png"], r"images\[0\] must be a PIL image.*got str"),
        ([np.zeros((8, 8))], r"images\[0\] must be a PIL image.*\(8, 8\)"),
        ([torch.zeros(4, 8, 8)], r"images\[0\] must be .*tensor \(3, height, width\), got Tensor of shape \(4, 8, 8\)"),
        ([np.zeros((8, 8, 3)), np.full((8, 8, 3), 1.5)], r"images\[1\] must have floats in 0\.\.1, or bytes"),
        ([np.full((8, 8, 3), 255, dtype=np.int64)], "must have floats in 0..1, or bytes"),
        ([np.full((8, 8, 3), 1, dtype=np.int64)], "must have floats in 0..1, or bytes"),
        (torch.zeros(1, 4, 8, 8), r"images\[0\] must be .*latents must have the shape \(1, 4, 16, 16\)"),
        ([[Image.new("RGB", (8, 8))]], r"images\[0\] must be a PIL image.*got list"),
        ([np.full((8, 8, 3), 257, dtype=np.uint16)], "must have floats in 0..1, or bytes; got torch.uint16 from 257 to 257"),
        ((Image.new("RGB", (8, 8)) for _ in range(2)), "images must be latents, or pictures in a list.*got a generator"),
        ([cut_off()], r"images\[0\] cannot be read: .*truncated"),
        (None, "images must be latents, or pictures in a list, an array or a tensor; got a NoneType"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(sampler, given, says):
    with pytest.raises(ValueError, match=says):
        sampler.judge(given, "a cat")


def test_a_video_is_refused_unless_it_has_frames_that_the_model_makes(tiny):
    sampler = Sampler.from_pipeline(CASES["wan"].make(tiny.tokenizer))
    frame = Image.new("RGB", (32, 16))
    for given, says in (
        ([frame], "must be a list of PIL images"),
        ([[frame] * 4], "num_frames must be 1 more than a multiple of 2"),
        ([[frame] * 4 + [frame.resize((16, 16))]], "frames of one size"),
    ):
        with pytest.raises(ValueError, match=says):
            sampler.judge(given, "a cat", max_sequence_length=40)
    lists = sampler.judge([[frame] * 5], "a cat", max_sequence_length=40).score
    arrays = sampler.judge(np.stack([np.asarray(frame)] * 5)[None], "a cat", max_sequence_length=40).score
    assert lists.isfinite().all() and torch.allclose(lists, arrays, atol=1e-6)


def test_pictures_that_overflow_the_autoencoder_in_half_precision_go_through_it_in_float32(
    random_pipeline, monkeypatch, caplog
):
    pipe = random_pipeline("sd", 8, "epsilon")
    given = torch.rand((3, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = Sampler.from_pipeline(pipe).model
    with torch.inference_mode():
        expected = model.encode_pictures(given)
    pipe.vae.to(torch.bfloat16)
    own = pipe.vae.encode

    def overflows(x):
        made = own(x)
        if x.dtype == torch.bfloat16:
            made.latent_dist.mean[len(x) // 2] = torch.inf
        return made

    monkeypatch.setattr(pipe.vae, "encode", overflows)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        found = model.encode_pictures(given)
    assert found.isfinite().all() and "overflows in torch.bfloat16" in caplog.text
    near, exact = (found[i] - expected[i] for i in (0, 1))
    assert near.abs().max() < 0.1 * expected.abs().max() and exact.abs().max() < 0.05 * expected.abs().max()
    assert pipe.vae.dtype == torch.bfloat16


@pytest.mark.slow
def test_what_files_cost_the_score_is_measured_on_the_same_pictures(tmp_path, monkeypatch):
    whole, loaded = experiment.prompts, experiment.load
    monkeypatch.setattr(experiment, "prompts", lambda scenario: {name: found[:2] for name, found in whole(scenario).items()})
    monkeypatch.setattr(experiment, "load", lambda name: loaded(name, steps=8))
    monkeypatch.setattr(trajectories, "DELAYS", (-1.0,))
    monkeypatch.setattr(sys, "argv", ["roundtrip", "--json", str(tmp_path / "a.json"), "--seeds", "1"])
    experiment.run(roundtrip.study, roundtrip.__doc__, first_seed=9400)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["seeds"] == [9400] and found["scenario"] == "tiny" and found["versions"]
    assert {name: len(lines) for name, lines in found["pictures"].items()} == {"plain": 2, "delayed": 2, "general": 2}
    for line in (line for lines in found["pictures"].values() for line in lines):
        assert abs(line["png"] - line["latents"]) < 0.2 and line["png"] != line["jpeg"]
    assert {(row["others_are"], row["judged"]) for row in found["rows"]} >= {("general", way) for way in roundtrip.WAYS}


def test_copies_are_told_from_others_by_each_way():
    line = {"latents": 0.5, "png": 0.4, "jpeg": 0.2}
    rows = roundtrip.separation([line, line], [{"latents": 0.1, "png": 0.45, "jpeg": 0.3}])
    assert [row["auc"] for row in rows] == [1, 0, 0]
    assert [(row["suspect_copies"], row["suspect_others"]) for row in rows] == [(1, 0), (1, 1), (0, 0)]
    assert [row["moved"] for row in rows] == [0, pytest.approx(0.55 / 3, abs=1e-4), pytest.approx(0.8 / 3, abs=1e-4)]


def test_one_picture_alone_is_judged_as_in_a_list(small):
    sampler = Sampler.from_pipeline(small)
    image = Image.new("RGB", (32, 32), "red")
    assert torch.equal(sampler.judge(image, "a cat").score, sampler.judge([image], ["a cat"]).score)
