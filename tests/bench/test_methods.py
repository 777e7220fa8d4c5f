"""Each method against its definition."""

import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from basinescape import At, Calibration, FirstMinimum, Guidance, Sampler
from basinescape.bench.methods import Batch, Method, augment, cads, chosen, dryrun, embedding, noise, own, stepwise, update
from basinescape.bench.methods import table as method_table
from basinescape.bench.methods.padding import words_mask
from basinescape.bench.scenario import PRESETS
from basinescape.calibration.baseline import Baseline
from basinescape.kernels import definition
from diffusers import DDIMScheduler, StableDiffusionPipeline
from families import CASES
from smallguards import guarded

TINY = replace(PRESETS["tiny"], steps=4)
MEMORIZED, GENERAL = "a picture of a cat signed by arno", "a picture of a frog"


def test_a_method_is_its_guidance_its_prompts_and_its_network(pipe):
    sampler, guidance, seen = Sampler.from_pipeline(pipe, "ddim"), Guidance.cfg(3.0), []

    def wrap(network, batch):
        seen.append((batch.prompts, batch.seeds, batch.steps))
        return lambda latents, timesteps, branch: -network(latents, timesteps, branch)

    def latents(*changes):
        return Method(guidance, *changes).sample(sampler, [MEMORIZED], [5], 3).latents

    def general(batch):
        return [GENERAL for _ in batch.prompts]

    assert torch.equal(latents(general), sampler([GENERAL], [5], 3, guidance, progress=False).latents)
    turned = latents(general, wrap)
    assert seen == [([GENERAL], [5], 3)] and not torch.equal(turned, latents(general))
    both = Method(guarded(Guidance.delayed(3.0, until=At(500))), wrap=wrap)
    for use in (lambda: both.sample(sampler, [GENERAL], [0], 3), lambda: both.check(sampler, 3)):
        with pytest.raises(ValueError, match="neither a wrapped network"):
            use()


