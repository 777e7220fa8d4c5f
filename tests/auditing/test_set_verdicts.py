"""A set of pictures judged into a folder: from every source, gone on with, in shards, whatever befalls one of them."""

import csv

import pytest
import torch
from basinescape import Guidance, Sampler
from basinescape.auditing import set_verdicts as module
from basinescape.auditing.judge_page import bars
from basinescape.auditing.set_verdicts import Settings, judge
from basinescape.data.merge import merge
from basinescape.data.prompted import prompted
from basinescape.detection import basin_score
from basinescape.models.sd import StableDiffusion
from basinescape.runs.run_folder import locked
from bulkruns import jobs, make
from captionedsets import SOURCES
from judgeruns import judged, kept
from PIL import Image

COLUMNS = ["id", "file", "prompt", "score", "suspect", "status"]


@pytest.fixture(scope="module")
def sampler(small):
    return Sampler.from_pipeline(small)


@pytest.fixture
def asked(monkeypatch):
    """The prompts that pictures were judged with, one after another."""
    found, own = [], StableDiffusion.encode

    def encode(model, prompts, *sizes, **options):
        found.extend(prompts)
        return own(model, prompts, *sizes, **options)

    monkeypatch.setattr(StableDiffusion, "encode", encode)
    return found


def table(folder):
    with (folder / "judge.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("keep", SOURCES)
def test_pictures_from_every_source_have_the_score_that_each_has_alone(tmp_path, sampler, keep):
    source = keep(tmp_path / "set")
    rows = judged(sampler, source, tmp_path / "out")
    found = {one.id: one for one in prompted(source)}
    assert len(rows) == 3 and [row["status"] for row in rows] == ["ok"] * 3
    for row in rows:
        one = found[row["id"]]
        alone = sampler.judge([one.open()], one.prompt, seeds=0)
        assert row["prompt"] == one.prompt and row["file"] == one.file
        assert row["score"] == pytest.approx(alone.score.item(), abs=1e-4) and row["suspect"] == alone.suspect.item()
    assert [float(row["score"]) for row in table(tmp_path / "out")] == sorted((row["score"] for row in rows), reverse=True)
    assert list(table(tmp_path / "out")[0]) == COLUMNS
    page = (tmp_path / "out" / "judge.html").read_text()
    assert page.count("data:image/webp") == 3 and "://" not in page and "<script" not in page


def test_a_run_of_generate_is_judged_by_its_manifest(tmp_path, tiny):
    sampler = Sampler.from_pipeline(tiny)
    make(sampler, jobs(2), tmp_path / "run", Guidance.cfg(3.0), model="small", height=16, width=16)
    rows = judged(sampler, tmp_path / "run", tmp_path / "out")
    assert {(row["id"], row["prompt"]) for row in rows} == {(job.id, job.prompt) for job in jobs(2)}
    assert all(row["status"] == "ok" for row in rows)


def test_a_run_that_was_stopped_goes_on_and_judges_nothing_twice(tmp_path, sampler, asked, monkeypatch):
    images = kept(tmp_path / "set")
    judged(sampler, images, tmp_path / "whole")
    assert sorted(asked) == [f"a cat {i}" for i in range(5)]
    monkeypatch.setattr(module, "HELD", 1)
    own = Sampler.judge

    def stopped(self, images, prompts, *given, **options):
        if "a cat 3" in prompts:
            raise KeyboardInterrupt
        return own(self, images, prompts, *given, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sampler, "judge", stopped)
        judged(sampler, images, tmp_path / "out")
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 2
    with (tmp_path / "out" / "scores.jsonl").open("a") as file:
        file.write('{"id": "2", "sco')  # cut off by a kill
    asked.clear()
    judged(sampler, images, tmp_path / "out", batch_size=3)
    assert sorted(asked) == ["a cat 2", "a cat 3", "a cat 4"]
    for one, other in zip(table(tmp_path / "out"), table(tmp_path / "whole"), strict=True):
        assert float(one.pop("score")) == pytest.approx(float(other.pop("score")), abs=1e-4) and one == other
    asked.clear()
    judged(sampler, images, tmp_path / "out")
    assert asked == []


def test_pictures_and_prompts_that_changed_are_judged_again_and_those_that_moved_are_not(tmp_path, sampler, asked):
    before = {row["id"]: row for row in judged(sampler, kept(tmp_path / "set"), tmp_path / "out")}
    (tmp_path / "set" / "1.txt").write_text("a frog")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "set" / "2.png")
    (tmp_path / "set" / "4.png").unlink()
    (tmp_path / "elsewhere").mkdir()
    images = (tmp_path / "set").rename(tmp_path / "elsewhere" / "set")
    asked.clear()
    after = {row["id"]: row for row in judged(sampler, images, tmp_path / "out")}
    assert sorted(asked) == ["a cat 2", "a frog"] and sorted(after) == ["0", "1", "2", "3"]
    assert after["0"] == before["0"] | {"file": str(images / "0.png")} and after["2"]["score"] != before["2"]["score"]
    asked.clear()
    assert {row["id"]: row for row in judged(sampler, images, tmp_path / "out")} == after and asked == []


