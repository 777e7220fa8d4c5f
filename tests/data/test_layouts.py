"""Sets that other programs read: an imagefolder, a WebDataset, Parquet, captions beside pictures; each says what was asked."""

import json
import random
import subprocess
import sys
import tarfile
from functools import partial

import bulkruns
import pytest
from basinescape import FirstMinimum, Guidance
from basinescape.bench.speed.standin import stand_in
from basinescape.data.captions import read_captions
from basinescape.data.image_encoding import Made
from basinescape.data.merge import merge
from basinescape.data.prompts import Job, read_prompts
from basinescape.data.shards import Parquet, contents
from basinescape.data.verify import verify
from basinescape.runs.jsonl_journal import read_lines
from PIL import Image

TEXTS = ["ein Bär & ein Kätzchen", "熊が一匹", 'a "cat"\u2028by night', "a dog, <bold>", "one more", "a cat", "the last"]
JOBS = [Job(f"p{i}", text, 7 - i) for i, text in enumerate(TEXTS)]


@pytest.fixture
def sampler(pipe, monkeypatch):
    monkeypatch.setattr("basinescape.data.writers.SHARD", 3)
    return stand_in(pipe)


def make(sampler, out, jobs=JOBS, **options):
    return bulkruns.make(sampler, jobs, out, Guidance.cfg(2.0), **{"steps": 1, "batch_size": 3} | options)


def pixels(out, format="png"):
    """Those of the pictures of a run's folder."""
    return [Image.open(out / "images" / f"{job.id}.{format}").tobytes() for job in JOBS]


