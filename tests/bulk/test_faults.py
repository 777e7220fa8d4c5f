"""Runs that are killed, interrupted or fail: no image is lost but its own, and what is missing is made again."""

import io
import os
import shutil
import signal
import sys
import time

import pytest
import torch
from basinescape import Sampler
from basinescape.bench import cli
from basinescape.bulk.executor import LocalExecutor
from basinescape.data import writers
from basinescape.data.image_encoding import Encoder
from basinescape.data.prompts import Prompts
from basinescape.data.verify import verify
from basinescape.models.sd import StableDiffusion
from basinescape.runs.jsonl_journal import read_lines
from bulkruns import QUICK, jobs, make, run, sound, write

pytestmark = pytest.mark.usefixtures("ways")


@pytest.fixture(scope="module")
def sampler(pipe):
    return Sampler.from_pipeline(pipe, "dpmsolver++")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
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
    decode = StableDiffusion.decode

    def failing(self, latents, output, generators, **size):
        if generators[0].initial_seed() == 1:
            raise RuntimeError("out of memory")
        return decode(self, latents, output, generators, **size)

    monkeypatch.setattr(StableDiffusion, "decode", failing)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 4)
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, "--guidance", "cfg", *QUICK[:2], *QUICK[-2:])
    assert code == 1 and "p1" in error
    assert {entry["id"]: entry["status"] for entry in sound(out)} == {
        "p0": "ok",
        "p1": "failed: out of memory",
        "p2": "ok",
        "p3": "ok",
    }
    assert sorted(path.stem for path in (out / "images").glob("*.png")) == ["p0", "p2", "p3"]


def test_a_run_killed_at_any_byte_of_its_manifest_ends_as_if_it_had_not_been(sampler, drawn, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    make(sampler, jobs(5), whole, batch_size=2)
    expected, text = sound(whole), (whole / "manifest.jsonl").read_bytes()
    ends = [i for i, byte in enumerate(text) if byte == ord("\n")]
    for cut in sorted({0, len(text), *range(5, len(text), 181), *(end + k for end in ends for k in (-1, 0, 1))}):
        shutil.copytree(whole, out)
        (out / "manifest.jsonl").write_bytes(text[:cut])
        if cut % 2:  # images of lines that were not written yet
            for i in range(text[:cut].count(b"\n"), 5):
                (out / "images" / f"p{i}.png").rename(out / "images" / f"p{i}.png.part")
        make(sampler, jobs(5), out, batch_size=2)
        assert sound(out) == expected, cut
        shutil.rmtree(out)


def test_images_that_are_gone_or_changed_are_made_again_and_counted(tmp_path, monkeypatch, capsys, drawn):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 4)
    arguments = ("--prompts", prompts, "--out", out, *QUICK)
    monkeypatch.setattr(sys, "argv", ["basinescape", "generate", "--no-progress", *map(str, arguments)])

    def said():
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        first, rest = capsys.readouterr().out.split("\n", 1)
        assert ("attempts in" in rest) == (not first.endswith("(0 new)"))
        return first + "\n"

    assert said() == f"4 images in {out} (4 new)\n"
    before = {path.name: path.read_bytes() for path in (out / "images").iterdir()}
    (out / "images" / "p0.png").unlink()
    (out / "images" / "p2.png").write_bytes(b"")
    assert said() == f"4 images in {out} (2 new)\n"
    assert {path.name: path.read_bytes() for path in (out / "images").iterdir()} == before
    assert sorted(line["id"] for line in sound(out)) == ["p0", "p1", "p2", "p3"]
    shutil.rmtree(out / "images")
    assert said() == f"4 images in {out} (4 new)\n" and len(sound(out)) == 4
    assert said() == f"4 images in {out} (0 new)\n"


def test_a_lone_surrogate_costs_its_line_and_no_other(tmp_path, monkeypatch, capsys):
    """A file holds no half of a character."""
    text = b'{"prompt": "a cat \\ud83d"}\n{"prompt": "a picture of a cat"}\n'
    out = tmp_path / "out"
    for _ in range(2):  # also when it is gone on with
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        code, error = run(monkeypatch, capsys, "--prompts", "-", "--out", out, "--on-error", "skip", *QUICK)
        assert code == 0 and "1 rows of the prompts skipped" in error
        assert {line["id"]: line["status"] for line in sound(out)} == {"0001": "ok"}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    code, error = run(monkeypatch, capsys, "--prompts", "-", "--out", out, *QUICK)
    assert code == 2 and "standard input, line 1: holds half a surrogate pair" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "error", [TypeError("t"), IndexError("i"), OverflowError("o"), KeyError("k"), torch.OutOfMemoryError("m")]
)
def test_any_fault_of_one_sample_costs_that_one_and_is_tried_once_a_run(sampler, drawn, tmp_path, error):
    drawn.faults["a picture of a cat 2"] = error
    summary = make(sampler, jobs(5), tmp_path / "out")
    assert summary.counts["ok"] == 4 and summary.ids["failed"] == ["p2"]
    (line,) = [line for line in sound(tmp_path / "out") if line["status"] != "ok"]
    assert line["status"].startswith("failed: ") and str(error) in line["status"]
    again = make(sampler, jobs(5), tmp_path / "out")
    assert again.before == 4 and again.ids == {"failed": ["p2"]}
    drawn.faults.clear()
    assert make(sampler, jobs(5), tmp_path / "out").ids == {"ok": ["p2"]}
    assert {line["status"] for line in sound(tmp_path / "out")} == {"ok"}


