"""The command judge: what it takes from a calibration or a run, what it refuses, and what it says."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
from basinescape import Calibration, Guidance, Sampler
from basinescape.bench import cli
from basinescape.guidance.guard import RATE
from bulkruns import jobs, make
from families import CASES
from judgeruns import judged, kept


def run(monkeypatch, capsys, *arguments):
    """Exit code, standard output and error of `basinescape judge`."""
    monkeypatch.setattr(sys, "argv", ["basinescape", "judge", "--no-progress", "--device", "cpu", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


def test_the_command_judges_as_calibrated_and_says_what_failed(tmp_path, monkeypatch, capsys):
    images, out = kept(tmp_path / "set", 3), tmp_path / "out"
    code, said, _ = run(monkeypatch, capsys, "--images", images, "--out", out, "--model", "tiny")
    known = Calibration.load("tiny")
    assert code == 0 and "of 3 pictures are suspect" in said and str(out / "judge.csv") in said
    assert f"above {known.threshold(RATE):.2f} is suspect" in (out / "judge.html").read_text()
    settings = json.loads((out / "run.json").read_text())
    assert settings["model"] == "tiny" and len(settings["weights"]) == 64 and settings["judged"] == "set"
    (images / "1.txt").unlink()
    code, _, said = run(monkeypatch, capsys, "--images", images, "--out", out, "--model", "tiny", "--threshold", 0.4)
    assert code == 1 and "1 failed (1), the first: failed: no prompt" in said
    assert "above 0.40 is suspect" in (out / "judge.html").read_text()
    (images / "0.txt").unlink()
    (images / "2.txt").unlink()
    _, said, _ = run(monkeypatch, capsys, "--images", images, "--out", out, "--model", "tiny")
    assert said.startswith("0 of 0 pictures are suspect")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--images", "none"), "images 'none' do not exist"),
        (("--threshold", "0.3", "--rate", "0.01"), "give one of the two"),
        (("--shard", "2/2"), "shard must be i/n"),
        (("--probes", "0"), "probes must be"),
        (("--threshold", "nan"), "threshold must be"),
        (("--option", "height=13"), "height must be a multiple of 4"),
        (("--on-error", "nope"), "on_error must be one of stop, skip"),
        (("--rate", "1.5"), "rate must be a number from 0 to 1"),
        (("--rate", "1"), "rate must be between 0 and 1"),
    ],
)
def test_the_command_refuses_before_it_loads_or_writes(tmp_path, monkeypatch, capsys, given, says):
    monkeypatch.chdir(tmp_path)
    kept(tmp_path / "set", 1)
    loaded, load = [], Sampler.from_pretrained
    monkeypatch.setattr(Sampler, "from_pretrained", lambda *given, **named: loaded.append(given) or load(*given, **named))
    code, _, said = run(monkeypatch, capsys, "--images", "set", "--out", "out", "--model", "tiny", *given)
    assert code == 2 and says in said and not (tmp_path / "out").exists()
    assert not loaded or given[0] == "--option"  # only a model knows its sizes


def test_a_rate_needs_a_calibration_and_a_video_model_is_refused(tmp_path, monkeypatch, capsys, mine, tiny):
    images = kept(tmp_path / "set", 1)
    code, _, said = run(monkeypatch, capsys, "--images", images, "--out", tmp_path / "out", "--model", mine, "--rate", 0.1)
    assert code == 2 and "rate needs a calibration" in said
    videos = Sampler.from_pipeline(CASES["wan"].make(tiny.tokenizer))
    with pytest.raises(ValueError, match="makes videos"):
        judged(videos, images, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="have no pictures"):
        judged(Sampler.from_pipeline(tiny), tmp_path / "empty", tmp_path / "out")


def test_only_the_model_that_made_the_pictures_judges_them(tmp_path, monkeypatch, capsys, tiny):
    """It is that of the run, where they are one; another is warned of, whatever its name, and none is guessed."""
    images = kept(tmp_path / "set", 2)
    code, _, said = run(monkeypatch, capsys, "--images", images, "--out", tmp_path / "none")
    assert code == 2 and "model must be given: the one that made the pictures" in said and not (tmp_path / "none").exists()
    make(Sampler.from_pipeline(tiny), jobs(1), tmp_path / "run", Guidance.cfg(5.0))
    code, out, said = run(monkeypatch, capsys, "--images", tmp_path / "run", "--out", tmp_path / "own")
    assert code == 0 and "as tiny judges" in out and "made the pictures" not in said
    read = ("--images", tmp_path / "run", "--model", "flow", "--probes", 1)
    code, out, said = run(monkeypatch, capsys, *read, "--out", tmp_path / "other")
    assert code == 0 and "tiny made the pictures, and flow judges them" in said and "as flow judges" in out
    copied = shutil.copytree(Sampler.model_path("tiny"), tmp_path / "copied")
    shutil.copytree(Sampler.model_path("flow"), tmp_path / "tiny")
    for folder, other in ((copied, False), (tmp_path / "tiny", True)):
        read = ("--images", tmp_path / "run", "--model", folder, "--probes", 1, "--out", tmp_path / f"by-{folder.name}")
        _, _, said = run(monkeypatch, capsys, *read)
        assert ("made the pictures" in said) is other
    run_json = tmp_path / "run" / "run.json"
    run_json.write_text(run_json.read_text().replace('"float32"', '"float16"'))
    read = ("--images", tmp_path / "run", "--model", tmp_path / "tiny", "--probes", 1, "--out", tmp_path / "half")
    _, _, said = run(monkeypatch, capsys, *read)
    assert "made in float16, so only the model's name is compared; --dtype float16 compares weights" in said


def test_a_run_is_judged_with_the_options_and_the_size_it_was_made_with(tmp_path, monkeypatch, capsys, caplog, mine):
    """Not with those of a calibration, which another run may have; what is given goes before both."""
    replace(Calibration.load("tiny"), model={}, settings={"size": [64, 64], "options": {"clip_skip": 2}}).save(
        mine / "calibration.json"
    )
    sampler = Sampler.from_pretrained(mine, "cpu")
    make(sampler, jobs(1), tmp_path / "run", Guidance.cfg(5.0), clip_skip=1, height=16, width=16, model=str(mine))
    for i, (given, expected) in enumerate([((), 1), (("--option", "clip_skip=2"), 2)]):
        run(monkeypatch, capsys, "--images", tmp_path / "run", "--out", tmp_path / f"{i}", *given)
        assert json.loads((tmp_path / f"{i}" / "run.json").read_text())["options"]["clip_skip"] == expected
    assert "pictures are judged in less than half" not in caplog.text


def test_another_size_than_the_calibrations_is_told_of_pictures_that_have_it(tmp_path, monkeypatch, capsys, caplog, mine):
    images = kept(tmp_path / "set", 2, sizes=((16, 16), (64, 64)))
    known = replace(Calibration.load("tiny"), model={}, settings={"size": [16, 16]})
    known.save(mine / "calibration.json")
    run(monkeypatch, capsys, "--images", images, "--out", tmp_path / "out", "--model", mine, "--probes", 1)
    assert "1 pictures are judged in less than half of the pixels that the model makes, 16 x 16, or" in caplog.text
    assert "calibration was made for" not in caplog.text
