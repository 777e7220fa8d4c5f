"""A run that dies anywhere ends, when it is started again, with the bytes of one that did not."""

import os
import signal
import time

import bulkruns
import pytest
from basinescape import Guidance
from basinescape.bench.speed.standin import stand_in
from basinescape.data.merge import merge
from basinescape.data.prompts import Job
from basinescape.data.verify import verify
from basinescape.runs import atomic, jsonl_journal

pytestmark = pytest.mark.process
JOBS = [Job(f"p{i}", f"cat {i}", i) for i in range(5)]
FORMATS = {"png": 2, "latents": 5, "parquet": 1, "webdataset": 2}  # every so manieth point: some are written alike


@pytest.fixture(autouse=True)
def libraries(request, monkeypatch):
    for library in {"parquet": ["pyarrow"], "webdataset": ["webdataset"]}.get(request.node.callspec.params["format"], []):
        pytest.importorskip(library)
    monkeypatch.setattr("basinescape.data.writers.SHARD", 2)


@pytest.fixture
def sampler(pipe, monkeypatch):
    monkeypatch.setattr("basinescape.bulk.generate.weights_sha256", lambda sampler: "the same")  # not what is tested here
    return stand_in(pipe)


def through(monkeypatch, system):
    """Files are written through `system`, in place of `os`."""
    for module in (atomic, jsonl_journal):
        monkeypatch.setattr(module, "os", system)
    return system


def make(sampler, out, format, **options):
    return bulkruns.make(sampler, JOBS, out, Guidance.cfg(2.0), steps=1, batch_size=3, format=format, **options)


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


class Killed(BaseException):
    pass


class Dying:
    """`os` for a process that is killed before its `left`th write, rename, flush or removal, half of that write being done."""

    def __init__(self, left):
        self.left, self.dead = left, False

    def __getattr__(self, name):
        real = getattr(os, name)
        return (lambda *given: self._do(name, real, *given)) if name in ("write", "fsync", "replace", "unlink") else real

    def _do(self, name, real, *given):
        if self.left == 0 and not self.dead:
            self.dead = True
            if name == "write":
                real(given[0], given[1][: len(given[1]) // 2])
            if name == "replace" and os.stat(given[0]).st_nlink == 1:  # what is new and was not flushed is perhaps not there
                os.truncate(given[0], os.path.getsize(given[0]) // 2)
        if self.dead:
            raise Killed
        self.left -= 1
        return real(*given)


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_killed_at_any_point_ends_as_if_it_had_not_been(sampler, tmp_path, monkeypatch, format):
    counting = through(monkeypatch, Dying(10**6))
    make(sampler, tmp_path / "whole", format)
    expected, points = contents(tmp_path / "whole"), 10**6 - counting.left
    assert points > 12
    for point in range(FORMATS[format] - 1, points, FORMATS[format]):
        out = tmp_path / f"out-{point}"
        for left in (point, point // 2):  # and once more on the way
            through(monkeypatch, Dying(left))
            try:
                make(sampler, out, format)
            except Killed:
                continue
            assert left < point  # the first never comes to its end
        through(monkeypatch, os)
        make(sampler, out, format)
        assert contents(out) == expected, point
    assert list(verify(tmp_path / "whole")) == []


@pytest.mark.parametrize("format", ["png", "webdataset"])
def test_a_merge_killed_at_any_point_ends_as_if_it_had_not_been(sampler, tmp_path, monkeypatch, format):
    for i in range(2):
        make(sampler, tmp_path / "parts", format, shard=(i, 2))
    counting = through(monkeypatch, Dying(10**6))
    merge(tmp_path / "parts", tmp_path / "whole")
    expected, points = contents(tmp_path / "whole"), 10**6 - counting.left
    assert points > 20
    for point in range(0, points, 2):
        out = tmp_path / f"out-{point}"
        through(monkeypatch, Dying(point))
        with pytest.raises(Killed):
            merge(tmp_path / "parts", out)
        through(monkeypatch, os)
        assert merge(tmp_path / "parts", out) == (5, 5) and contents(out) == expected, point
    assert list(verify(tmp_path / "whole")) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("format", ["png", "parquet"])
def test_a_process_that_is_killed_goes_on(sampler, tmp_path, format):
    make(sampler, tmp_path / "whole", format)
    out = tmp_path / "out"
    sampler.model.seconds = 0.02
    for lines in (0, 1, 3):
        child = os.fork()
        if not child:
            try:
                make(sampler, out, format)
            finally:
                os._exit(0)
        manifest, late = out / "manifest.jsonl", time.monotonic() + 20
        while time.monotonic() < late and not (manifest.exists() and manifest.read_bytes().count(b"\n") >= lines):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    sampler.model.seconds = 0.0
    make(sampler, out, format)
    assert contents(out) == contents(tmp_path / "whole")
    assert list(verify(out)) == []