def test_a_bug_that_hits_every_sample_is_no_success(tmp_path, monkeypatch, capsys, drawn):
    prompts = tmp_path / "prompts.jsonl"
    write(prompts, 3)
    drawn.faults |= {f"a picture of a cat {i}": AttributeError("no attribute 'ravel'") for i in range(3)}
    arguments = ("--prompts", prompts, "--out", tmp_path / "out", *QUICK)
    code, error = run(monkeypatch, capsys, *arguments)
    assert code == 1 and "3 failed (p0, p1, p2)" in error
    assert {line["status"] for line in sound(tmp_path / "out")} == {"failed: AttributeError: no attribute 'ravel'"}


def test_a_gpu_that_is_lost_ends_the_run_and_fails_no_sample_for_it(sampler, drawn, tmp_path):
    """After such an error nothing works in the process: what is not made yet is left to the next start."""
    drawn.faults["a picture of a cat 2"] = torch.AcceleratorError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make(sampler, jobs(4), tmp_path / "out", batch_size=1)
    assert all(line["status"] == "ok" for line in sound(tmp_path / "out"))
    drawn.faults.clear()
    make(sampler, jobs(4), tmp_path / "out", batch_size=1)
    assert [line["status"] for line in sound(tmp_path / "out")] == ["ok"] * 4


def test_a_gpu_that_is_lost_in_the_decoder_ends_the_run(sampler, drawn, tmp_path, monkeypatch):
    def lost(*arguments, **options):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(StableDiffusion, "decode", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make(sampler, jobs(4), tmp_path / "out", batch_size=1)
    assert not (tmp_path / "out/manifest.jsonl").read_text()


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_in_flight_be_finished(tmp_path, monkeypatch, capsys, drawn, number):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 6)

    def told():
        drawn.faults.clear()
        os.kill(os.getpid(), number)
        time.sleep(0.2)

    drawn.faults["a picture of a cat 2"] = told
    arguments = ("--prompts", prompts, "--out", out, "--batch-size", 2, *QUICK)
    code, error = run(monkeypatch, capsys, *arguments)
    assert code == 128 + number and "stopped: 2 of 6 images are left; the same command makes them" in error
    assert [line["id"] for line in sound(out)] == ["p0", "p1", "p2", "p3"]
    assert run(monkeypatch, capsys, *arguments)[0] == 0 and len(sound(out)) == 6
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.process
def test_a_second_signal_ends_it_now(tmp_path, monkeypatch, capsys, drawn):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 3)

    def told():
        drawn.faults.clear()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # as long as a step that is under way

    drawn.faults["a picture of a cat 1"] = told
    arguments = ("--prompts", prompts, "--out", out, "--batch-size", 1, *QUICK)
    code, error = run(monkeypatch, capsys, *arguments)
    assert code == 130 and "stopped at once, what was begun is lost: the same command makes all that is left" in error
    assert {line["id"] for line in read_lines(out / "manifest.jsonl")} <= {"p0"}
    assert run(monkeypatch, capsys, *arguments)[0] == 0 and len(sound(out)) == 3


@pytest.mark.process
def test_a_signal_in_the_last_batch_stops_nothing(tmp_path, monkeypatch, capsys, drawn):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 2)

    def told():
        drawn.faults.clear()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

    drawn.faults["a picture of a cat 1"] = told
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, *QUICK)
    assert code == 0 and "stopped" not in error and len(sound(out)) == 2


def test_a_decoder_that_dies_is_asked_again(sampler, drawn, tmp_path, monkeypatch):
    """Once; what ends its thread twice over one sample has ended that sample alone."""
    decode, deaths = StableDiffusion.decode, {1: 1, 3: 5}

    def dying(self, latents, output, generators, **size):
        seed = generators[0].initial_seed()
        if deaths.get(seed, 0):
            deaths[seed] -= 1
            raise SystemExit(1)
        return decode(self, latents, output, generators, **size)

    monkeypatch.setattr(StableDiffusion, "decode", dying)
    make(sampler, jobs(5), tmp_path / "out", batch_size=2)
    assert {line["id"]: line["status"] for line in sound(tmp_path / "out")} == {
        **{f"p{i}": "ok" for i in (0, 1, 2, 4)},
        "p3": "failed: SystemExit: 1",
    }


