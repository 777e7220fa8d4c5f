"""Every bench at its smallest on the CPU: each piece of work runs, agrees with its peers, and is timed beside them."""

import json
from functools import partial
from math import isfinite

import pytest
import torch
from basinescape.bench import cli, speed
from basinescape.bench.speed.command import STOCK
from basinescape.bench.speed.engine import LOOP
from basinescape.bench.speed.images import BASELINE, WAYS
from basinescape.bench.speed.traffic import moved
from basinescape.bench.tables import tables
from basinescape.kernels import aot
from smallest import small_benches
from typer.testing import CliRunner

pytestmark = pytest.mark.shipped


@pytest.fixture
def rows(monkeypatch):
    """A function that takes a bench."""
    small_benches(monkeypatch.setattr)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes minutes, and has tests of its own

    def rows(name):
        found = list(speed.run([name], "cpu"))
        assert tables(found) and all(isfinite(row["median"]) for row in found if "median" in row)
        return found

    return rows


def of(rows, bench):
    """Peers and their rows by what they did."""
    found = {}
    for row in rows:
        if row["bench"] == bench:
            found.setdefault(row["what"], {})[row["peer"]] = row
    return found


def test_kernel(rows):
    works = of(rows("kernel"), "kernel")
    assert len(works) == 4
    for what, peers in works.items():
        assert {"eager chain", "copy"} < peers.keys() and ("compiled chain" in peers) == ("SD x" in what)
        assert all((row["ratio"] is None) == (peer == "copy") for peer, row in peers.items())  # all others agree


def test_step(rows):
    found = rows("step")
    (peers,) = of(found, "step").values()
    assert set(peers) == {"ours", "ours, first minimum", BASELINE, "published style"}
    assert all(row["ratio"] is not None for row in peers.values())
    (counted,) = of(found, "step, counted").values()
    assert set(counted) == set(peers) and counted["ours"]["operators"] < counted[BASELINE]["operators"]
    assert counted["ours"]["reads"] == 0 < counted["published style"]["reads"]
    assert 0 < counted["ours"]["bytes"] < counted[BASELINE]["bytes"]
    assert len(of(found, "step, cost")) == 4


def test_images(rows):
    (peers,) = of(rows("images"), "images").values()
    assert {f"{way}, {method}" for way, _, methods in WAYS["cpu"] for method in methods} < peers.keys()
    plain = {peer: row for peer, row in peers.items() if peer.endswith("cfg") or not peer.startswith("ours")}
    assert len(plain) == 6 and all(row["ratio"] and row["utilisation"] > 0 for row in plain.values())


def test_engine(rows):
    found = rows("engine")
    works = of(found, "engine")
    flying = {what: peers for what, peers in works.items() if len(peers) > 1}
    assert len(flying) == 8
    for what, peers in flying.items():
        own = {"static batches", "static batches, shrinking", "in-flight"}
        assert peers.keys() == (own if what.startswith("stand-in") else {*own, LOOP})
        assert all((row["calls"] or 0) > 0 for row in peers.values()) == what.startswith("stand-in")
    single = {row["unit"]: row["median"] for peers in works.values() if len(peers) == 1 for row in peers.values()}
    assert {"ms a sample", "busy", "MB at most"} <= single.keys() and single["busy"] < 1
    commands = of(found, "engine, command")
    assert len(commands) == 8 and {what.split(",")[0] for what in commands} == {"tiny", "flow"}
    for peers in commands.values():
        assert peers["generate"]["ratio"] > 0 and peers[STOCK]["ratio"] == 1


@pytest.mark.parametrize(
    ("call", "read", "written"),
    [
        (lambda x, y: x.add(x), 2, 1),
        (lambda x, y: torch.add(x, x, out=y), 2, 1),
        (lambda x, y: x.mul_(2), 1, 1),
        (lambda x, y: y.copy_(x), 1, 1),
        (lambda x, y: x.zero_(), 0, 1),
        (lambda x, y: x.T.chunk(2), 0, 0),
        (lambda x, y: torch.cat([x, y]), 2, 2),
    ],
)
def test_traffic_is_what_operators_read_and_write(call, read, written):
    x, y = torch.ones(6, 4), torch.ones(6, 4)
    assert moved(partial(call, x, y)) == (read + written) * x.nbytes


def test_what_was_timed_before_an_error_is_printed_and_written(tmp_path, monkeypatch):
    def run(names, device):
        yield {"bench": "kernel", "what": "a step", "median": 1.5}
        raise RuntimeError("peers differ")

    monkeypatch.setattr(speed, "run", run)
    file = tmp_path / "new" / "rows.json"
    done = CliRunner().invoke(cli.app, ["bench", "all", "--device", "cpu", "--json", str(file)])
    assert isinstance(done.exception, RuntimeError) and "a step" in done.stdout
    found = json.loads(file.read_text())
    assert [row["what"] for row in found["rows"]] == ["a step"] and found["stopped by"] == "RuntimeError: peers differ"


@pytest.mark.parametrize("command", [["bench", "kernel", "--device", "cpu"], ["aot"]])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, command):
    for owner, name in ((speed, "run"), (aot, "rows")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("work was begun"))
    done = CliRunner().invoke(cli.app, [*command, "--json", str(tmp_path)])
    assert isinstance(done.exception, ValueError) and "json must be a file" in str(done.exception)


@pytest.mark.parametrize("text", ["no JSON", "[1]", '{"rows": []}'])
def test_a_file_of_another_kind_is_no_gpu_result(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    done = CliRunner().invoke(cli.app, ["report-gpu", str(tmp_path / "other.json")])
    assert isinstance(done.exception, ValueError) and "is not one that python -m basinescape.bench.gpu wrote" in str(
        done.exception
    )
