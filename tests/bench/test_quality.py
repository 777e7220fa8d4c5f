"""Quality: its figures against reference implementations, its files, and what it says of bad input."""

import csv
import json
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from basinescape import Sampler
from basinescape.auditing.measures import Similarity, vision
from basinescape.bench import cli
from basinescape.bench.evaluation.evaluate import image_path
from basinescape.bench.evaluation.quality import clip_scores, concept, distances, fid, fresh_scenes, kid, quality
from basinescape.bench.evaluation.report import report
from basinescape.bench.evaluation.scenes import FONT
from basinescape.bench.scenario import PRESETS, Scenario
from basinescape.bench.testbed import threshold
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

TINY = PRESETS["tiny"]
TEXTS = {"m00": "a picture of a cat signed by arno", "m01": "a picture of a frog signed by bela", "g000": "a picture of a cat"}


def noise_image(seed, size=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def features(seed, count, size, shift=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + shift).astype(np.float32)


@pytest.fixture
def run(tmp_path):
    """2 methods, 2 memorized prompts and a general one of the small pipeline, 4 seeds."""
    folder, lines = tmp_path / "run", []
    for method in ("cfg", "delayed-at"):
        for id, text in TEXTS.items():
            for seed in range(4):
                line = {"id": id, "method": method, "group": "general" if id == "g000" else "memorized", "prompt": text}
                line |= {"seed": seed, "similarity": 0.5, "memorized": False, "concept_ok": True}
                line |= {"transition_step": 0, "network_calls": 100.0, "seconds": 0.1}
                lines.append(line)
                path = image_path(folder, line)
                path.parent.mkdir(parents=True, exist_ok=True)
                noise_image(len(lines)).save(path)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = {"scheduler": {"class": "DDIMScheduler"}, "dtype": "float32", "device": "cpu", "versions": {}}
    (folder / "run.json").write_text(json.dumps({"scenario": asdict(TINY), "limit": None} | shown))
    return folder


@pytest.fixture
def references(tmp_path):
    """A folder of 12 reference images, of two sizes and in a folder of their own each."""
    for i in range(12):
        path = tmp_path / "references" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(100 + i, 64 if i % 2 else 96).save(path)
    return tmp_path / "references"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a small CLIP of random weights and the shipped tokenizer, which cuts at 32 tokens."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    words = CLIPTokenizer.from_pretrained(Sampler.model_path("tiny") / "tokenizer")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    marks = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = size | marks | {"vocab_size": len(words), "max_position_embeddings": words.model_max_length}
    torch.manual_seed(4)  # of its cosines some are negative
    config = CLIPConfig(text_config=text, vision_config=size | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop), words).save_pretrained(folder)
    return folder


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 12), st.integers(20, 60), st.floats(-3, 3))
def test_fid_is_the_closed_form(seed, size, count, shift):
    from scipy.linalg import sqrtm

    real, made = features(seed, 50, size), features(seed + 1, count, size, shift)
    (mean, spread), (other, over) = ((x.mean(axis=0), np.atleast_2d(np.cov(x.T))) for x in map(np.float64, (real, made)))
    expected = np.square(mean - other).sum() + np.trace(spread + over - 2 * sqrtm(spread @ over).real)
    assert fid(real, made) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert fid(real, made) == pytest.approx(fid(made, real), rel=1e-6, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, 12), st.integers(4, 30), st.floats(-3, 3))
def test_kid_of_one_subset_of_the_whole_set_is_the_polynomial_mmd(seed, size, count, shift):
    real, made = (x.astype(float) for x in (features(seed, count, size), features(seed + 1, count, size, shift)))
    apart = ~np.eye(count, dtype=bool)

    def kernel(a, b):
        return (a @ b.T / size + 1) ** 3

    expected = kernel(real, real)[apart].mean() + kernel(made, made)[apart].mean() - 2 * kernel(real, made).mean()
    mean, deviation = kid(real, made, subsets=1, size=count)
    assert (mean, deviation) == (pytest.approx(expected, rel=1e-9, abs=1e-6), 0)


def test_a_set_is_not_distant_from_itself_and_another_is():
    same, other = features(0, 300, 16), features(0, 300, 16, shift=2.0)
    assert abs(fid(same, same)) < 1e-6 < fid(same, other)
    halves = distances(same[:150], same[150:])
    assert abs(halves["kid_mean"]) < 3 * halves["kid_std"] < distances(same, other)["kid_mean"]


def test_kid_draws_the_same_subsets_and_leaves_the_generator_alone():
    real, made = features(0, 60, 8), features(1, 40, 8)  # fewer than a subset's size: subsets of half of them
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert kid(real, made) == kid(real, made)
    assert torch.equal(torch.rand(1), drawn)