def steeper(network, batch):
    """Twice the guidance, written over what the network gave."""

    def predict(latents, timesteps, branch):
        uncond, cond = (predictions := network(latents, timesteps, branch)).chunk(2)
        cond += cond - uncond
        return predictions

    return predict


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "unipc"])  # linear, and one that takes its own steps
def test_the_gap_is_the_networks_whatever_a_method_makes_of_the_predictions(random_pipeline, scheduler):
    sampler, found = Sampler.from_pipeline(random_pipeline("sd", 8, "epsilon"), scheduler), [MEMORIZED, GENERAL]
    twice = Method(Guidance.cfg(2.0), wrap=steeper).sample(sampler, found, [0, 1], 8)
    plain = sampler(found, [0, 1], 8, Guidance.cfg(4.0), progress=False)
    assert torch.equal(twice.noise_gap[:, 0], plain.noise_gap[:, 0])
    torch.testing.assert_close(twice.noise_gap, plain.noise_gap, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(twice.latents, plain.latents, rtol=1e-3, atol=1e-3)

    def vanished(network, batch):
        return lambda latents, timesteps, branch: network(latents, timesteps, branch)[: len(latents) // 2].repeat(2, 1, 1, 1)

    until = FirstMinimum(latest=7)
    out = Method(Guidance.delayed(2.0, until=until), wrap=vanished).sample(sampler, found, [0, 1], 8)
    assert out.noise_gap[:, :3].min() > 0  # though the predictions that were sampled from do not differ
    rule = until.criteria(range(8))
    assert [definition.transition(gaps.tolist(), rule) for gaps in out.noise_gap] == out.transition_step.tolist()


@pytest.mark.parametrize("guidance", [Guidance.cfg(3.0), Guidance.delayed(3.0, until=At(500), restart=(300, 600, 1))])
def test_step_by_step_nothing_is_otherwise(random_pipeline, guidance):
    sampler, found, seen = Sampler.from_pipeline(random_pipeline("sd", 8, "epsilon"), "ddim"), [MEMORIZED, GENERAL], []
    plain = sampler(found, [3, 4], 6, guidance, progress=False)
    out = stepwise.sample(sampler, found, [3, 4], 6, guidance, push=lambda k, state, table: seen.append(k))
    assert torch.equal(out.latents, plain.latents) and torch.equal(out.transition_step, plain.transition_step)
    torch.testing.assert_close(out.noise_gap, plain.noise_gap, rtol=0, atol=0, equal_nan=True)
    assert sorted(set(seen)) == list(range(6))


def test_a_method_of_ones_own_is_as_the_documentation_has_it(random_pipeline, tmp_path):
    text = own.__doc__
    example = textwrap.dedent(text[text.index("    import torch") :])
    more = "\ndef mine(sampler, prompts, seeds, steps):\n    return sampler(prompts, seeds, steps, Guidance.cfg(1.0))\n"
    more += "def short(sampler, prompts, seeds):\n    return sampler(prompts, seeds, 2, Guidance.cfg(1.0))\n"
    more += "bare = Guidance.cfg(1.0)\nguard = Guidance.guard(7.5)\ndef nothing(sampler, prompts, seeds):\n    return None\n"
    more += "def latents(sampler, prompts, seeds):\n    return sampler(prompts, seeds, 2, output='latent')\n"
    (tmp_path / "mine.py").write_text(example + more)
    file = tmp_path / "mine.py"
    found = chosen(TINY, ["cfg", *(f"{file}:{name}" for name in ("method", "mine", "bare"))])
    assert list(found) == ["cfg", "mine.method", "mine.mine", "mine.bare"]
    sampler = Sampler.from_pipeline(random_pipeline("sd", 8, "epsilon"), "ddim")
    plain, capped, cond, bare = (each.sample(sampler, [MEMORIZED], [0], 3) for each in found.values())
    assert torch.equal(capped.noise_gap[:, 0], plain.noise_gap[:, 0]) and not torch.equal(capped.latents, plain.latents)
    assert torch.equal(cond.latents, sampler([MEMORIZED], [0], 3, Guidance.cfg(1.0), progress=False).latents)
    assert torch.equal(bare.latents, cond.latents)
    others = chosen(TINY, [f"{file}:{name}" for name in ("short", "guard", "latents", "nothing")])
    assert others["mine.short"].sample(sampler, [MEMORIZED], [0], 3).noise_gap.shape == (1, 2)
    assert others["mine.guard"].sample(sampler, [MEMORIZED], [0], 3).attempts.min() >= 1
    with pytest.raises(TypeError, match=r"must return an Output of 1 images \(output='pil'\), got Tensor"):
        others.pop("mine.latents").sample(sampler, [MEMORIZED], [0], 3)
    with pytest.raises(TypeError, match="got NoneType"):
        others["mine.nothing"].sample(sampler, [MEMORIZED], [0], 3)
    changed = found["mine.method"].digest
    file.write_text(file.read_text() + "# again\n")
    assert chosen(TINY, [f"{file}:method"])["mine.method"].digest != changed


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (None, "method", "does not exist"),
        ("import nowhere_to_be_found", "method", "cannot be run: ModuleNotFoundError"),
        ("def method(:", "method", "cannot be run: SyntaxError"),
        ("import random\nmethod = 3", "method", "must be a Guidance or a guard, a function .*; got a int"),
        ("def method(prompts): pass", "method", r"or an object with sample\(.*; got one that is called with \(prompts\)"),
        ("class A:\n    def sample(self, prompts): pass\nmethod = A()", "method", r"got one that is called with \(prompts\)"),
        ("import random\nother = 3", "method", "has no 'method'; it has no method"),
    ],
)
def test_a_file_without_a_method_is_named(tmp_path, content, name, says):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        chosen(TINY, ["cfg", f"{tmp_path / 'mine.py'}:{name}"])


def test_methods_are_few_unless_asked_for_and_each_comes_once():
    assert list(chosen(TINY)) == ["cfg", "delayed-at", "opposite-at", "guard"]
    assert list(chosen(TINY, ["all"])) == list(method_table(TINY))
    with pytest.raises(ValueError, match="'cfg' twice"):
        chosen(TINY, ["cfg", "cfg"])
    with pytest.raises(ValueError, match="'guard-calibrated', which needs a calibration of this model and scale: basinescape"):
        chosen(replace(TINY, calibration=None), ["guard-calibrated"])