def test_shards_are_judged_apart_and_put_together(tmp_path, sampler, asked):
    images = kept(tmp_path / "set")
    parts = [judged(sampler, images, tmp_path / "out", shard=(i, 2)) for i in range(2)]
    assert [sorted(row["id"] for row in part) for part in parts] == [["0", "2", "4"], ["1", "3"]]
    assert [len(table(tmp_path / "out" / f"shard-{i}-of-2")) for i in range(2)] == [3, 2]
    asked.clear()
    together = judged(sampler, images, tmp_path / "out")
    assert asked == []
    whole = judged(sampler, images, tmp_path / "whole")
    assert [row["id"] for row in together] == [row["id"] for row in whole]
    assert [row["score"] for row in together] == pytest.approx([row["score"] for row in whole], abs=1e-4)
    assert (tmp_path / "out" / "judge.html").read_text().count("data:image/webp") == 5
    assert judged(sampler, images, tmp_path / "many", shard=(6, 7)) == []  # more shards than pictures


def test_a_shard_works_while_another_does_and_only_those_of_one_run_are_put_together(tmp_path, sampler):
    images, out = kept(tmp_path / "set"), tmp_path / "out"
    judged(sampler, images, out, shard=(0, 2))
    with locked(out), locked(out / "shard-0-of-2"):
        judged(sampler, images, out, shard=(1, 2), settings=Settings(seed=1))
    assert not (out / "run.json").exists()
    with pytest.raises(ValueError, match=r"shard-1-of-2' is a shard of another run \(its seed differ"):
        judged(sampler, images, out)
    assert not (out / "run.json").exists()
    for i in range(2):
        judged(sampler, images, tmp_path / "one", shard=(i, 2))
    with pytest.raises(ValueError, match=r"holds no run of generate.*judge, without --shard"):
        merge(tmp_path / "one", tmp_path / "merged")
    (tmp_path / "one" / "shard-1-of-2" / "scores.jsonl").unlink()
    assert len(judged(sampler, images, tmp_path / "one")) == 5  # what a shard has not judged is judged now


def test_another_model_or_way_to_judge_is_refused_and_another_threshold_is_not(tmp_path, sampler, random_pipeline, asked):
    images = kept(tmp_path / "set", 2)
    rows = judged(sampler, images, tmp_path / "out")
    other = random_pipeline("sd", 16, "epsilon")
    with torch.no_grad():
        other.unet.conv_out.bias.add_(0.1)
    for given, settings, says in (
        (Sampler.from_pipeline(other, sampler.scheduler), Settings(), "weights"),
        (sampler, Settings(seed=1), "seed"),
        (sampler, Settings(probes=1), "probes"),
        (sampler, Settings(height=16, width=16), "height, width"),
        (Sampler.from_pipeline(sampler.pipe, "euler"), Settings(), "scheduler"),
    ):
        with pytest.raises(ValueError, match=f"holds another run \\(its {says} differ"):
            judged(given, images, tmp_path / "out", settings=settings)
    asked.clear()
    middle = sum(row["score"] for row in rows) / 2
    assert [row["suspect"] for row in judged(sampler, images, tmp_path / "out", settings=Settings(middle))] == [True, False]
    assert asked == []


def test_what_cannot_be_judged_is_named_with_its_reason_and_costs_no_other(tmp_path, sampler, monkeypatch, caplog):
    images = kept(tmp_path / "set", 6)
    (tmp_path / "set" / "0.txt").unlink()
    (tmp_path / "set" / "1.png").write_bytes((tmp_path / "set" / "1.png").read_bytes()[:100])
    (tmp_path / "set" / "3.txt").write_text("=a cat")
    own = StableDiffusion.encode

    def encode(model, prompts, *sizes, **options):
        if "a cat 2" in prompts:
            raise RuntimeError("out of\nmemory")
        return own(model, prompts, *sizes, **options)

    monkeypatch.setattr(StableDiffusion, "encode", encode)
    found = {row["id"]: row for row in judged(sampler, images, tmp_path / "out", batch_size=8)}
    assert found["0"]["status"].startswith("failed: no prompt: no text beside it")
    assert found["1"]["status"].startswith("failed: image") and "cannot be read" in found["1"]["status"]
    assert found["2"]["status"] == "failed: out of memory"
    assert [found[id]["score"] for id in "012"] == [None] * 3 and [found[id]["suspect"] for id in "012"] == [None] * 3
    assert [found[id]["status"] for id in "345"] == ["ok"] * 3
    written = table(tmp_path / "out")
    assert [row["status"] for row in written[:3]] == ["ok"] * 3 and {row["id"] for row in written[3:]} == {"0", "1", "2"}
    assert next(row["prompt"] for row in written if row["id"] == "3") == "'=a cat"
    page = (tmp_path / "out" / "judge.html").read_text()
    assert "3 could not be judged" in page and "out of memory" in page
    monkeypatch.setattr(StableDiffusion, "encode", own)
    again = {row["id"]: row for row in judged(sampler, images, tmp_path / "out")}
    assert again["2"]["status"] == "ok" and again["3"] == found["3"]


