"""A calibration: measured once however often it is stopped, of one model, over other steps where that is sound; the command."""

import copy
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from basinescape import Calibration, Guidance, Sampler
from basinescape.bench import cli
from basinescape.bench.methods import region
from basinescape.calibration.baseline import CAPTIONS, Baseline, ordinary_prompts, unguided
from basinescape.calibration.interpolation import curve, sound
from basinescape.calibration.measure import calibrate
from basinescape.commands.model_loading import found
from basinescape.data.prompts import read_prompts
from basinescape.kernels.definition import transition
from basinescape.models.fingerprint import differing, fingerprint

PROMPTS = [f"a picture of a {name}" for name in ("cat", "frog", "dog", "fish", "crab")]
STEPS = 5


@pytest.fixture(scope="module")
def sampler(pipe):
    return Sampler.from_pipeline(pipe, "dpmsolver++")


def measure(sampler, seeds=3, **options):
    return Calibration.measure(sampler, PROMPTS, seeds, STEPS, 7.5, settled=True, batch_size=2, progress=False, **options)


@pytest.fixture(scope="module")
def calibration(sampler):
    return measure(sampler)


class Counted:
    """A sampler that counts its calls, and stops in the midst of them when told to."""

    def __init__(self, sampler, stop=math.inf):
        self.sampler, self.calls, self.stop = sampler, 0, stop

    def __getattr__(self, name):
        return getattr(self.sampler, name)

    def __call__(self, *arguments, **options):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return self.sampler(*arguments, **options)


def test_a_measurement_that_was_stopped_goes_on_and_gives_the_same(sampler, calibration, tmp_path):
    """6 calls: plain and unguided, each of three batches."""
    kept = tmp_path / "kept.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measure(Counted(sampler, stop=4), resume=kept)
    with kept.open("a") as file:
        file.write('{"what": "torn')
    again = Counted(sampler)
    found = measure(again, resume=kept)
    assert again.calls == 6 - 4
    assert found.gap == pytest.approx(calibration.gap, rel=1e-3)
    assert found.scores == pytest.approx(calibration.scores, rel=1e-2, abs=1e-4)
    assert found.baseline.unguided == pytest.approx(calibration.baseline.unguided, rel=1e-3)
    other = Counted(sampler)
    measure(other, seeds=4, resume=kept)
    assert other.calls == 6  # the gaps of other seeds do not count


def test_a_calibration_is_not_replaced_unasked_and_one_that_is_stopped_keeps_what_it_has(sampler, tmp_path, caplog, capsys):
    out = tmp_path / "c.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate(Counted(sampler, stop=2), PROMPTS, 0, out, steps=STEPS, batch_size=2, progress=False)
    kept = out.with_name("c.json.part.jsonl")
    assert len(kept.read_text().splitlines()) == 4 and "the same command goes on from there" in caplog.text
    again = Counted(sampler)
    calibrate(again, PROMPTS, 0, out, steps=STEPS, batch_size=2, progress=False)
    assert again.calls == 1 and not kept.exists()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        calibrate(again, PROMPTS, 1, out, steps=STEPS, batch_size=2, progress=False)
    assert again.calls == 1 and Calibration.load(out).images == 5
    calibrate(again, PROMPTS, 1, str(out), steps=STEPS, batch_size=2, overwrite=True)
    assert again.calls > 1 and "5 samples, 5 steps each" in capsys.readouterr().err