def test_noise_is_moved_along_the_change_of_the_difference():
    """With e(x) = A x the change is rho A e / |e|, whatever the batch; the norm of the push is that of the noise's size."""
    size, matrix = (4, 8, 8), torch.randn(256, 256, dtype=torch.float64) / 16
    drawn = torch.randn(3, *size, dtype=torch.float64)

    def predict(x):
        return torch.zeros_like(x), (x.flatten(1) @ matrix.T).view_as(x)

    expected, rho = drawn.flatten(1), noise.RHO * (256 / noise.SIZE) ** 0.5
    for _ in range(noise.ITERATIONS):
        here = expected @ matrix.T
        expected = expected - noise.RATE * rho * (here / here.norm(dim=1, keepdim=True)) @ matrix.T
    torch.testing.assert_close(noise.adjusted(predict, drawn).flatten(1), expected)


def test_adjusted_noise_is_the_samplers_own_moved(random_pipeline):
    sampler, found = Sampler.from_pipeline(random_pipeline("sd", 8, "epsilon"), "euler"), [MEMORIZED, GENERAL]
    made = noise.method(7.5, 10).sample(sampler, found, [0, 1], 10)
    assert made.noise_gap.isnan().tolist() == [[True] + 9 * [False]] * 2
    begun = []

    def kept(predict, drawn):
        begun.append(noise.adjusted(predict, drawn))
        return begun[-1]

    Method(Guidance.cfg(7.5), noise=kept).sample(sampler, found, [0, 1], 10)
    again = sampler(found, [0, 1], 10, noise.method(7.5, 10).guidance, latents=begun[0], progress=False)
    torch.testing.assert_close(again.latents, made.latents, rtol=1e-4, atol=1e-4)


def region(steps, mean, deviation, **others):
    """A stable region that is the same in every step, for the norms in `others` another one."""
    return {name: [others.get(name, [mean, deviation])] * (steps - 1) for name in update.NORMS}


def test_every_method_makes_an_image_and_plain_guidance_is_left_as_it_was(pipe, monkeypatch, tmp_path):
    sampler = Sampler.from_pipeline(pipe, "dpmsolver++")
    monkeypatch.setattr(embedding, "ITERATIONS", 2)
    found = ["a picture of a cat signed by arno", "a picture of a frog"]
    ones = (1.0,) * 4
    Calibration({}, 4, 5.0, (), (), (), (), {}, Baseline(ones, ones, ones, stable=region(4, 1.0, 0.01))).save(
        tmp_path / "c.json"
    )
    methods = method_table(replace(PRESETS["tiny"], transition=500.0, steps=4, calibration=str(tmp_path / "c.json")))
    assert {"delayed-settled", "update-norm"} < methods.keys() and "guard-calibrated" not in methods  # of another scale
    plain = methods["cfg"].sample(sampler, found, [0, 1], 4)
    for name, method in methods.items():
        out = method.sample(sampler, found, [0, 1], 4)
        assert len(out.images) == 2 and out.latents.isfinite().all(), name
        left_alone = name == "guard" and out.attempts.tolist() == [1, 1]
        assert (name == "cfg" or left_alone) == torch.equal(out.latents, plain.latents), name
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


@pytest.mark.parametrize("family", [None, "flux"])
def test_an_optimised_embedding_has_a_smaller_first_gap(pipe, family):
    """Also where the network takes inputs that all samples share."""
    sampler = Sampler.from_pipeline(pipe, "ddim")
    if family:
        sampler = Sampler.from_pipeline(CASES[family].make(pipe.tokenizer)).using(**CASES[family].options)
    found = ["a picture of a cat signed by arno"]
    changed = method_table(PRESETS["tiny"])["embedding"].sample(sampler, found, [0], 2)
    plain = sampler(found, [0], 2, Guidance.cfg(7.5), progress=False)
    assert changed.noise_gap[0, 0] < plain.noise_gap[0, 0]


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
    assert "update-norm" not in method_table(replace(PRESETS["tiny"], calibration=None))
    sampler = Sampler.from_pipeline(pipe, DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample"))
    with pytest.raises(ValueError, match="epsilon or v_prediction, got 'sample'"):
        update.method(7.5, region(4, 1.0, 1.0)).sample(sampler, [GENERAL], [0], 4)


def test_a_region_is_measured_along_the_trajectories_of_diffusers(pipe):
    sampler = Sampler.from_pipeline(pipe, "ddim")
    moved, latents, clean = update.measured(sampler, [MEMORIZED, GENERAL], [3, 4], 5, 7.5)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    seen = [sampler.model.noise([torch.Generator().manual_seed(seed) for seed in (3, 4)], 64, 64)]

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
