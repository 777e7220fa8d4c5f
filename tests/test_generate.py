"""The generate command: its folder, its manifest, and one clear line for each bad input."""

import json
import sys

import pytest
from basinescape.bench import cli


def run(monkeypatch, capsys, *arguments):
    """Exit code and standard error of `basinescape generate`."""
    monkeypatch.setattr(sys, "argv", ["basinescape", "generate", "--no-progress", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, capsys.readouterr().err


def test_a_folder_is_filled_and_refused_to_another_run(tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "a picture of a cat", "id": "cat"}\n{"prompt": "a picture of a frog"}\n')
    arguments = ("--prompts", prompts, "--out", out, "--steps", 3, "--until", 500, "--device", "cpu")
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [(line["id"], line["status"], line["seed"]) for line in lines] == [("cat", "ok", 0), ("0001", "ok", 1)]
    assert sorted(path.name for path in (out / "images").iterdir()) == ["0001.png", "cat.png"]
    assert json.loads((out / "run.json").read_text())["steps"] == 3
    code, error = run(monkeypatch, capsys, *arguments, "--scale", 3)
    assert code == 2 and "another run" in error


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
    ],
)
def test_bad_input_ends_with_one_line_before_any_work(tmp_path, monkeypatch, capsys, text, options, says):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text(text)
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, *options)
    assert code == 2 and says in error.splitlines()[-1]
    assert not out.exists()