def test_a_full_disk_ends_the_run_and_leaves_it_to_be_gone_on_with(sampler, drawn, tmp_path, monkeypatch):
    def full(data, path):
        if path.stem == "p1":
            raise OSError(28, "No space left on device")
        saved(data, path)

    saved = writers.save_bytes
    monkeypatch.setattr(writers, "save_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        make(sampler, jobs(3), tmp_path / "out")
    assert [line["id"] for line in sound(tmp_path / "out")] == ["p0"]
    monkeypatch.setattr(writers, "save_bytes", saved)
    make(sampler, jobs(3), tmp_path / "out")
    assert [line["id"] for line in sound(tmp_path / "out")] == ["p0", "p1", "p2"]


@pytest.mark.parametrize("format", ["png", "parquet", "webdataset"])
def test_an_exception_ends_the_run_and_loses_no_finished_image(sampler, drawn, tmp_path, monkeypatch, format):
    if format != "png":
        pytest.importorskip({"parquet": "pyarrow"}.get(format, format))
    whole = LocalExecutor._made

    def breaking(self, *given):
        for number, one in enumerate(whole(self, *given)):
            if number == 3:
                raise RuntimeError("the device is lost")
            yield one

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the device is lost"):
        patched.setattr(LocalExecutor, "_made", breaking)
        make(sampler, jobs(6), tmp_path / "out", format=format)
    assert [line["id"] for line in read_lines(tmp_path / "out" / "manifest.jsonl")] == ["p0", "p1", "p2"]
    assert make(sampler, jobs(6), tmp_path / "out", format=format).before == 3
    assert list(verify(tmp_path / "out")) == []


class Compared:
    """Compares pictures, and cannot do so with those of some seeds, their first channel."""

    def __init__(self, *seeds, error=ZeroDivisionError("a picture of one colour")):
        self.settings, self.seeds, self.error = {}, seeds, error

    def __call__(self, image):
        if image.getpixel((0, 0))[0] in self.seeds:
            raise self.error
        return {"similarity": 0.5}


def test_a_picture_that_cannot_be_compared_or_encoded_fails_alone(sampler, drawn, tmp_path, monkeypatch):
    encode = Encoder.picture

    def too_large(self, image, line):
        if line["id"] == "p3":
            raise ValueError("encoding error 5")
        return encode(self, image, line)

    monkeypatch.setattr(Encoder, "picture", too_large)
    make(sampler, jobs(5), tmp_path / "out", copies=Compared(1))
    assert {line["id"]: line["status"] for line in sound(tmp_path / "out")} == {
        **{f"p{i}": "ok" for i in (0, 2, 4)},
        "p1": "failed: ZeroDivisionError: a picture of one colour",
        "p3": "failed: encoding error 5",
    }


def test_a_gpu_that_is_lost_while_pictures_are_compared_fails_none(sampler, drawn, tmp_path):
    with pytest.raises(torch.AcceleratorError):
        make(sampler, jobs(4), tmp_path / "out", batch_size=1, copies=Compared(2, error=torch.AcceleratorError("lost")))
    assert all(line["status"] == "ok" for line in sound(tmp_path / "out"))


class Breaking(Prompts):
    """Prompts of which row `row` cannot be read from the `time`th reading on."""

    def __init__(self, jobs, row, time):
        super().__init__(jobs)
        self.row, self.left = row, time

    def __iter__(self):
        self.left -= 1
        for position, job in super().__iter__():
            if position == self.row and self.left <= 0:
                raise ConnectionError("the source is gone")
            yield position, job


@pytest.mark.parametrize("format", ["png", "parquet"])
@pytest.mark.parametrize(("row", "time"), [(5, 2), (5, 1), (0, 1)])
def test_a_source_that_breaks_keeps_what_came_before(sampler, drawn, tmp_path, format, row, time):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(ConnectionError, match="the source is gone"):
        make(sampler, Breaking(jobs(8), row, time), tmp_path / "out", format=format, batch_size=3)
    assert [line["id"] for line in read_lines(tmp_path / "out" / "manifest.jsonl")] == [f"p{i}" for i in range(row)]
    assert make(sampler, jobs(8), tmp_path / "out", format=format, batch_size=3).counts["ok"] == 8 - row
    assert list(verify(tmp_path / "out")) == []
