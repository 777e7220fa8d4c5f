"""The command line: options that reach the sampler, and one clear line for each bad input."""

import json
import shutil
import subprocess
import sys

import pytest
from basinescape import Calibration, Guidance, Sampler
from basinescape.bench import cli
from runs import QUICK, run, sound, write


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", (), "no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', (), "line 2"),
        ('{"prompt": "a", "id": "../x"}', (), "id must be"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "X"}', (), "already used in line 1"),
        ('{"prompt": "a"}', ("--scheduler", "nope"), "scheduler"),
        ('{"prompt": "a"}', ("--until", "soon"), "until"),
        ('{"prompt": "a"}', ("--dtype", "int3"), "dtype"),
        ('{"prompt": "a"}', ("--device", "abacus"), "device"),
        ('{"prompt": "a"}', ("--scale", "nan"), "scale"),
        ('{"prompt": "a"}', ("--steps", "0"), "steps"),
        ('{"prompt": "a"}', ("--batch-size", "0"), "batch_size"),
        ('{"prompt": "a"}', ("--model", "./missing"), "does not exist"),
        ('{"prompt": "a"}', ("--height", "63"), "height must be a multiple of"),
        ('{"prompt": "a"}', ("--width", "0"), "width must be a multiple of"),
        ('{"prompt": "a"}', ("--clip-skip", "-1"), "clip_skip must be a whole number from 0 to"),
        ('{"prompt": "a"}', ("--clip-skip", "99"), "clip_skip must be a whole number from 0 to"),
    ],
)
def test_bad_input_ends_with_one_line_before_any_work(tmp_path, monkeypatch, capsys, text, options, says):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text(text)
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, *options)
    assert code == 2 and says in error.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--steps", "many"), "Invalid value for '--steps'"),
        (("--scheduling", "x"), "No such option"),
        (("--prompts",), "requires an argument"),
        ((), "Missing option '--prompts'"),
        (("--prompts", ".", "--out", "out"), "directory"),
        (("--prompts", "/dev/null", "--out", "out"), "holds no prompts"),
    ],
)
def test_a_wrong_command_line_is_one_line(monkeypatch, capsys, options, says):
    code, error = run(monkeypatch, capsys, *options)
    assert code == 2 and says in error and len(error.splitlines()) == 1 and error.startswith("basinescape: ")