def test_pictures_that_were_scaled_are_told(tmp_path, sampler, caplog):
    height, width = sampler.size()
    images = kept(tmp_path / "set", 3, sizes=((width, height), (width // 2, height), (width // 2, height // 2)))
    judged(sampler, images, tmp_path / "own")
    assert "1 pictures are judged in less than half of the pixels" in caplog.text
    caplog.clear()
    judged(sampler, images, tmp_path / "all", settings=Settings(height=height // 2, width=width // 2))
    assert "3 pictures are judged in less than half of the pixels" in caplog.text
    caplog.clear()
    larger = kept(tmp_path / "larger", 3, sizes=((width, height), (width * 2, height * 2), (width, height * 3 // 2)))
    judged(sampler, larger, tmp_path / "larger-out")
    assert "1 pictures are judged in less than half" in caplog.text and "more than 1.5 times as many" in caplog.text
    caplog.clear()
    judged(sampler, larger, tmp_path / "usual", settings=Settings(usual=(2 * height, 2 * width)))
    assert f"2 pictures are judged in less than half of the pixels that the model makes, {2 * height} x" in caplog.text


def test_a_run_goes_on_under_another_path_of_its_model(tmp_path, sampler, asked):
    images = kept(tmp_path / "set", 2)
    judge(sampler, images, tmp_path / "out", Settings(batch_size=2), "models/small", shard=(0, 2), progress=False)
    judge(sampler, images, tmp_path / "out", Settings(batch_size=2), "../models/small/", progress=False)
    asked.clear()
    judge(sampler, images, tmp_path / "out", Settings(batch_size=2), "small", progress=False)
    assert asked == []


def test_a_score_that_is_not_finite_is_suspect_and_comes_first(tmp_path, sampler, monkeypatch):
    own = basin_score.scores

    def scores(predict, probe, latents, seeds, probes):
        found = own(predict, probe, latents, seeds, probes)
        return torch.where(latents.mean(dim=(1, 2, 3)) == latents.mean(dim=(1, 2, 3)).min(), torch.nan, found)

    monkeypatch.setattr(basin_score, "scores", scores)
    rows = judged(sampler, kept(tmp_path / "set", 3, sizes=((16, 16),)), tmp_path / "out", batch_size=4)
    assert [row["score"] is None for row in rows] == [True, False, False] and rows[0]["suspect"] is True
    assert rows[0]["status"] == "failed: its score is not finite" and table(tmp_path / "out")[0]["suspect"] == "True"


def test_the_page_shows_the_worst_alone_and_counts_all(tmp_path, sampler, monkeypatch):
    monkeypatch.setattr(module, "SHOWN", 2)
    rows = judged(sampler, kept(tmp_path / "set"), tmp_path / "out", settings=Settings(-1e9), batch_size=1)
    page = (tmp_path / "out" / "judge.html").read_text()
    assert [page.index(row["prompt"]) for row in rows[:2]] == sorted(page.index(row["prompt"]) for row in rows[:2])
    assert all(row["prompt"] not in page for row in rows[2:]) and "2 pictures are shown" in page
    assert "5 of 5 pictures look like copies" in page


def test_the_histogram_counts_every_score_once_and_divides_at_the_threshold():
    scores = [-3.0, 0.04, 0.25, 0.2501, 0.95, 9.0]
    found = bars(scores, threshold=0.25)
    assert sum(bar["count"] for bar in found) == len(scores) and found[0]["count"] == found[-1]["count"] == 1
    assert sum(bar["count"] for bar in found if bar["suspect"]) == sum(score > 0.25 for score in scores)
    assert next(bar["low"] for bar in found if bar["suspect"]) == 0.25
    assert max(bar["height"] for bar in found) == 1 and all(bar["height"] == 0 for bar in found if not bar["count"])


def test_the_bar_knows_its_total(tmp_path, sampler, capsys):
    images = kept(tmp_path / "set", 5)
    judged(sampler, images, tmp_path / "out", progress=True)
    judged(sampler, images, tmp_path / "part", progress=True, shard=(1, 2))
    shown = capsys.readouterr().err
    assert "5/5" in shown and "2/2" in shown
