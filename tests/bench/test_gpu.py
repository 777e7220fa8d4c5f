"""bench/gpu where there is no GPU: it says so, its checks hold on a pretended device, and no trial loses another's result."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from basinescape.bench import cli
from basinescape.bench.gpu import checks, checks_sampler, trials
from basinescape.bench.gpu.report import rendered
from basinescape.kernels.tiles import Tiles
from tiled import SMALL
from typer.testing import CliRunner

KEPT = (
    "one block, first minimum",
    "one prediction",
    "tiles, weight known",
    "tiles, first minimum, SDXL",
)  # of the modes
SHAPES = {checks.SD: (4, 8, 8), checks.SDXL: (4, 9, 8), checks.SD3: (5, 9, 8), checks.VIDEO: (4, 3, 6, 8)}


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(tmp_path):
    command = [sys.executable, "-m", "basinescape.bench.gpu", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "sees no CUDA GPU" in done.stderr and not (tmp_path / "out.json").exists()


@pytest.fixture
def small(monkeypatch):
    """Samples of a few tiles, and one dtype."""
    monkeypatch.setattr(
        checks, "MODES", {name: replace(m, shape=SHAPES[m.shape]) for name, m in checks.MODES.items() if name in KEPT}
    )
    monkeypatch.setattr(checks, "SIZES", ((1,), (5, 7), (4, 8, 8), (4, 9, 8)))
    monkeypatch.setattr(checks, "DTYPES", {torch.float16: 4e-3})
    monkeypatch.setattr(checks, "RULES", ("apg",))
    monkeypatch.setattr(checks, "LAYOUTS", ("channels last", "spread"))
    monkeypatch.setattr(Tiles, "of", SMALL.of)


@pytest.mark.parametrize("name", ["guide", "step", "rules", "batches", "capture", "synchronisation"])
def test_the_checks_hold_on_a_pretended_device(device, small, name):
    assert checks.CHECKS[name](torch.device("cuda"))


@pytest.mark.parametrize("name", ["sampler synchronisation", "sampler images"])
def test_the_sampler_checks_hold_on_a_pretended_device(device, monkeypatch, name):
    monkeypatch.setattr(checks_sampler, "STEPS", 2)
    monkeypatch.setattr(checks_sampler, "METHODS", {name: checks_sampler.METHODS[name] for name in ("delayed, first minimum",)})
    assert checks_sampler.CHECKS[name](torch.device("cuda"))


def test_a_wrong_kernel_is_found(device, small, monkeypatch):
    right = checks.step
    monkeypatch.setattr(checks, "step", lambda *operands: right(*operands[:4], False))  # nobody looks at a gap
    with pytest.raises(AssertionError, match="transitions"):
        checks.check_step(torch.device("cuda"))


@pytest.fixture
def process(monkeypatch):
    """Stands for a trial's process: set what it writes and its exit code, None if it hangs; `command` is what was run."""
    process = SimpleNamespace(writes=None, code=0, command=None)

    def ending(command, limit, meanwhile):
        process.command = command
        if process.writes is not None:
            Path(command[command.index("--out") + 1]).write_text(json.dumps(process.writes))
            meanwhile()
        return process.code

    monkeypatch.setattr(trials, "ending", ending)
    return process


ROWS = [{"bench": "kernel"}]
PASSED = {"status": "passed", "rows": []}


@pytest.mark.parametrize(
    ("ends", "status", "error", "rows"),
    [
        ({"writes": PASSED}, "passed", None, []),
        ({"code": -11}, "failed", "ended with code -11", []),
        ({"writes": {"status": "unfinished", "rows": ROWS}, "code": None}, "failed", "not done after 300 s", ROWS),
        ({"writes": {"status": "passed", "rows": ROWS}, "code": 1}, "failed", "ended with code 1", ROWS),
        ({"writes": {"status": "failed", "error": "why", "rows": []}, "code": -6}, "failed", "why", []),
    ],
)
def test_a_trial_that_fails_keeps_what_it_had(process, ends, status, error, rows):
    vars(process).update(ends)
    result = trials.isolated("guide", True, 300)
    assert (result["status"], result.get("error"), result["rows"]) == (status, error, rows)


def test_a_check_under_a_sanitizer_fails_by_what_that_finds(process, monkeypatch):
    process.writes, process.code = PASSED, trials.FOUND
    monkeypatch.setattr(trials, "sanitizer", lambda: "compute-sanitizer")
    assert trials.isolated("batches, racecheck", True, 300)["error"] == "racecheck has found errors"
    assert process.command[:3] == ["compute-sanitizer", "--tool", "racecheck"] and "batches" in process.command
    process.code = 0
    assert trials.isolated("batches, racecheck", True, 300)["status"] == "passed"
    monkeypatch.setattr(trials, "sanitizer", lambda: None)
    assert trials.isolated("batches, racecheck", True, 300)["status"] == "skipped"


def test_minutes_are_kept_and_every_result_is_in_the_file_at_once(process, device, tmp_path, monkeypatch, capsys):
    """Each trial takes two minutes of nine here; what a bench finds is in the file while it runs."""
    now, seen, file = [0.0], [], tmp_path / "out.json"
    monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    monkeypatch.setattr(trials, "taken", lambda device: {"device": "a GPU", "versions": {"torch": "2"}, "date": "today"})
    monkeypatch.setattr(trials, "sanitizer", lambda: None)
    ending = trials.ending

    def slow(command, limit, meanwhile):
        assert limit <= 540 - now[0]
        now[0] += 120
        process.writes = {"status": "unfinished", "rows": ROWS}
        ending(command, limit, meanwhile)
        seen.append(json.loads(file.read_text())["rows"])
        process.writes = PASSED | {"rows": ROWS}
        return ending(command, limit, lambda: None)

    monkeypatch.setattr(trials, "ending", slow)
    trials.main(["--out", str(file), "--minutes", "9"])
    report = json.loads(file.read_text())
    states = {check["check"]: check["status"] for check in report["checks"]}
    assert list(states) == trials.trial_names()
    passed = [name for name, state in states.items() if state == "passed"]
    assert passed == ["guide", "step", "rules", "batches", "launches"] and states["guide, racecheck"] == "skipped"
    assert states["bench kernel"] == "not reached"
    assert seen == [ROWS * k for k in range(1, 6)] and report["rows"] == ROWS * 5
    assert "not reached" in rendered(report) and capsys.readouterr().out.strip().endswith(rendered(report))
    assert CliRunner().invoke(cli.app, ["report-gpu", str(file)]).stdout.strip() == rendered(report)


def test_without_diffusers_the_rest_is_done(process, monkeypatch):
    monkeypatch.setattr(trials, "find_spec", lambda name: None)
    process.writes = PASSED
    states = {
        name: trials.isolated(name, True, 60)["status"] for name in ("guide", "bench kernel", "bench step", "sampler images")
    }
    assert states == {"guide": "passed", "bench kernel": "passed", "bench step": "skipped", "sampler images": "skipped"}


def test_kernels_are_checked_and_timed_without_diffusers():
    """With torch and triton alone everything up to the first bench can be imported."""
    script = """
import sys
for name in ("diffusers", "transformers", "accelerate"):
    sys.modules[name] = None
from basinescape.bench.gpu import trials
from basinescape.bench.speed import kernel
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_nothing_is_left_of_a_command_that_hangs(tmp_path):
    late = tmp_path / "late"
    assert trials.ending(["sh", "-c", f"(sleep 2; touch {late}) & sleep 60"], 1.0) is None
    time.sleep(2)
    assert not late.exists()
    assert trials.ending(["sh", "-c", "exit 3"], 10.0) == 3
