"""bench/gpu where there is no GPU: it says so, its checks hold on a pretended device, and no trial loses another's result."""

import json
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import packages
import pytest
import torch
from basinescape.bench import cli, speed
from basinescape.bench.gpu import checks, checks_sampler, trials
from basinescape.bench.gpu.report import rendered
from basinescape.bench.speed import engine, images, kernel, step
from basinescape.bench.speed.shapes import pipeline
from basinescape.bench.speed.timing import fitting, interleaved, within_memory
from basinescape.bench.tables import tables
from basinescape.sampling import cuda_graphs
from smallest import small_benches, small_checks, small_sampler_checks
from typer.testing import CliRunner


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(tmp_path):
    command = [sys.executable, "-m", "basinescape.bench.gpu", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "sees no CUDA GPU" in done.stderr and not (tmp_path / "out.json").exists()


@pytest.fixture
def small(monkeypatch):
    small_checks(monkeypatch.setattr)
    small_benches(monkeypatch.setattr)


@pytest.mark.parametrize("name", checks.CHECKS)
def test_the_checks_hold_on_a_pretended_device(device, small, name):
    assert checks.CHECKS[name](torch.device("cuda"))


@pytest.mark.parametrize("name", ["sampler launches", "sampler synchronisation"])
def test_the_sampler_checks_hold_on_a_pretended_device(device, monkeypatch, name):
    """`make matrix` makes the others, too."""
    small_sampler_checks(monkeypatch.setattr)
    monkeypatch.setattr(step, "SHORT", 3)
    monkeypatch.setattr(step, "LONG", 5)
    assert checks_sampler.CHECKS[name](torch.device("cuda"))


@pytest.mark.parametrize(("name", "preset"), [("kernel", "cuda"), ("step", "quick")])
def test_benches_hold_on_a_pretended_device(device, small, monkeypatch, name, preset):
    """`make matrix` runs the others, too: what a peer makes is compared here."""
    monkeypatch.setattr(kernel, "backend", lambda device: "triton")
    rows = list(speed.run([name], torch.device("cuda"), preset))
    assert all(row["ratio"] is not None for row in rows if "ratio" in row and row["peer"] != "copy")
    ways = {row["way"] for row in rows if "way" in row}
    assert ways == ({"called", "captured"} if name == "kernel" else set())


def full(*_):
    raise torch.OutOfMemoryError("there is none")


def test_what_finds_no_memory_is_dropped_with_all_it_holds():
    class Held:
        def __call__(self):
            full()

    calls = {"small": lambda: 1, "large": Held()}
    held = weakref.ref(calls["large"])
    assert fitting(calls) == {"small": 1} and list(calls) == ["small"] and held() is None


def raising(error):
    raise error


@pytest.mark.parametrize("says", ["CUDA error:", "Triton Error [CUDA]:"])
def test_memory_that_cuda_and_triton_do_not_find_counts_too(says):
    without, wrong = (partial(raising, RuntimeError(f"{says} {what}")) for what in ("out of memory", "illegal address"))
    assert fitting({"small": lambda: 1, "large": without}) == {"small": 1}
    assert [row["left out"] for row in within_memory({"bench": "images"}, without)] == ["not enough memory"]
    for call in (lambda: fitting({"wrong": wrong}), lambda: list(within_memory({}, wrong))):
        with pytest.raises(RuntimeError, match="illegal"):
            call()


def test_a_peer_that_finds_no_memory_while_it_is_timed_is_dropped():
    answers = iter([None, None, full])
    peers = {"growing": lambda: (next(answers) or int)(), "steady": int}
    assert {peer: len(times) for peer, times in interleaved(peers, torch.device("cpu"), 4).items()} == {"steady": 4}


def test_a_case_that_finds_no_memory_keeps_its_rows_and_is_named():
    def rows():
        yield {"bench": "images", "what": "small", "peer": "ours", "median": 1.5}
        full()

    found = [*within_memory({"bench": "images", "what": "large"}, rows), {"bench": "step", "what": "small", "median": 2.0}]
    assert [row["what"] for row in found] == ["small", "large", "small"] and "left out" in found[1]
    assert tables(found).splitlines()[-1].split(maxsplit=2) == ["images", "large", "not enough memory"]


def without(rows):
    """What stands for rows that were left out, and the other rows."""
    rows = list(rows)
    return [row for row in rows if "left out" in row], [row for row in rows if "left out" not in row]


@pytest.mark.parametrize("peer", ["compiled chain", "eager chain", "copy"])
def test_a_kernel_beside_a_full_device_is_timed(device, small, monkeypatch, peer):
    """Without a ratio where it was the baseline that found no memory, and a share where it was the copy."""
    monkeypatch.setattr(kernel, "backend", lambda device: "triton")
    fused = kernel.step_work

    def work(*given):
        made = fused(*given)
        made.peers[peer] = device.full()(lambda: torch.zeros(1, device="cuda"))
        return made

    monkeypatch.setattr(kernel, "WORKS", {"step": work})
    out, rows = without(speed.run(["kernel"], torch.device("cuda"), "quick"))
    assert {row["peer"] for row in out} == {peer} and {row["way"] for row in out} == {"called", "captured"}
    assert {row["peer"] for row in rows} == {"fused step", "eager chain", "compiled chain", "copy"} - {peer}
    assert all((row["ratio"] is None) == (row["peer"] == "copy" or peer == "eager chain") for row in rows)
    assert all((row["share"] is None) == (peer == "copy") and row["median"] > 0 for row in rows)


def test_a_capture_without_memory_is_no_row_of_a_captured_sampler(device, small, monkeypatch):
    """Which would go on uncaptured."""
    monkeypatch.setattr(cuda_graphs.Session, "capture", full)
    out, rows = without(speed.run(["step"], torch.device("cuda"), "quick"))
    assert len(out) == 4 and all(row["peer"].endswith(", captured") for row in out)
    assert {row["bench"] for row in rows} == {"step", "step, counted", "step, cost"}
    assert not any(row["peer"].endswith(", captured") for row in rows)


def test_images_are_timed_without_the_peers_there_is_no_memory_for(device, small, monkeypatch):
    """On a card that cannot hold a second network."""
    monkeypatch.setattr(images, "twin", device.full()(images.twin))
    out, rows = without(speed.run(["images"], torch.device("cuda"), "quick"))
    assert {row["peer"] for row in rows} == {"diffusers", "published style", "ours, captured, cfg"}
    assert len(out) == 3 and all("compiled" in row["peer"] for row in out)
    report = {"device": "a GPU", "date": "today", "versions": {}, "checks": [], "rows": [*out, *rows]}
    assert all(row["peer"] in rendered(report) for row in out)


def test_attention_by_xformers_is_that_of_its_peer_alone(device, small, monkeypatch):
    tokens, whole = [], packages.memory_efficient_attention

    def counted(query, *rest, **named):
        tokens.append(query.shape[1])
        return whole(query, *rest, **named)

    monkeypatch.setattr(packages, "memory_efficient_attention", counted)
    with packages.installed():
        case = images.CASES["cuda"][0]
        peers = images.Bench(case, torch.device("cuda"), pipeline(case.model, case.dtype, torch.device("cuda")), 1).peers()
        made = {}
        for peer in ("ours, captured, xformers, cfg", images.BASELINE):
            tokens.clear()
            made[peer] = peers[peer][1](), len(tokens)
    (found, calls), (expected, others) = made.values()
    assert calls > 0 == others and images.difference(found, expected, case.dtype) < images.TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["guide", "sampler images"])