def test_an_error_nobody_foresaw_is_one_line_unless_asked_for_more(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("sample_size")

    monkeypatch.setattr(Sampler, "from_pretrained", broken)
    prompts = tmp_path / "prompts.jsonl"
    write(prompts, 1)
    arguments = ("--prompts", prompts, "--out", tmp_path / "out")
    code, error = run(monkeypatch, capsys, *arguments)
    assert code == 2 and error == "basinescape: KeyError: 'sample_size' (set BASINESCAPE_DEBUG=1 to see where)\n"
    monkeypatch.setenv("BASINESCAPE_DEBUG", "1")
    with pytest.raises(KeyError):
        monkeypatch.setattr(sys, "argv", ["basinescape", "generate", *map(str, arguments)])
        cli.main()


@pytest.mark.parametrize("command", [(), ("generate",), ("evaluate",), ("bench",)])
def test_help_is_quick_and_fits(command, monkeypatch, tmp_path):
    """It loads neither torch nor diffusers, and nothing is cut off at 80 columns."""
    code = (
        f"import sys; sys.argv = ['basinescape', *{command}, '--help']\n"
        "from basinescape.bench import cli\n"
        "try: cli.main()\n"
        "finally: print({'torch', 'diffusers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    monkeypatch.setenv("COLUMNS", "80")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n" and done.stdout.startswith("Usage: basinescape")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout and (command or done.stdout.count("...") == 1)  # COMMAND [ARGS]...


def test_pickled_weights_are_refused_with_one_line(pipe, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.jsonl"
    write(prompts, 1)
    pipe.save_pretrained(tmp_path / "model", safe_serialization=False)
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", tmp_path / "out", "--model", tmp_path / "model")
    assert code == 2 and "pickle" in error and not (tmp_path / "out").exists()


def test_the_commands_options_reach_the_sampler(tmp_path, monkeypatch, capsys, drawn):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,seed,negative_prompt\na cat,7,\na dog,8,blurry\n")
    options = (
        "--height",
        128,
        "--width",
        192,
        "--clip-skip",
        1,
        "--negative-prompt",
        "ugly",
        "--guidance",
        "cfg",
        "--scale",
        3,
    )
    assert run(monkeypatch, capsys, "--prompts", prompts, "--out", tmp_path / "out", *QUICK, *options)[0] == 0
    (asked,) = drawn.asked
    assert (asked["prompts"], asked["negative_prompt"]) == (["a cat", "a dog"], ["ugly", "blurry"])
    assert (asked["height"], asked["width"], asked["clip_skip"]) == (128, 192, 1)
    assert [line["seed"] for line in sound(tmp_path / "out")] == [7, 8]
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (stored["height"], stored["width"], stored["clip_skip"], stored["negative_prompt"]) == (128, 192, 1, "ugly")
    assert Guidance.from_dict(stored["guidance"]) == Guidance.cfg(3)


@pytest.fixture
def mine(tmp_path):
    """A copy of the small pipeline under another name, without a calibration."""
    folder = tmp_path / "my-model"
    shutil.copytree(Sampler.model_path("tiny"), folder, ignore=shutil.ignore_patterns("calibration.json", "memorized*"))
    return folder


def test_a_model_is_calibrated_and_then_guarded(tmp_path, monkeypatch, capsys, mine):
    """Without a calibration a line says what is done instead; with one beside the model, or given, the guard is the default."""
    prompts, made = tmp_path / "prompts.jsonl", mine / "calibration.json"
    write(prompts, 3)
    asked = ("--prompts", prompts, "--model", mine, "--steps", 5, "--device", "cpu")
    code, error = run(monkeypatch, capsys, *asked, "--out", tmp_path / "before")
    assert code == 0 and "the model has none: every prompt is delayed until 500 instead" in error
    code, error = run(monkeypatch, capsys, *asked, "--out", tmp_path / "none", "--guidance", "guard")
    assert code == 2 and "a guard needs a calibration" in error and not (tmp_path / "none").exists()
    arguments = ["basinescape", "calibrate", "--out", made, *asked, "--no-progress", "--rate", 0.5]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None) and Calibration.load(made).images == 3
    assert str(tmp_path) not in made.read_text()
    code, error = run(monkeypatch, capsys, *asked, "--out", tmp_path / "after")
    lines = sound(tmp_path / "after")
    assert code == 0 and "delayed" not in error and all(line["attempts"] >= 1 and line["score"] > 0 for line in lines)
    settings = json.loads((tmp_path / "after" / "run.json").read_text())["guidance"]
    assert Guidance.from_dict(settings) == Guidance.guard(7.5, Calibration.load(made))
    moved = made.rename(tmp_path / "elsewhere.json")
    assert run(monkeypatch, capsys, *asked, "--out", tmp_path / "after", "--calibration", moved)[0] == 0
    for options, says in (
        (("--steps", 4), "calibrated for 5 steps at timesteps"),
        (("--scale", 3), "scale is 3.0, but the calibration was made at 7.5"),
        (("--rule", "apg", "--guidance", "guard"), "a guard has the rule"),
        (("--calibration", tmp_path / "missing.json"), "missing.json"),
    ):
        code, error = run(monkeypatch, capsys, *asked, "--calibration", moved, *options, "--out", tmp_path / "bad")
        assert code == 2 and says in error and len(error.splitlines()) == 1 and not (tmp_path / "bad").exists()


def test_a_rule_reaches_the_sampler(tmp_path, monkeypatch, capsys, drawn):
    write(tmp_path / "p.jsonl", 1)
    options = ("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", *QUICK, "--rule", "cfg-zero")
    assert run(monkeypatch, capsys, *options)[0] == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["guidance"]["rule"] == "cfg-zero"
    code, error = run(monkeypatch, capsys, *options[:-1], "nope")
    assert code == 2 and "rule must be one of cfg, rescale" in error


def test_a_calibration_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    write(tmp_path / "p.jsonl", 1)
    arguments = ["basinescape", "calibrate", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "none" / "c.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "in a folder that exists" in capsys.readouterr().err
