"""A large run: its formats, its parts, what is said of it, and what is checked of it afterwards."""

import io
import json
import logging
import re
import shutil
import socket
import sys
import urllib.request
import weakref

import bulkruns
import pytest
from basinescape import Guidance
from basinescape.bench import cli
from basinescape.bench.evaluation.sheet import sheet
from basinescape.bench.speed.standin import stand_in
from basinescape.bulk import encode_decode
from basinescape.bulk.generate import balanced
from basinescape.data.merge import merge
from basinescape.data.prompts import Job
from basinescape.data.verify import verify
from basinescape.data.writers import FORMATS
from basinescape.runs.jsonl_journal import read_lines
from basinescape.runs.progress import JsonFormatter, Progress
from bulkruns import QUICK, run, write
from PIL import Image
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("ways")
JOBS = [Job(f"p.{i}", f"cat {i}", i, "blurry" if i == 3 else None) for i in range(7)]
LIBRARIES = {"parquet": "pyarrow", "webdataset": "webdataset"}


@pytest.fixture
def sampler(pipe):
    return stand_in(pipe)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("basinescape.data.writers.SHARD", 3)


def make(sampler, out, jobs=JOBS, **options):
    return bulkruns.make(sampler, jobs, out, Guidance.cfg(2.0), **{"batch_size": 3} | options)


def images(out, format):
    """(line, picture) of each image, as the libraries of its format read them."""
    if format == "parquet":
        from pyarrow import parquet

        rows = [row for file in sorted((out / "shards").iterdir()) for row in parquet.read_table(file).to_pylist()]
        return [(row, Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    if format == "webdataset":
        import webdataset

        files = [str(file) for file in sorted((out / "shards").iterdir())]
        found = webdataset.WebDataset(files, shardshuffle=False).decode("pil").to_tuple("json", "png")
        return list(found)
    return [(line, Image.open(out / line["file"])) for line in read_lines(out / "manifest.jsonl")]


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "latents"])
def test_every_format_has_the_images_and_the_manifests_fields(sampler, tmp_path, format):
    pytest.importorskip(LIBRARIES.get(format, "PIL"))
    make(sampler, tmp_path / "out", format=format)
    lines = {line["id"]: line for line in read_lines(tmp_path / "out" / "manifest.jsonl")}
    found = images(tmp_path / "out", format)
    assert [line["id"] for line, _ in found] == [job.id for job in JOBS] == list(lines)
    for (line, image), job in zip(found, JOBS, strict=True):
        for name in ("prompt", "seed", "transition_step", "noise_gap", "sha256", "status"):
            assert line[name] == lines[job.id][name]
        assert line.get("negative_prompt") == job.negative_prompt
        negative = None if job.negative_prompt is None else [job.negative_prompt]
        alone = sampler([job.prompt], [job.seed], 2, Guidance.cfg(2.0), negative, progress=False).images[0]
        assert image.size == alone.size
        if format not in ("jpg", "webp"):  # which lose something
            assert image.convert("RGB").tobytes() == alone.tobytes()
    assert list(verify(tmp_path / "out")) == []


def test_latents_are_the_samplers(sampler, tmp_path):
    make(sampler, tmp_path / "out", format="latents")
    alone = sampler([job.prompt for job in JOBS], 0, 2, Guidance.cfg(2.0), [j.negative_prompt for j in JOBS], output="latent")
    for line, expected in zip(read_lines(tmp_path / "out" / "manifest.jsonl"), alone.latents, strict=True):
        with safe_open(tmp_path / "out" / line["file"], "pt") as file:
            assert file.get_tensor("latents").equal(expected)
            assert json.loads(file.metadata()["line"])["prompt"] == line["prompt"]