def test_a_scheduler_that_diffusers_lacks_is_named_with_the_option_to_give(calibration):
    assert type(calibration.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert replace(calibration, settings={}).scheduler is None
    with pytest.raises(ValueError, match=r"made with GoneScheduler, which diffusers .* lacks: give another one .--scheduler"):
        _ = replace(calibration, settings={"scheduler": {"class": "GoneScheduler"}}).scheduler


def test_what_is_ordinary_is_what_plain_and_unguided_samples_show(sampler, calibration):
    made = sampler(PROMPTS, 3, STEPS, Guidance.cfg(7.5), output="latent", progress=False, batch_size=2)
    gaps = made.noise_gap.numpy()
    low, high = np.quantile(gaps, [0.05, 0.95], axis=0)
    assert np.allclose(calibration.baseline.low, low, rtol=1e-3) and np.allclose(calibration.baseline.high, high, rtol=1e-3)
    assert np.allclose(calibration.first_gaps, gaps / np.median(gaps, axis=0), rtol=1e-3)
    assert np.allclose(calibration.scores, sampler.judge(made.latents, PROMPTS, 3).score, atol=1e-4)
    above = [calibration.threshold(rate) for rate in (0.5, 0.3, 0.17)]
    assert above == sorted(above) and above[-1] == max(calibration.scores)
    # Without guidance the first gap is that of the noise alone, as under plain guidance; the last is not.
    assert calibration.baseline.unguided[0] == pytest.approx(calibration.gap[0], rel=1e-3)
    assert calibration.baseline.unguided[-1] != pytest.approx(calibration.gap[-1], rel=1e-2)
    assert calibration.baseline.transition in [round(level, 1) for level in calibration.timesteps]
    assert calibration.settled().criteria(calibration.timesteps)[0].limit == pytest.approx(
        1.5 * calibration.baseline.unguided[0]
    )


def test_it_is_saved_and_read_whole(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == Calibration.load(tmp_path) == calibration
    (tmp_path / "calibration.json").unlink()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Calibration.load(tmp_path)


def test_a_fingerprint_knows_its_model_by_its_weights(pipe, tmp_path):
    own = json.loads(json.dumps(fingerprint(pipe)))
    pipe.save_pretrained(tmp_path / "other-name")
    assert differing(own, fingerprint(Sampler.from_pretrained(tmp_path / "other-name", "cpu", "float32").pipe)) == []
    for dtype in (torch.float16, torch.bfloat16):
        assert differing(own, fingerprint(copy.deepcopy(pipe).to(dtype))) == []
    tuned = copy.deepcopy(pipe)
    with torch.no_grad():
        for weight in tuned.unet.parameters():
            weight.mul_(1 + 1e-4)
    assert differing(own, fingerprint(tuned)) == ["unet"]
    assert differing(own, fingerprint(tuned.to(torch.bfloat16))) in ([], ["unet"])  # finer than bfloat16 tells
    headed = copy.deepcopy(pipe)
    headed.unet.register_to_config(norm_eps=1e-3)
    assert differing(own, fingerprint(headed)) == ["unet"]


def test_another_size_is_warned_of(calibration, sampler, caplog):
    calibration.fitted(sampler.using(width=128), STEPS)
    assert "made for pictures of 64 x 64 pixels, and these have 64 x 128: calibrate for those" in caplog.text
    made = Guidance.guard(7.5, calibration, rate=0.4, later=0.2)
    read = Guidance.from_dict(json.loads(json.dumps(made.to_dict())))
    for guard, width, said in ((made, 64, 0), (made, 32, 1), (read, 48, 1)):  # a noise gap grows with the picture
        caplog.clear()
        for seed in range(2):
            sampler(PROMPTS[0], seed, STEPS, guard, width=width, output="latent", progress=False)
        assert caplog.text.count(f"made for pictures of 64 x 64 pixels, and these have 64 x {width}") == said


def test_another_model_is_warned_of(calibration, random_pipeline, sampler, caplog):
    """Once for each calibration, also of its guard."""
    assert calibration.fitted(sampler, STEPS) is calibration and not caplog.messages
    other = Sampler.from_pipeline(random_pipeline("sd", 16, "epsilon"), "ddim")
    (scores := replace(calibration, timesteps=(), gap=())).fitted(other, STEPS)
    assert len(caplog.messages) == 1 and "another model (its unet, text_encoder differ)" in caplog.text
    other.using(width=16)(PROMPTS[0], 0, 2, Guidance.guard(7.5, scores, rate=0.4, later=0.2), progress=False)
    assert caplog.text.count("another model") == 1
    replace(calibration, model={"unet": calibration.model["unet"]}).made_on(other)
    assert caplog.text.count("another model") == 2


def test_gaps_are_interpolated_over_the_noise_level():
    known = [900.0, 700.0, 500.0, 300.0, 100.0]
    values = [math.exp(t / 300) for t in known]
    assert curve(known, values, known) == pytest.approx(values, rel=1e-4)
    assert curve(known, values, [800.0, 200.0]) == pytest.approx([math.exp(8 / 3), math.exp(2 / 3)], rel=1e-4)
    assert curve(known, values, [950.0, 50.0]) == pytest.approx([values[0], values[-1]], rel=1e-4)


@pytest.mark.parametrize(
    ("wanted", "holds"),
    [
        ([900, 700, 500, 300, 100], True),
        ([990, 800, 600, 400, 200, 1], True),
        ([800, 400, 100], True),
        ([800, 100], False),  # less than half as many
        (list(range(900, 90, -75)), False),  # more than twice as many
        ([900, 700, 500, 300], True),
        ([600, 450, 300, 150], True),
        ([1150, 700, 500, 300], False),
        ([math.nan] * 5, False),
    ],
)
def test_steps_too_far_from_the_measured_ones_are_not_interpolated(wanted, holds):
    assert sound([900, 700, 500, 300, 100], wanted) is holds


@pytest.mark.parametrize(
    ("known", "wanted", "holds"),
    [
        ([800, 400], [1200, 0], True),  # a step beyond either end
        ([800, 400], [1201, 0], False),
        ([800, 400], [1200, -1], False),
        ([800, 400], [600], True),  # half as many
        ([800, 400], [800, 700, 600, 400], True),  # twice as many
        ([800, 400], [800, 700, 600, 500, 400], False),
        ([800], [800], False),
        ([800, math.nan], [800, 400], False),
        ([800, 400], [800, math.nan], False),
    ],
)
def test_gaps_hold_for_half_to_twice_as_many_steps_and_a_step_beyond_either_end(known, wanted, holds):
    assert sound(known, wanted) is holds


def test_over_other_steps_a_guard_stays_one(sampler, calibration, caplog):
    """Where they are too far from the measured ones nothing is given up early, which is said."""
    fitted = calibration.fitted(sampler, 8)
    assert len(fitted.gap) == fitted.steps == 8 and all(
        min(calibration.gap) <= gap <= max(calibration.gap) for gap in fitted.gap
    )
    made = Guidance.guard(7.5, fitted, rate=0.4, later=0.2)
    out = sampler(PROMPTS[:2], 0, 8, made, output="latent", progress=False)
    assert made.early.suits(sampler.solver(8).levels) and out.attempts.min() >= 1 and out.score.isfinite().all()
    assert len(fitted.settled().ordinary) == 8 and not caplog.messages
    assert replace(calibration, baseline=None).fitted(sampler, 8) == replace(fitted, baseline=None)
    far = calibration.fitted(sampler, 20)
    assert far.scores == calibration.scores and Guidance.guard(7.5, far, rate=0.4, later=0.2).early is None
    assert "too far from the sampler's 20" in caplog.text and "no attempt is given up early" in caplog.text
    with pytest.raises(ValueError, match="for 'settled': calibrate with --settled"):
        far.settled()


def test_a_sample_that_is_not_finite_is_left_out_by_name(sampler, caplog):
    """No threshold is made of it, and none that is not a number is saved or loaded."""

    class Broken(Counted):
        def __call__(self, prompts, *arguments, **options):
            made = super().__call__(prompts, *arguments, **options)
            made.noise_gap[[prompt == PROMPTS[1] for prompt in prompts], 2] = math.nan
            return made

    found = measure(Broken(sampler))
    assert found.images == 4 and all(map(math.isfinite, (*found.scores, *found.gap)))
    assert f"{PROMPTS[1]!r}, seed 4" in caplog.text
    with pytest.raises(ValueError, match="scores must be a finite number"):
        replace(found, scores=(math.nan,) * 4)
    for rate in (0.0, 1.0):
        with pytest.raises(ValueError, match="rate must be between 0 and 1"):
            found.threshold(rate)


def test_a_file_of_numbers_that_are_none_is_refused(calibration, tmp_path):
    calibration.save(tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    (tmp_path / "c.json").write_text(text.replace(str(calibration.scores[0]), "NaN", 1))
    with pytest.raises(ValueError, match="is not one: scores must be a finite number"):
        Calibration.load(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('{"rungs": []}')
    with pytest.raises(ValueError, match="one of an earlier version must be measured again"):
        Calibration.load(tmp_path / "c.json")


def test_the_captions_that_ship_are_plain_and_differ():
    texts = [job.prompt for job in read_prompts(CAPTIONS)]
    assert 190 <= len(texts) == len({text.casefold() for text in texts}) <= 220
    assert all(3 <= len(text.split()) <= 15 and text.isascii() for text in texts)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["basinescape", "calibrate", "--no-progress", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.mark.slow
def test_the_command_writes_what_generate_finds(mine, monkeypatch, capsys):
    """Beside the model, from the prompts beside the model, with a plot; the region of update-norm is added to it."""
    assert ordinary_prompts(str(mine)) == CAPTIONS and ordinary_prompts("owner/name") == CAPTIONS
    (mine / "ordinary.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[:3]))
    asked = ("--model", mine, "--steps", 4, "--scheduler", "dpmsolver++", "--device", "cpu", "--settled")
    assert not run(monkeypatch, *asked)
    assert "3 pictures, 4 steps" in capsys.readouterr().out
    kept = (mine / "calibration.json").read_bytes()
    assert run(monkeypatch, *asked) == 2 and "--force to replace it" in capsys.readouterr().err
    assert (mine / "calibration.json").read_bytes() == kept
    assert not run(monkeypatch, *asked, "--force", "--seed", 7) and (mine / "calibration.json").read_bytes() != kept
    capsys.readouterr()
    made = Calibration.load(mine / "calibration.json")
    assert found(str(mine), None) == made and made.images == 3
    assert sorted(made.model) == ["text_encoder", "unet"] and made.baseline.stable is None
    monkeypatch.setattr(sys, "argv", ["region", "--model", str(mine)])
    region.main()
    stable = Calibration.load(mine / "calibration.json").baseline.stable
    assert {"update", "latents", "clean"} == set(stable) and all(len(steps) == 3 for steps in stable.values())
    assert (mine / "calibration.png").stat().st_size > 10_000 and not list(mine.glob("*.part*"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompts", "missing.jsonl"), "missing.jsonl"),
        (("--out", "none/c.json"), "in a folder that exists"),
        (("--out", "."), "must be a file"),
        (("--model", "owner/name"), "out must be given"),
        (("--steps", 0), "steps must be"),
        (("--batch-size", 0), "batch_size must be"),
        (("--scheduler", "nope"), "scheduler must be"),
        (("--scale", 1), "scale is 1, at which one prediction alone is made"),
    ],
)
def test_bad_input_is_one_line_before_any_work(mine, tmp_path, monkeypatch, capsys, drawn, options, says):
    monkeypatch.chdir(tmp_path)
    before = sorted(mine.iterdir())
    model = () if "--model" in options else ("--model", mine)
    assert run(monkeypatch, *model, *options, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1 and not drawn.asked and sorted(mine.iterdir()) == before


def test_the_spread_of_plain_gaps_is_from_their_5th_to_their_95th_percentile():
    found = Baseline.of(torch.arange(101.0)[:, None] * torch.tensor([1.0, 2.0]), None, (900.0, 100.0))
    assert (found.low, found.high) == ((5.0, 10.0), (95.0, 190.0)) and found.unguided == ()


def test_unguided_runs_measure_the_smallest_gaps_too():
    made = unguided(3)
    levels, gaps = (900.0, 500.0, 100.0), (1e-6, 1e-6, 1e-6)
    assert {before for before, _ in made.weights(levels)} == {0.0} and transition(gaps, made.until.criteria(levels)) == -1


def test_where_the_unguided_gap_does_not_rise_the_static_transition_is_the_papers():
    plain, levels = torch.ones(2, 4), (900.0, 700.0, 300.0, 100.0)
    rising, falling = torch.tensor([[1.0, 3.0, 4.0, 2.0]] * 2), torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2)
    assert Baseline.of(plain, rising, levels).transition == 700.0
    assert Baseline.of(plain, falling, levels).transition == 500.0