def test_a_check_on_a_full_device_has_neither_passed_nor_failed(device, small, monkeypatch, tmp_path, name):
    small_sampler_checks(monkeypatch.setattr)
    with device.full():
        trials.perform(name, tmp_path / "out.json", quick=True)
    result = trials.read(tmp_path / "out.json")
    assert result["status"] == "out of memory" and "the pretended GPU is full" in result["error"]
    report = {"device": "a GPU", "date": "today", "versions": {}, "rows": []}
    report["checks"] = [{"check": name, "status": result["status"], "error": "no\nmemory"}]
    assert " ".join(rendered(report).splitlines()[-1].split()) == f"{name} out of memory 0 no memory"


def test_a_capture_that_runs_out_of_memory_is_no_failed_check(device, monkeypatch, tmp_path):
    """The sampler goes on uncaptured; and what ends a capture raises an error of its own."""
    small_sampler_checks(monkeypatch.setattr)

    def capture(*_):
        try:
            full()
        finally:
            raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(cuda_graphs.Session, "capture", capture)
    trials.perform("sampler capture", tmp_path / "out.json", quick=True)
    assert trials.read(tmp_path / "out.json")["status"] == "out of memory"


def test_workers_of_ray_leave_the_gpu_alone(device, small):
    with packages.installed():
        rows = list(engine.scaling((1, 2), steps=2))
    assert [row["what"][-1] for row in rows] == ["1", "2"] and all(row["median"] > 0 for row in rows)


