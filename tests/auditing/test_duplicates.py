"""Near-duplicates inside a set: each picture's nearest other one, and which pictures to leave out."""

import io
import json

import bulkruns
import numpy as np
import pytest
from basinescape import Guidance
from basinescape.auditing import duplicates, training_images
from basinescape.auditing.duplicates import Duplicates
from basinescape.bench.speed.standin import stand_in
from basinescape.data.prompts import Job
from basinescape.data.verify import verify
from basinescape.runs.jsonl_journal import read_lines
from PIL import Image

LIBRARIES = {"parquet": "pyarrow", "webdataset": "webdataset"}


def scene(seed, shift=0):
    """A picture like no other, perhaps a little off."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((72, 72), Image.Resampling.BICUBIC)
    large.crop((shift, shift, 64 + shift, 64 + shift)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_each_picture_has_its_nearest_other_and_the_first_that_it_repeats(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", 3)  # pairs within a block, and across
    seeds = [0, 1, 0, 2, 3, 0, 4, 2, 5]
    notes = Duplicates(["pixels"])((f"p{i}", scene(seed, shift=i % 2)) for i, seed in enumerate(seeds))
    assert {id: said["duplicate_of"] for id, said in notes.items() if "duplicate_of" in said} == {
        "p2": "p0",
        "p5": "p0",
        "p7": "p3",
    }
    assert (notes["p3"]["nearest_in_set"], notes["p7"]["nearest_in_set"]) == ("p7", "p3")
    assert notes["p0"]["nearest_in_set"] == "p2" and notes["p0"]["measure_in_set"] == "pixels"
    assert all((said["similarity_in_set"] > 0.81) == (i in (0, 2, 3, 5, 7)) for i, said in enumerate(notes.values()))


def test_what_is_like_a_picture_that_is_left_out_alone_stays(monkeypatch):
    """b repeats a, and c repeats b but not a: a and c are unlike, so both stay."""
    likeness = {("a", "b"): 0.9, ("b", "c"): 0.9, ("a", "c"): 0.1}
    ids = "abc"

    def similarity(self, pictures, measure=None):
        pairs = [[1.0 if one == other else likeness[tuple(sorted((one, other)))] for other in ids] for one in ids]
        return training_images.torch.tensor(pairs)

    monkeypatch.setattr(training_images.Comparison, "similarity", similarity)
    notes = Duplicates(["pixels"])((id, scene(i)) for i, id in enumerate(ids))
    assert [notes[id].get("duplicate_of") for id in ids] == [None, "a", None]


def test_a_picture_alone_has_no_other():
    assert Duplicates(["pixels"])([("a", scene(0))]) == {"a": {}}


@pytest.mark.parametrize("format", ["png", *LIBRARIES])
def test_a_run_marks_them_and_one_that_was_stopped_says_the_same(pipe, tmp_path, monkeypatch, format):
    pytest.importorskip(LIBRARIES.get(format, "PIL"))
    monkeypatch.setattr("basinescape.data.writers.SHARD", 3)
    jobs = [Job(f"p{i}", "a cat", seed) for i, seed in enumerate([0, 1, 0, 2, 1])]  # one seed, one picture
    options = {"format": format, "steps": 1, "batch_size": 2}

    def make(out, count=5, **given):
        found = Duplicates(["pixels"], 0.999)
        return bulkruns.make(stand_in(pipe), jobs[:count], out, Guidance.cfg(2.0), **options, duplicates=found, **given)

    summary = make(tmp_path / "whole")
    assert summary.counts["duplicates"] == 2 and summary.ids["duplicates"] == ["p2", "p4"]
    make(tmp_path / "grown", 3)
    assert make(tmp_path / "grown").counts["ok"] == 2
    lines = [{line["id"]: line for line in read_lines(tmp_path / name / "manifest.jsonl")} for name in ("whole", "grown")]
    assert lines[0] == lines[1] and lines[0]["p4"]["duplicate_of"] == "p1" and "duplicate_of" not in lines[0]["p1"]
    assert lines[0]["p0"]["nearest_in_set"] == "p2" and lines[0]["p0"]["similarity_in_set"] == 1
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*/*")} for name in ("whole", "grown")]
    assert files[0] == files[1] and list(verify(tmp_path / "grown")) == []
    if format == "png":
        rows = [json.loads(line) for line in (tmp_path / "grown" / "images" / "metadata.jsonl").read_text().splitlines()]
        assert [row["duplicate_of"] for row in rows] == [None, None, "p0", None, "p1"]
    with pytest.raises(ValueError, match="duplicates needs pictures"):
        bulkruns.make(
            stand_in(pipe), jobs, tmp_path / "x", Guidance.cfg(2.0), format="latents", duplicates=Duplicates(["pixels"])
        )