def loaded(kind, folder, **given):
    """A set as the library `datasets` reads it."""
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset(kind, **given, split="train", cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_a_folder_is_an_imagefolder(sampler, tmp_path, format):
    make(sampler, tmp_path / "out", format=format)
    (tmp_path / "out" / "images" / f"p3.{format}").unlink()
    make(sampler, tmp_path / "out", format=format)  # its line is the manifest's last now
    found = loaded("imagefolder", tmp_path, data_dir=str(tmp_path / "out"))
    assert [row["text"] for row in found] == TEXTS and [row["seed"] for row in found] == [job.seed for job in JOBS]
    assert [row["image"].tobytes() for row in found] == pixels(tmp_path / "out", format)
    assert [prompt.text for prompt in read_captions(tmp_path / "out" / "images")] == TEXTS


def test_parquet_is_that_of_datasets(sampler, tmp_path):
    pytest.importorskip("pyarrow")
    jobs = [*JOBS[:-1], Job("p6", "the last", 1, "blurry", steps=2)]
    make(sampler, tmp_path / "out", jobs, format="parquet")
    found = loaded("parquet", tmp_path, data_files=str(tmp_path / "out" / "shards" / "*.parquet"))
    assert [row["prompt"] for row in found] == TEXTS
    make(sampler, tmp_path / "files", jobs)
    assert [row["image"].tobytes() for row in found] == pixels(tmp_path / "files")
    assert [row["steps"] for row in found] == [1] * 6 + [2]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in Linux's /proc")
def test_no_thread_is_left_that_holds_the_bytes_of_a_parquet_file(tmp_path):
    """pyarrow's threads outlive a read. One that lets go of Python's memory when Python ends aborts the process."""
    pytest.importorskip("pyarrow")
    code = """
import sys
from pathlib import Path
from basinescape.data.image_encoding import Made
from basinescape.data.shards import Parquet
path = Path(sys.argv[1], "a.parquet")
Parquet().write(path, [Made(0, {"id": "a"}, b"picture")])
def names():
    found = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    return sorted(name for name in found if not name.startswith("jemalloc"))  # frees memory of its own
before = names()
(one,) = Parquet().read(path.read_bytes())
assert one.data == b"picture" and names() == before, (before, names())
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_parquet_files_have_the_same_columns_whatever_their_rows_have(sampler, tmp_path):
    pytest.importorskip("pyarrow")
    more = [None, {"stars": 3}, None, {"stars": 2.5, "tags": ["a"]}, {"tags": ["b", "c"]}, None, {"artist": "M. Ernst"}]
    jobs = [Job(job.id, job.prompt, job.seed, more=own) for job, own in zip(JOBS, more, strict=True)]
    make(sampler, tmp_path / "out", jobs, format="parquet")
    found = loaded("parquet", tmp_path, data_files=str(tmp_path / "out" / "shards" / "*.parquet"))
    for name in ("stars", "tags", "artist"):
        assert [row[name] for row in found] == [(own or {}).get(name) for own in more]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "shards").iterdir()}
    (tmp_path / "out" / "shards" / "000001.parquet").unlink()
    assert make(sampler, tmp_path / "out", jobs, format="parquet").counts["ok"] == 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "shards").iterdir()} == before
    assert list(verify(tmp_path / "out")) == []


def test_a_parquet_column_that_no_picture_fills_has_its_type(sampler, tmp_path):
    """So sets with and without a guard, and with one branch of the network alone, have one schema."""
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    bulkruns.make(sampler, JOBS[:1], tmp_path, Guidance.cfg(1.0), steps=1, format="parquet")
    schema = parquet.read_schema(next((tmp_path / "shards").iterdir()))
    expected = {"truncated": "string", "attempts": "int64", "score": "double", "suspect": "bool"}
    assert {name: str(schema.field(name).type) for name in expected} == expected
    assert str(schema.field("noise_gap").type.value_type) == "double"


def test_a_parquet_file_gets_the_columns_of_others_unless_it_is_damaged(tmp_path):
    pytest.importorskip("pyarrow")
    shard, files, data = Parquet(), [tmp_path / f"{i}.parquet" for i in range(2)], random.Random(0).randbytes(200)
    for i, file in enumerate(files):
        shard.write(file, [Made(i, {"id": f"p{i}", "prompt": "a"} | ({"stars": 3} if i else {}), data)])
    rows, whole, other = list(shard.read(files[0].read_bytes())), files[0].read_bytes(), files[1].stat()

    def damage():
        files[0].write_bytes(files[0].read_bytes().replace(data[:50], data[:49] + b"?"))
        return files[0].read_bytes()

    damaged = damage()
    with pytest.raises(OSError, match="CRC"):
        shard.match(files)
    assert files[0].read_bytes() == damaged
    files[0].write_bytes(whole)
    shard.match(files)
    assert files[0].read_bytes() != whole and list(shard.read(files[0].read_bytes())) == rows
    assert (files[1].stat().st_ino, files[1].stat().st_mtime_ns) == (other.st_ino, other.st_mtime_ns)
    with pytest.raises(OSError, match="CRC"):
        list(shard.read(damage()))


def test_a_folder_in_a_tar_file_has_no_contents(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        (tmp_path / "a.png").mkdir()
        tar.add(tmp_path / "a.png", "a.png")
    with tarfile.open(tmp_path / "a.tar") as tar, pytest.raises(tarfile.ReadError, match="is no file"):
        contents(tar, tar.next())


def test_a_webdataset_has_text_and_line_beside_each_picture(sampler, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    make(sampler, tmp_path / "out", format="webdataset")
    shards = [str(path) for path in sorted((tmp_path / "out" / "shards").iterdir())]
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
    assert [text for _, text, _ in found] == TEXTS and [line["id"] for _, _, line in found] == [job.id for job in JOBS]
    make(sampler, tmp_path / "files")
    assert [image.tobytes() for image, _, _ in found] == pixels(tmp_path / "files")


def test_datasets_reads_a_webdataset_whose_first_pictures_lack_what_later_ones_have(sampler, tmp_path):
    """`datasets` takes the kinds of a set's fields from its first 5 pictures, whose guidance here never begins."""
    pytest.importorskip("webdataset")
    jobs = [Job(f"{i}", "a", i, steps=4 if i < 5 else 9, more={"tags": ["a"] if i < 5 else []}) for i in range(8)]
    guidance = Guidance.delayed(2.0, until=FirstMinimum(latest=5))
    bulkruns.make(sampler, jobs, tmp_path / "out", guidance, batch_size=3, format="webdataset")
    moved = {line["id"]: line["transition_timestep"] for line in read_lines(tmp_path / "out" / "manifest.jsonl")}
    assert [moved[job.id] is None for job in jobs] == [True] * 5 + [False] * 3
    found = loaded("webdataset", tmp_path, data_files=str(tmp_path / "out" / "shards" / "*.tar"))
    assert [row["json"]["id"] for row in found] == [job.id for job in jobs] and found[7]["json"]["tags"] == []


def test_captions_lie_beside_pictures_where_they_are_asked_for(sampler, tmp_path):
    run = partial(make, sampler, captions=True)
    run(tmp_path / "out")
    images = tmp_path / "out" / "images"
    assert [(images / f"{job.id}.txt").read_text("utf-8") for job in JOBS] == TEXTS and list(verify(tmp_path / "out")) == []
    (images / "p1.txt").write_text("a dog")
    (images / "p2.txt").unlink()
    assert sorted(verify(tmp_path / "out")) == [("images/p1.txt", "is changed"), ("images/p2.txt", "is missing")]
    assert run(tmp_path / "out").counts["ok"] == 2 and list(verify(tmp_path / "out")) == []
    for i in range(2):
        run(tmp_path / "parts", shard=(i, 2))
    assert merge(tmp_path / "parts", tmp_path / "one") == (7, 7) and list(verify(tmp_path / "one")) == []
    assert (tmp_path / "one" / "images" / "p1.txt").read_text("utf-8") == TEXTS[1]
    with pytest.raises(
        ValueError, match="captions lie beside pictures, so format must be one of png, jpg, webp, got 'parquet'"
    ):
        run(tmp_path / "other", format="parquet")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["gone", "another", "cut"])