@pytest.mark.parametrize("format", ["png", "parquet"])
def test_verify_names_what_is_missing_or_changed_and_it_is_made_again(sampler, tmp_path, monkeypatch, capsys, format):
    pytest.importorskip(LIBRARIES.get(format, "PIL"))
    out = tmp_path / "out"
    make(sampler, out, format=format)
    expected = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    files = sorted(path for path in expected if path.parent != out and path.suffix != ".jsonl")
    files[0].unlink()
    files[1].write_bytes(expected[files[1]][:-1] + b"?")
    monkeypatch.setattr(sys, "argv", ["basinescape", "verify", str(out)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and len(said) == 2
    assert said[0] == f"{files[0].relative_to(out)} is missing" and said[1].startswith(str(files[1].relative_to(out)))
    files[1].unlink()
    make(sampler, out, format=format)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None) and {path: path.read_bytes() for path in expected if path.name != "manifest.jsonl"} == {
        path: content for path, content in expected.items() if path.name != "manifest.jsonl"
    }
    monkeypatch.setattr(sys, "argv", ["basinescape", "verify", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "holds no run of generate" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["png", "webdataset"])
def test_shards_that_are_merged_are_the_run_made_in_one(sampler, tmp_path, format):
    pytest.importorskip(LIBRARIES.get(format, "PIL"))
    make(sampler, tmp_path / "whole", format=format)
    for i in range(3):
        make(sampler, tmp_path / "parts", format=format, shard=(i, 3))
    count = sum(1 for part in (tmp_path / "parts").iterdir() for _ in read_lines(part / "manifest.jsonl"))
    assert count == len(JOBS)
    for _ in range(2):  # the second time nothing is left to do
        assert merge(tmp_path / "parts", tmp_path / "one") == (7, 7)
    files = {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert files == {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file()}
    for file in files - {"manifest.jsonl"}:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert make(sampler, tmp_path / "one", format=format).counts["ok"] == 0  # and can be gone on with
    shutil.rmtree(tmp_path / "parts" / "shard-1-of-3")
    with pytest.raises(ValueError, match=r"2 of 3 shards; missing are \[1\]"):
        merge(tmp_path / "parts", tmp_path / "two")
    with pytest.raises(ValueError, match="holds no folder shard-i-of-n"):
        merge(tmp_path / "whole", tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_however_many_prompts_few_are_in_memory(sampler, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), 0

    class Counted(encode_decode.Sample):
        def __init__(self, *given, **named):
            nonlocal most
            super().__init__(*given, **named)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(encode_decode, "Sample", Counted)
    jobs = [Job(f"{i}", f"cat {i % 40}", i) for i in range(150)]
    assert make(sampler, tmp_path / "out", jobs, steps=1).counts["ok"] == 150
    assert most < 75  # what the queues, the slots and the order of the results may hold


def test_a_prompt_that_comes_again_is_encoded_once(sampler, tmp_path):
    asked, encode = [], sampler.model.encode
    sampler.model.encode = lambda prompts, *given, **named: asked.extend(prompts) or encode(prompts, *given, **named)
    make(sampler, tmp_path / "out", [Job(f"{i}", f"cat {i % 3}", i) for i in range(20)])
    assert sorted(text for text in asked if text) == ["cat 0", "cat 1", "cat 2"]


def test_slots_are_filled_evenly():
    assert [balanced(8, jobs) for jobs in (0, 1, 8, 9, 16, 17, 1000)] == [8, 1, 8, 5, 8, 6, 8]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "gif"), "format must be one of png, jpg"),
        (("--shard", "3/3"), "shard must be i/n"),
        (("--shard", "x"), "shard must be i/n"),
        (("--shard", "\u0660/\u0662"), "shard must be i/n"),
        (("--shard", "\u00b2/3"), "shard must be i/n"),
        (("--shard", "0/2/"), "shard must be i/n"),
        (("--log", "loud"), "log must be one of auto"),
        (("--on-error", "ignore"), "on_error must be one of stop"),
    ],
)
def test_nonsense_ends_with_one_line_before_any_work(tmp_path, monkeypatch, capsys, options, says):
    write(tmp_path / "p.jsonl", 1)
    code, error = run(monkeypatch, capsys, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", *QUICK, *options)
    assert code == 2 and says in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "package"), LIBRARIES.items())
