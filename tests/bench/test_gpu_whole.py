"""bench/gpu as a user calls it, to its end, each trial in a process of its own, on a pretended device. Takes ten minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from basinescape.bench.gpu import trials
from basinescape.bench.gpu.report import rendered
from basinescape.bench.speed.images import WAYS

SCRIPT = Path(__file__).parent.parent / "doubles" / "pretended_gpu.py"


@pytest.fixture(autouse=True)
def asked_for(request, guarded):
    if not request.config.getoption("--matrix"):
        pytest.skip("make matrix runs it")


@pytest.mark.process
@pytest.mark.parametrize("minutes", [(), ("--minutes", "120")], ids=["all", "minutes"])
def test_every_trial_passes(tmp_path, minutes):
    """Those under a tool pass where that is of the kind that runs anywhere, and are skipped by name elsewhere."""
    file = tmp_path / "out.json"
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(file), *minutes], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert done.stdout.strip().endswith(rendered(report).strip()) and report["device"] == "a pretended GPU"
    checks = {check["check"]: check for check in report["checks"]}
    assert list(checks) == trials.trial_names()
    assert {name for name, check in checks.items() if check["status"] != "passed"} <= trials.SANITIZED.keys()
    assert all(check["status"] in ("passed", "skipped") for check in checks.values())
    rows = report["rows"]
    benches = "kernel", "step", "step, counted", "step, cost", "images", "engine", "engine, command"
    assert [*dict.fromkeys(row["bench"] for row in rows)] == list(benches)
    out = [row for row in rows if "left out" in row]
    assert out == [row for row in rows if row["peer"] == "published style" and row["bench"] in ("step", "step, counted")]
    assert {row["bench"] for row in out} == {"step", "step, counted"} and "not enough memory" in rendered(report)
    images = {row["peer"] for row in rows if row["bench"] == "images"}
    assert {f"{way}, {method}" for way, _, methods in WAYS["quick" if minutes else "cuda"] for method in methods} < images
    assert all(row["ratio"] for row in rows if row["bench"] == "kernel" and row["peer"] != "copy")
    counted = {row["peer"]: row for row in rows if row["bench"] == "step, counted" and row not in out}
    assert all(row["launches"] <= 1 and not row["waits"] for peer, row in counted.items() if peer.startswith("ours"))
    assert counted["diffusers"]["launches"] > 5
    assert sum("Ray" in row["what"] for row in rows) == 3