def test_metadata_that_says_something_else_is_named_and_written_again(sampler, tmp_path, damage):
    make(sampler, tmp_path)
    path = tmp_path / "images" / "metadata.jsonl"
    before = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(before.replace(b"one more", b"one less") if damage == "another" else before[:200])
    what = "is missing" if damage == "gone" else "does not say what manifest.jsonl says"
    assert list(verify(tmp_path)) == [("images/metadata.jsonl", what)]
    assert make(sampler, tmp_path).counts["ok"] == 0
    assert path.read_bytes() == before and list(verify(tmp_path)) == []


def test_a_line_says_how_its_picture_was_made_and_can_be_asked_for_again(sampler, tmp_path):
    jobs = [Job("a", "熊", 3, height=64, width=128, steps=2), Job("b", "a cat", 4, scale=3.0)]
    make(sampler, tmp_path / "out", jobs)
    lines = {line["id"]: line for line in read_lines(tmp_path / "out" / "manifest.jsonl")}
    names = ("steps", "scale", "height", "width", "guidance", "model")
    assert [lines["a"][name] for name in names] == [2, 2.0, 64, 128, "cfg", "tiny"]
    assert [lines["b"][name] for name in names] == [1, 3.0, 64, 64, "cfg", "tiny"]
    assert lines["a"]["scheduler"] == type(sampler.scheduler).__name__ and len(lines["a"]["fingerprint"]) == 64
    assert {"python", "torch", "diffusers"} <= lines["a"]["versions"].keys()
    again = {job.id: job for job in read_prompts(tmp_path / "out" / "manifest.jsonl")}
    assert [(again[id].prompt, again[id].seed, *again[id].kind) for id in "ab"] == [
        ("熊", 3, 2, 2.0, 64, 128, "cfg"),
        ("a cat", 4, 1, 3.0, 64, 64, "cfg"),
    ]


def test_what_people_read_keeps_its_letters(sampler, tmp_path):
    run = partial(make, sampler, tmp_path, negative_prompt="unschön")
    run()
    for file in ("manifest.jsonl", "jobs.jsonl", "images/metadata.jsonl"):
        text = (tmp_path / file).read_text("utf-8")
        assert "ein Bär & ein Kätzchen" in text and "熊が一匹" in text
        assert len(text.splitlines()) == len(JOBS)  # whatever else Python takes for the end of a line
    assert "unschön" in (tmp_path / "run.json").read_text("utf-8")
    before = (tmp_path / "manifest.jsonl").read_bytes()
    with (tmp_path / "manifest.jsonl").open("ab") as file:
        file.write('{"id": "p9", "prompt": "Bä'.encode()[:-1])  # cut within a letter
    run()
    assert (tmp_path / "manifest.jsonl").read_bytes() == before
    old = [json.dumps(line) + "\n" for line in read_lines(tmp_path / "manifest.jsonl")]
    (tmp_path / "manifest.jsonl").write_text("".join(old))  # as before letters were kept
    assert run().counts["ok"] == 0 and (tmp_path / "manifest.jsonl").read_bytes() == before
