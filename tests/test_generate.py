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


def write(path, count):
    path.write_text("".join(json.dumps({"prompt": f"a picture of a cat {i}", "id": f"p{i}"}) + "\n" for i in range(count)))


def entries(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines() if line]


def test_a_killed_job_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 3)
    arguments = ("--prompts", prompts, "--out", out, "--steps", 2, "--until", 500, "--device", "cpu", "--batch-size", 2)
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])  # killed while it wrote a line
    before = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    kept = (out / "images" / "p2.png").read_bytes()
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    after = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert [name for name in after if after[name] != before[name]] == ["p2.png"]
    assert (out / "images" / "p2.png").read_bytes() == kept


def test_a_sample_that_fails_loses_no_other(tmp_path, monkeypatch, capsys):
    from basinescape import Sampler

    made = Sampler.__call__

    def failing(self, prompts, *arguments, **options):
        if "a picture of a cat 1" in prompts:
            raise RuntimeError("out of memory")
        return made(self, prompts, *arguments, **options)

    monkeypatch.setattr(Sampler, "__call__", failing)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 4)
    code, error = run(
        monkeypatch,
        capsys,
        "--prompts",
        prompts,
        "--out",
        out,
        "--steps",
        2,
        "--until",
        500,
        "--device",
        "cpu",
        "--guidance",
        "cfg",
    )
    assert code == 1 and "p1" in error
    assert {entry["id"]: entry["status"] for entry in entries(out)} == {
        "p0": "ok",
        "p1": "failed: out of memory",
        "p2": "ok",
        "p3": "ok",
    }
    assert sorted(path.stem for path in (out / "images").iterdir()) == ["p0", "p2", "p3"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 1)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, "--steps", 2)
    assert code == 2 and "not empty" in error
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_pickled_weights_are_refused_with_one_line(pipe, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.jsonl"
    write(prompts, 1)
    pipe.save_pretrained(tmp_path / "model", safe_serialization=False)
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", tmp_path / "out", "--model", tmp_path / "model")
    assert code == 2 and "pickle" in error and not (tmp_path / "out").exists()