def test_a_launch_too_many_is_found(device, small, monkeypatch):
    right = checks.step

    def twice(uncond, *rest):
        right(uncond.clone(), *rest)

    monkeypatch.setattr(checks, "step", twice)
    with pytest.raises(AssertionError, match="2 launches, not 1"):
        checks.check_launches(torch.device("cuda"))


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
FULL = {"status": "out of memory", "error": "none left", "rows": []}


@pytest.mark.parametrize(
    ("ends", "status", "error", "rows"),
    [
        ({"writes": PASSED}, "passed", None, []),
        ({"code": -11}, "failed", "ended with code -11", []),
        ({"writes": {"status": "unfinished", "rows": ROWS}, "code": None}, "failed", "not done after 300 s", ROWS),
        ({"writes": {"status": "passed", "rows": ROWS}, "code": 1}, "failed", "ended with code 1", ROWS),
        ({"writes": {"status": "failed", "error": "why", "rows": []}, "code": -6}, "failed", "why", []),
        ({"writes": {**FULL, "rows": ROWS}}, "out of memory", "none left", ROWS),
        ({"writes": FULL, "code": -6}, "out of memory", "none left", []),
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
    process.writes = FULL
    assert trials.isolated("batches, racecheck", True, 300)["status"] == "failed"  # found before memory ran out
    process.writes, process.code = PASSED, 0
    assert trials.isolated("batches, racecheck", True, 300)["status"] == "passed"
    monkeypatch.setattr(trials, "sanitizer", lambda: None)
    assert trials.isolated("batches, racecheck", True, 300)["status"] == "skipped"


def test_tritons_own_sanitizers_run_where_triton_has_them(process, monkeypatch):
    process.writes = PASSED
    assert trials.isolated("guide, overflow", True, 300)["status"] == "passed"
    assert process.command[:2] == ["env", "TRITON_DEBUG=1"] and "guide" in process.command
    monkeypatch.setattr(trials, "find_spec", lambda name: name)
    assert trials.isolated("batches, gsan", True, 300)["status"] == "passed"
    assert process.command[1:4] == ["-m", "triton.tools.gsan", str(trials.PROGRAM)] and trials.PROGRAM.exists()
    monkeypatch.setattr(trials, "find_spec", lambda name: None if "gsan" in name else name)
    skipped = trials.isolated("batches, gsan", True, 300)
    assert skipped["status"] == "skipped" and "from 3.8 on" in skipped["error"]


def test_minutes_are_kept_and_every_result_is_in_the_file_at_once(process, device, tmp_path, monkeypatch, capsys):
    """Each trial takes two minutes of nine here; what a bench finds is in the file while it runs."""
    now, seen, file = [0.0], [], tmp_path / "out.json"
    monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    monkeypatch.setattr(trials, "taken", lambda device: {"device": "a GPU", "versions": {"torch": "2"}, "date": "today"})
    monkeypatch.setattr(trials, "sanitizer", lambda: None)
    monkeypatch.setattr(trials, "find_spec", lambda name: None if "gsan" in name else name)
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
    assert passed == ["guide", "step", "rules", "batches", "launches"]
    assert states["guide, racecheck"] == states["batches, gsan"] == "skipped"
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_nothing_is_left_of_a_command_that_hangs(tmp_path):
    late = tmp_path / "late"
    assert trials.ending(["sh", "-c", f"(sleep 2; touch {late}) & sleep 60"], 1.0) is None
    time.sleep(2)
    assert not late.exists()
    assert trials.ending(["sh", "-c", "exit 3"], 10.0) == 3