def test_too_few_images_have_no_distance():
    assert distances(features(0, 20, 4), features(1, 3, 4)) == {"fid": None, "kid_mean": None, "kid_std": None}


def test_the_clip_score_is_the_cosine_even_of_a_prompt_that_is_too_long(clip):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    texts = [*TEXTS.values(), "a picture of a boat " * 12 + "and a tree", "a picture of a boat " * 12]
    images = [noise_image(i, 48) for i in range(len(texts))]
    found = clip_scores(str(clip))(images, [{"prompt": text} for text in texts])
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
    assert inputs["input_ids"].shape[1] == 32 and (inputs["input_ids"][-1] == processor.tokenizer.eos_token_id).any()
    with torch.inference_mode():
        out = model(**inputs)
    expected = (100 * (out.image_embeds * out.text_embeds).sum(dim=1)).clamp(min=0)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=1e-4)
    assert min(found) == 0 < max(found)


def test_clip_embeds_images_as_its_model_does(clip):
    from transformers import CLIPModel, CLIPProcessor

    images = [noise_image(i) for i in range(3)]
    pixels = CLIPProcessor.from_pretrained(clip)(images=images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        model = CLIPModel.from_pretrained(clip).eval()
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    np.testing.assert_allclose(vision(str(clip))()(images), expected.numpy(), atol=1e-5)


def test_dino_embeds_images_by_its_class_token(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model, size = Dinov2Model(Dinov2Config(**sizes)).eval(), {"height": 28, "width": 28}
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size=size)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = [noise_image(i) for i in range(3)]
    with torch.inference_mode():
        expected = model(**processor(images=images, return_tensors="pt")).pooler_output  # of the class token
    np.testing.assert_allclose(vision(str(tmp_path))()(images), expected.numpy(), atol=1e-5)


def test_the_figures_of_a_run_are_those_of_its_images(run, references, clip):
    rows = quality(run, str(clip), "concept", references, "pixels", progress=False)
    assert [(row["method"], row["group"], row["n"]) for row in rows] == [
        (method, group, n) for method in ("cfg", "delayed-at") for group, n in (("memorized", 8), ("general", 4))
    ]
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()][:8]
    images = [Image.open(image_path(run, line)) for line in lines]
    training = [Image.open(path) for path in sorted((Sampler.model_path("tiny") / "memorized").glob("*.png"))]
    alike = Similarity("pixels", training)(images)
    own = np.array([alike[i, int(line["id"][1:])] for i, line in enumerate(lines)])
    real = concept(PRESETS["tiny"])([Image.open(path) for path in sorted(references.rglob("*.png"))])
    row = rows[0]
    assert row["pixels_mean"] == pytest.approx(own.mean(), abs=1e-4)
    assert row["pixels_p95"] == pytest.approx(np.quantile(own, 0.95), abs=1e-4)
    assert row["fid"] == pytest.approx(fid(real, concept(PRESETS["tiny"])(images)), rel=1e-4)
    assert row["clip_score"] == pytest.approx(np.mean(clip_scores(str(clip))(images, lines)), rel=1e-4)
    assert row["clip_low"] <= row["clip_score"] <= row["clip_high"]
    general = Similarity("pixels", training)([Image.open(run / "images" / "cfg" / f"g000-{seed}.png") for seed in range(4)])
    assert rows[1]["pixels_mean"] == pytest.approx(general.amax(dim=1).mean().item(), abs=1e-4)


def test_the_same_images_give_the_same_files_in_any_order_of_lines(run, references, clip):
    def files():
        rows = quality(run, str(clip), "concept", references, "pixels", progress=False)
        return rows, (run / "quality.csv").read_bytes(), (run / "quality.jsonl").read_bytes()

    rows, table, entries = files()
    with (run / "quality.csv").open() as file:
        assert [{name: str(value) for name, value in row.items()} for row in rows] == list(csv.DictReader(file))
    stored = [json.loads(line) for line in entries.splitlines()]
    assert len(stored) == 24 and {"clip_score", "pixels"} <= stored[0].keys()
    lines = (run / "results.jsonl").read_text().splitlines()
    (run / "results.jsonl").write_text("\n".join([*lines[:8][::-1], *lines[8:]]))
    assert files() == (rows, table, entries)