def test_a_format_whose_library_is_missing_names_the_package(sampler, tmp_path, monkeypatch, format, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"format '{format}' needs the package {package}: pip install {package}"):
        make(sampler, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_other_weights_are_another_run(random_pipeline, drawn, tmp_path):
    from basinescape import Sampler

    pipe = random_pipeline("sd", 8, "epsilon")
    make(Sampler.from_pipeline(pipe), tmp_path / "out")
    pipe.unet.conv_out.bias.data += 1
    with pytest.raises(ValueError, match=r"another run .its weights differ"):
        make(Sampler.from_pipeline(pipe), tmp_path / "out")


def test_a_run_says_how_far_it_is(sampler, tmp_path, monkeypatch):
    monkeypatch.setattr("basinescape.runs.progress.EVERY", 0.0)
    plain, told = io.StringIO(), io.StringIO()
    make(sampler, tmp_path / "plain", progress=Progress("auto", stream=plain))
    said = [line.split(",")[0] for line in plain.getvalue().splitlines()]
    assert list(dict.fromkeys(said)) == [f"{i} of 7 images" for i in range(8)]
    make(sampler, tmp_path / "json", progress=Progress("json", stream=told))
    events = [json.loads(line) for line in told.getvalue().splitlines()]
    assert [event["event"] for event in (events[0], events[-1])] == ["begin", "end"]
    assert {event["event"] for event in events[1:-1]} == {"progress"} and events[-2]["ok"] == 7
    assert events[-1]["ok"] == 7 and events[-1]["total"] == 7 and events[-1]["images_per_second"] > 0
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "p1: %s", "args": ("bad",)})
    assert json.loads(JsonFormatter().format(record)) == {"event": "log", "level": "ERROR", "message": "p1: bad"}


def test_prometheus_finds_the_numbers(sampler, tmp_path):
    pytest.importorskip("prometheus_client")

    class Read(Progress):
        def __exit__(self, *given):
            self.page = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode()
            super().__exit__(*given)

    shown = Read("none", metrics=0)
    make(sampler, tmp_path / "out", progress=shown)
    page = shown.page
    assert "basinescape_ok 7.0" in page and "basinescape_failed 0.0" in page
    with Progress("none", metrics=shown.port):  # the port is free again
        pass
    make(sampler, tmp_path / "out", progress=shown)
    assert "basinescape_total 7.0" in shown.page and "basinescape_ok 0.0" in shown.page


@pytest.mark.parametrize(("given", "reached"), [({}, False), ({"host": "0.0.0.0"}, True), ({"host": "127.0.0.2"}, False)])
def test_the_numbers_are_served_on_the_address_that_was_chosen(given, reached):
    """127.0.0.3 stands for an address by which others reach this machine."""
    pytest.importorskip("prometheus_client")
    shown = Progress("none", metrics=0, **given)
    own = given.get("host", "127.0.0.1").replace("0.0.0.0", "127.0.0.1")
    socket.create_connection((own, shown.port), timeout=5).close()
    if reached:
        socket.create_connection(("127.0.0.3", shown.port), timeout=5).close()
    else:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.3", shown.port), timeout=5)


@pytest.mark.parametrize("format", ["png", "parquet"])
def test_the_sheet_shows_every_image_the_suspect_first(sampler, tmp_path, monkeypatch, capsys, format):
    pytest.importorskip(LIBRARIES.get(format, "PIL"))
    out, page = tmp_path / "out", tmp_path / "page.html"
    make(sampler, out, [Job("a", "a <b>", 0), Job("z", "z", 1)], format=format)
    lines = [{**line, "suspect": line["id"] == "z", "score": 1.0, "attempts": 2} for line in read_lines(out / "manifest.jsonl")]
    lines.append({"id": "f", "prompt": "f", "seed": 1, "status": "failed: no"})
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["basinescape", "report", str(out), "--out", str(page)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = page.read_text()
    assert stop.value.code in (0, None) and "3 images in" in capsys.readouterr().out
    assert re.findall(r"<figcaption>(\S+?)<br>", text.replace(" ", "_")) == ["z", "f", "a_&lt;b&gt;"]
    assert text.count("data:image/webp;base64,") == 2 and "1 suspect, 1 failed" in text and "<b>" not in text
    with pytest.raises(ValueError, match="holds no run"):
        sheet(tmp_path, page)
