"""A calibration: measured once however often it is stopped, of one model, over other steps where that is sound; the command."""

import copy
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from basinescape import At, Calibration, Guidance, Sampler
from basinescape.bench import cli
from basinescape.bench.commands.options import found
from basinescape.bench.evaluation.calibrate import CAPTIONS, prompts_for
from basinescape.data.prompts import read_prompts
from basinescape.fingerprint import differing, fingerprint
from basinescape.interpolation import curve, sound
from basinescape.ordinary import Ordinary

PROMPTS = [f"a picture of a {name}" for name in ("cat", "frog", "dog", "fish", "crab")]
RUNGS = [Guidance.delayed(7.5, until=At(600))]
STEPS = 5


@pytest.fixture(scope="module")
def sampler(pipe):
    return Sampler.from_pipeline(pipe, "dpmsolver++")


def measure(sampler, seeds=3, **options):
    return Calibration.measure(sampler, PROMPTS, seeds, STEPS, 7.5, RUNGS, batch_size=2, progress=False, **options)


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
    """9 calls: plain, unguided and one rung, each of three batches."""
    kept = tmp_path / "kept.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measure(Counted(sampler, stop=4), resume=kept)
    with kept.open("a") as file:
        file.write('{"what": "torn')
    again = Counted(sampler)
    found = measure(again, resume=kept)
    assert again.calls == 9 - 4
    for one, other in zip(found.rungs, calibration.rungs, strict=True):
        assert one.gap == pytest.approx(other.gap, rel=1e-3) and one.guidance == other.guidance
        assert (one.early, one.verdict) == pytest.approx((other.early, other.verdict), rel=1e-2)
    assert found.ordinary.unguided == pytest.approx(calibration.ordinary.unguided, rel=1e-3)
    other = Counted(sampler)
    measure(other, seeds=4, resume=kept)
    assert other.calls == 9  # the gaps of other seeds do not count


def test_what_is_ordinary_is_what_plain_and_unguided_samples_show(sampler, calibration):
    made = sampler(PROMPTS, 3, STEPS, Guidance.cfg(7.5), output="latent", progress=False, batch_size=2)
    gaps = made.noise_gap.numpy()
    low, high = np.quantile(gaps, [0.05, 0.95], axis=0)
    assert np.allclose(calibration.ordinary.low, low, rtol=1e-3) and np.allclose(calibration.ordinary.high, high, rtol=1e-3)
    looks = np.log((gaps[:, :2] / np.median(gaps, axis=0)[:2]).mean(axis=1))
    assert calibration.ordinary.looks[1] == pytest.approx((looks.mean(), looks.std(ddof=1)), abs=1e-3)
    above = [calibration.ordinary.threshold(2, rate) for rate in (0.5, 0.1, 0.01)]
    assert above == sorted(above) and above[0] == pytest.approx(math.exp(looks.mean()), rel=1e-3)
    # Without guidance the first gap is that of the noise alone, as under plain guidance; the last is not.
    assert calibration.ordinary.unguided[0] == pytest.approx(calibration.rungs[0].gap[0], rel=1e-3)
    assert calibration.ordinary.unguided[-1] != pytest.approx(calibration.rungs[0].gap[-1], rel=1e-2)
    assert calibration.ordinary.transition in [round(level, 1) for level in calibration.rungs[0].levels]
    assert calibration.settled().leaving(calibration.rungs[0].levels)[0].limit == pytest.approx(
        1.5 * calibration.ordinary.unguided[0]
    )


def test_it_is_saved_and_read_whole(calibration, tmp_path):
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration


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


def test_another_model_is_warned_of(calibration, random_pipeline, sampler, caplog):
    assert calibration.fitted(sampler, STEPS) is calibration and not caplog.messages
    other = Sampler.from_pipeline(random_pipeline("sd", 16, "epsilon"), "ddim")
    replace(calibration, rungs=tuple(replace(rung, levels=()) for rung in calibration.rungs)).fitted(other, STEPS)
    assert len(caplog.messages) == 1 and "another model (its unet, text_encoder differ)" in caplog.text


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


def test_over_other_steps_a_guard_stays_one(sampler, calibration):
    fitted = calibration.fitted(sampler, 8)
    levels = sampler.solver(8).levels
    assert [len(rung.gap) for rung in fitted.rungs] == [8, 8] and fitted.steps == 8
    assert [gap > 0 for gap in fitted.rungs[1].gap] == [level <= 600 for level in levels]
    low, high = min(calibration.rungs[0].gap), max(calibration.rungs[0].gap)
    assert all(low <= gap <= high for gap in fitted.rungs[0].gap)
    out = sampler(PROMPTS[:2], 0, 8, Guidance.guard(7.5, fitted), output="latent", progress=False)
    assert out.attempts.min() >= 1 and out.score.isfinite().all()
    assert len(fitted.settled().ordinary) == 8
    with pytest.raises(ValueError, match=r"too far from the sampler's 20 .* calibrate for those"):
        calibration.fitted(sampler, 20)


def test_the_captions_that_ship_are_plain_and_differ():
    texts = [job.prompt for job in read_prompts(CAPTIONS)]
    assert 190 <= len(texts) == len({text.casefold() for text in texts}) <= 220
    assert all(3 <= len(text.split()) <= 15 and text.isascii() for text in texts)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["basinescape", "calibrate", "--no-progress", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_the_command_writes_what_generate_finds(mine, monkeypatch, capsys):
    """Beside the model, from the prompts beside the model, with the region of the update norm and a plot."""
    assert prompts_for(str(mine)) == CAPTIONS and prompts_for("owner/name") == CAPTIONS
    (mine / "ordinary.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[:3]))
    assert not run(monkeypatch, "--model", mine, "--steps", 4, "--scheduler", "dpmsolver++", "--device", "cpu")
    assert "3 prompts, 4 steps" in capsys.readouterr().out
    made = Calibration.load(mine / "calibration.json")
    assert found(str(mine), None) == mine / "calibration.json" and made.images == 3
    assert sorted(made.model) == ["text_encoder", "unet"] and {"update", "latents", "clean"} == set(made.ordinary.stable)
    assert all(len(steps) == 3 for steps in made.ordinary.stable.values())
    assert (mine / "calibration.png").stat().st_size > 10_000 and not list(mine.glob("*.part*"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompts", "missing.jsonl"), "missing.jsonl"),
        (("--out", "none/c.json"), "in a folder that exists"),
        (("--out", "."), "must be a file"),
        (("--model", "owner/name"), "out must be given"),
        (("--rate", 2), "rate must be"),
        (("--steps", 0), "steps must be"),
        (("--batch-size", 0), "batch_size must be"),
        (("--scheduler", "nope"), "scheduler must be"),
    ],
)
def test_bad_input_is_one_line_before_any_work(mine, tmp_path, monkeypatch, capsys, drawn, options, says):
    monkeypatch.chdir(tmp_path)
    before = sorted(mine.iterdir())
    model = () if "--model" in options else ("--model", mine)
    assert run(monkeypatch, *model, *options, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1 and not drawn.asked and sorted(mine.iterdir()) == before


def test_where_the_unguided_gap_does_not_rise_the_static_transition_is_the_papers():
    plain, levels = torch.ones(2, 4), (900.0, 700.0, 300.0, 100.0)
    rising, falling = torch.tensor([[1.0, 3.0, 4.0, 2.0]] * 2), torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2)
    assert Ordinary.of(plain, rising, levels).transition == 700.0
    assert Ordinary.of(plain, falling, levels).transition == 500.0