def test_an_image_that_is_missing_or_broken_is_named_and_left_out(run, caplog):
    whole = quality(run, features=None, similarity="pixels", progress=False)
    (run / "images" / "cfg" / "m01-3.png").unlink()
    broken = run / "images" / "cfg" / "m00-1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    for path in (run / "images" / "delayed-at").glob("g*"):
        path.unlink()
    rows = quality(run, features=None, similarity="pixels", progress=False)
    assert [(row["method"], row["group"], row["n"], row["missing"]) for row in rows] == [
        ("cfg", "memorized", 6, 2),
        ("cfg", "general", 4, 0),
        ("delayed-at", "memorized", 8, 0),
    ]
    assert rows[1:] == whole[1:3]
    assert "2 of 8 images" in caplog.messages[0] and "m00-1.png" in caplog.messages[0] and "m01-3.png" in caplog.messages[0]
    assert "4 of 4 images" in caplog.messages[1] and "g000-0.png" in caplog.messages[1]
    for path in (run / "images").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="no image that can be read"):
        quality(run, features=None, similarity="pixels", progress=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"features": "vgg"}, "features must be one of concept, inception, sscd, clip, dino, or None; got 'vgg'"),
        ({"similarity": "lpips"}, "similarity must be among pixels, sscd, dino, clip; got 'lpips'"),
        ({"features": None}, "nothing to measure"),
        ({"references": "gone"}, "references folder 'gone' does not exist"),
        ({"references": "empty"}, "must hold at least 4 images, has 0"),
        ({"clip": "empty"}, "clip must be a CLIP model in safetensors, a folder or hub id; got 'empty'"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_written(run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match=says):
        quality(run, **arguments, progress=False)
    assert not list(run.glob("quality*"))


def test_a_broken_reference_is_named(run, references):
    broken = next(references.rglob("*.png"))
    data = bytearray(broken.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"  # the length of the first chunk
    broken.write_bytes(data)
    with pytest.raises(OSError, match=broken.name):
        quality(run, references=references, progress=False)


def test_features_and_references_must_fit_the_scenario(run):
    other = json.loads((run / "run.json").read_text()) | {"scenario": asdict(Scenario("small", "some/model", "gone.jsonl"))}
    (run / "run.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="need a classifier beside the model, and 'some/model' has none"):
        quality(run, progress=False)
    with pytest.raises(ValueError, match="references must be a folder of images for scenario 'small', got None"):
        quality(run, features="sscd", progress=False)


def test_a_run_of_other_prompts_is_refused(run):
    text = (run / "results.jsonl").read_text()
    (run / "results.jsonl").write_text(text.replace('"g000"', '"g999"'))
    with pytest.raises(ValueError, match="no longer has the run's general prompt g999"):
        quality(run, similarity="pixels", progress=False)


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_says_what_to_install(run):
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        quality(run, features="inception", progress=False)


def test_a_missing_font_is_named(run, monkeypatch, tmp_path):
    from basinescape.bench.evaluation import scenes

    monkeypatch.setattr(scenes, "FONT", tmp_path / "gone.ttf")
    scenes._glyph.cache_clear()
    with pytest.raises(FileNotFoundError, match="install fonts-noto-color-emoji"):
        quality(run, progress=False)


@pytest.mark.skipif(not FONT.is_file(), reason="the font that scenes are drawn with is not installed")
def test_other_fresh_scenes_are_nearer_to_the_reference_than_noise():
    embed = concept(PRESETS["tiny"])
    scenes, noise = embed(list(fresh_scenes("tiny", 96))), embed([noise_image(i) for i in range(48)])
    assert fid(scenes[:48], scenes[48:]) < fid(scenes[:48], noise) / 4


def test_the_report_shows_the_table(run, tmp_path, monkeypatch, capsys):
    report([run], tmp_path / "page.html")
    assert "<h3>Quality</h3>" not in (tmp_path / "page.html").read_text()
    options = ["--features", "none", "--similarity", "pixels", "--no-progress"]
    monkeypatch.setattr("sys.argv", ["basinescape", "quality", str(run), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and "pixels_p95" in capsys.readouterr().out
    report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    body = page[page.index("<h3>Quality</h3>") :]
    with (run / "quality.csv").open() as file:
        first = next(csv.DictReader(file))
    assert f'data-value="{float(first["pixels_mean"])}">{float(first["pixels_mean"]):.3g}</td>' in body
    assert body.index(">memorized</td>") < body.index(">general</td>")


@pytest.mark.skipif(not FONT.is_file(), reason="the font that scenes are drawn with is not installed")
def test_the_threshold_lies_between_fresh_scenes_and_the_best_copies():
    unlike, copies = threshold.fresh("pixels", 2), threshold.autoencoded("pixels")
    assert unlike.shape == (64,) and copies.shape == (32,)
    assert np.quantile(unlike, 0.9) < PRESETS["tiny"].threshold < copies.min()


def test_a_dino_embedding_tells_images_apart(tmp_path):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    embed = vision(str(tmp_path))()
    first, second, again = embed([noise_image(0), noise_image(1), noise_image(0)])
    assert first.shape == (32,) and np.array_equal(first, again) and not np.allclose(first, second)
