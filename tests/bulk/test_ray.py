"""A run on a local Ray: the bytes of one without it, also where a worker is killed."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import bulkruns
import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.bench.speed.standin import stand_in
from basinescape.bulk import ray as spread
from basinescape.data.prompts import Job
from basinescape.runs.jsonl_journal import read_lines

JOBS = [Job(f"p{i}", f"cat {i}", i) for i in range(9)]

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_worker_niceness", "0")  # by itself Ray's workers yield to whatever else there is
    ray = pytest.importorskip("ray", reason="ray is not installed")
    paths = {
        "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent, *sys.path]))
    }  # what pytest adds is this process's alone
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    yield
    ray.shutdown()


@pytest.fixture
def two_threads():
    """Not as many as Ray gives a worker by itself."""
    known = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(known)


def load(marker=None, always=False, threads=None, seen=None):
    """The stand-in; where there is a file `marker`, the first to see it takes it away and dies in the midst of its work.

    threads: a file that is told how many the worker has. seen: a folder that gets a file of each worker that made something.
    """
    from diffusers import StableDiffusionPipeline

    if threads:
        Path(threads).write_text(str(torch.get_num_threads()))
    sampler = stand_in(StableDiffusionPipeline.from_pretrained(Sampler.model_path("tiny"), use_safetensors=True))
    predict = sampler.model._predict

    def dying(*given, **named):
        if seen:
            Path(seen, str(os.getpid())).touch()
        if always or (marker and os.path.exists(marker)):
            if not always:
                os.remove(marker)
            os.kill(os.getpid(), signal.SIGKILL)
        return predict(*given, **named)

    sampler.model._predict = dying
    return sampler


def make(sampler, out, **options):
    return bulkruns.make(sampler, JOBS, out, Guidance.cfg(2.0), **{"batch_size": 2} | options)


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_worker_that_is_killed_costs_nothing(pipe, tmp_path, monkeypatch, cluster, two_threads):
    monkeypatch.setattr(spread, "ROUNDS", 1)
    sampler, marker = stand_in(pipe), tmp_path / "marker"
    make(sampler, tmp_path / "whole")
    marker.touch()
    summary = make(sampler, tmp_path / "out", load=partial(load, str(marker), threads=str(tmp_path / "threads")), workers=2)
    assert (tmp_path / "threads").read_text() == "2"  # some bits depend on it
    assert not marker.exists() and summary.counts["ok"] == 9 and sum(summary.calls.values()) == 9 * 2 * 2
    files, expected = contents(tmp_path / "out"), contents(tmp_path / "whole")
    files.pop("manifest.jsonl"), expected.pop("manifest.jsonl")
    assert files == expected
    for line, right in zip(*(read_lines(tmp_path / name / "manifest.jsonl") for name in ("out", "whole")), strict=True):
        gaps = line.pop("noise_gap"), right.pop("noise_gap")  # a norm's last digit is that of how a process adds up
        assert line == right and gaps[0] == pytest.approx(gaps[1], rel=1e-5)
    assert make(sampler, tmp_path / "out", load=load, workers=1).before == 9  # nothing is left to do


def test_a_block_that_kills_its_worker_each_time_has_failed(pipe, tmp_path, monkeypatch, cluster):
    monkeypatch.setattr(spread, "RETRIES", 0)
    summary = make(stand_in(pipe), tmp_path / "out", load=partial(load, always=True), workers=1)
    assert summary.counts["failed"] == 9 and summary.counts["ok"] == 0
    assert all(line["status"].startswith("failed: its worker: ") for line in read_lines(tmp_path / "out" / "manifest.jsonl"))


def unloadable():
    raise ValueError("model 'mine' does not exist")


def test_a_small_set_is_shared_and_what_the_cluster_cannot_do_is_said(pipe, tmp_path, cluster):
    sampler, seen = stand_in(pipe), tmp_path / "seen"
    seen.mkdir()
    make(sampler, tmp_path / "out", load=partial(load, seen=str(seen)), workers=2)
    assert len(list(seen.iterdir())) == 2
    with pytest.raises(RuntimeError, match=r"a worker of the cluster cannot begin: ValueError: model 'mine' does not exist"):
        make(sampler, tmp_path / "none", load=unloadable, workers=1)
    with pytest.raises(ValueError, match=r"workers is 3, and the cluster has 2 CPUs: ask for fewer"):
        make(sampler, tmp_path / "none", load=load, workers=3)
    assert not (tmp_path / "none" / "manifest.jsonl").exists()
