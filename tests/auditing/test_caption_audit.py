"""An audit: captions ranked by their first steps, the worst sampled and judged, with training images and without."""

import csv
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from auditruns import rows_of, run
from basinescape import Calibration, Sampler
from basinescape.auditing.caption_audit import Settings, audit
from basinescape.bench.scenario import PRESETS, prompts
from basinescape.data.captions import Prompt
from basinescape.data.pictures import pixels
from PIL import Image
from scipy.stats import binomtest

pytestmark = pytest.mark.shipped
TINY = prompts(PRESETS["tiny"])


@pytest.fixture
def sampler(pipe):
    return Sampler.from_pipeline(pipe, "dpmsolver++")


GAP = (4.0, 3.0, 2.0, 1.0)  # usual in the steps of a pretended run


@pytest.fixture
def pretended(monkeypatch):
    """Runs whose gaps are GAP times what the text says, or 1; of a text that says "bad" they fail. What was asked is kept."""
    runs = []

    def sampled(self, prompts, seeds, steps, guidance, stop_after, **options):
        if "bad" in prompts:
            raise RuntimeError("a tokenizer\nis lost")
        runs.append((list(prompts), list(seeds), steps, stop_after))
        times = torch.tensor([float(text) if text[0].isdigit() else 1.0 for text in prompts])
        gaps = torch.tensor(GAP) * times[:, None]
        gaps[:, stop_after:] = torch.nan
        return SimpleNamespace(noise_gap=gaps, truncated=["" if len(text) < 9 else text[9:] for text in prompts])

    monkeypatch.setattr(Sampler, "__call__", sampled)
    return runs


def pretend(sampler, texts, out, settings=Settings(), scale=7.5, **options):
    captions = [Prompt(f"c{i}", text) for i, text in enumerate(texts)]
    ordinary = [f"{0.91 + k / 100:.2f}" for k in range(19)]
    settings = replace(settings, steps=4, scale=scale)
    return audit(sampler, captions, out, settings, **{"ordinary": ordinary, "model": "m", "progress": False} | options)


@pytest.mark.parametrize(
    ("captions", "told"),
    [
        ([Prompt("../../escaped", "a")], r"id must be .* got '../../escaped'"),
        ([Prompt("x", "a"), Prompt("X", "b")], "id 'X' comes twice"),
        (["a", " "], "0001 has an empty caption"),
        ([], "captions hold no prompts"),
    ],
)
def test_captions_in_a_list_are_checked_like_those_in_a_file(sampler, tmp_path, pretended, captions, told):
    with pytest.raises(ValueError, match=told):
        audit(sampler, captions, tmp_path / "out", ordinary=["1", "2"], progress=False)
    assert not pretended and not (tmp_path / "out").exists()


def calibration_of(sampler, **changed):
    looks = [0.8 + k / 50 for k in range(19)]
    made = {"settings": {}, "steps": 4, "scale": 7.5, "timesteps": sampler.solver(4).levels, "gap": GAP, "scores": [0.1] * 19}
    return Calibration(**{**made, "first_gaps": [(one,) * 4 for one in looks], **changed})


def test_memorized_captions_come_first(sampler, tmp_path):
    """By the first five of fifty steps, among ordinary captions that are measured here."""
    captions = [prompt for prompt in TINY["memorized"] if prompt.id in ("m00", "m04", "m08")] + TINY["general"][7:10]
    ordinary = [prompt.text for prompt in TINY["general"][20:50]]
    rows = audit(sampler, captions, tmp_path / "out", Settings(0.1, steps=50, scale=7.5), ordinary, model="m", progress=False)
    assert {row["id"] for row in rows[:3]} == {"m00", "m04", "m08"} == {row["id"] for row in rows if row["flagged"]}
    assert [row["p"] for row in rows[:3]] == pytest.approx([1 / 31] * 3, abs=1e-6) and all(
        row["copies"] is None for row in rows
    )


def test_an_audit_without_training_images_judges_by_the_model_alone(asked, tmp_path, monkeypatch, capsys):
    texts = [prompt.text for prompt in (*TINY["memorized"][:2], *TINY["general"][2:4])]
    (captions := tmp_path / "list.txt").write_text("\n".join(texts))
    assert not run(monkeypatch, *asked, "--captions", captions, "--verify", 2, "--seeds", 2)
    said = capsys.readouterr().out
    rows, out = rows_of(tmp_path / "out"), tmp_path / "out"
    suspects = sum(int(row["suspects"]) for row in rows[:2])
    assert f"{suspects} of 4 pictures look like copies, made from 2 of the 2 captions with the largest gaps" in said
    assert {row["caption"] for row in rows[:2]} == set(texts[:2]) and [row["flagged"] for row in rows[:2]] == ["True"] * 2
    for row in rows[:2]:
        assert int(row["n"]) == 2 and float(row["score"]) > 0.3 and row["copies"] == row["copies_low"] == row["nearest"] == ""
        found = binomtest(int(row["suspects"]), 2).proportion_ci(0.95, method="exact")
        assert [float(row["low"]), float(row["high"])] == pytest.approx([found.low, found.high], abs=1e-4)
    assert all(row["n"] == row["score"] == row["low"] == "" for row in rows[2:])
    record = json.loads((out / "audit.json").read_text())
    assert (record["captions"], record["verified"], record["pictures"], record["compared"]) == (4, 2, 4, None)
    assert record["ordinary_source"] == "measured here" and record["weights_sha256"] and record["date"] and record["versions"]
    page = (out / "audit.html").read_text()
    assert page.count("data:image/") == 2 * (1 + 2 * 2)  # what is in mind; pictures and their heat
    assert "no training images here" in page and record["weights_sha256"][:16] in page and record["date"] in page


def test_with_training_images_two_verdicts_stand_side_by_side(asked, images, tmp_path, monkeypatch, capsys):
    """The images of the first two captions are exchanged, so that what comes out is the other one's."""
    texts = [prompt.text for prompt in TINY["memorized"][:2]]
    lines = [{"file_name": "1.png", "text": texts[0]}, {"file_name": "0.png", "text": texts[1]}]
    lines += [{"file_name": "2.png", "text": TINY["general"][2].text}]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = (*asked, "--captions", images, "--verify", 2, "--seeds", 2)
    asked += ("--training-images", images / ".." / images.name)  # the same files by another name count once
    assert not run(monkeypatch, *asked)
    said = capsys.readouterr().out
    rows, out = rows_of(tmp_path / "out"), tmp_path / "out"
    copies = sum(int(row["copies"]) for row in rows[:2])
    assert f"{copies} of 4 pictures are copies of training images, made from 2 of the 2 captions" in said
    own = {"0000": "0.png", "0001": "1.png"}
    assert all(row["nearest"].endswith(own[row["id"]]) for row in rows[:2])
    assert all(int(row["copies"]) >= 1 <= int(row["suspects"]) and row["copies_low"] for row in rows[:2])
    record = json.loads((out / "audit.json").read_text())
    assert record["compared"]["training_images"] == 4 and record["without_caption"] == 1
    page = (out / "audit.html").read_text()
    assert page.count('class="small other"') == 4 and page.count('class="marked"') == 4 and "training images is above" in page
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {"data:"}
    assert "1 training images have no caption here" in page and page.index(rows[0]["caption"]) < page.index(rows[2]["caption"])

    # Training images that are replaced are compared with afresh, and nothing is sampled for it.
    shutil.copy(images / "3.png", images / "0.png")
    monkeypatch.setattr(Sampler, "__call__", lambda *given, **named: pytest.fail("sampled again"))
    assert not run(monkeypatch, *asked)
    copies, before = ({row["id"]: row["copies"] for row in found} for found in (rows_of(out), rows))
    assert copies == {**before, "0000": "0"}
    again = json.loads((out / "audit.json").read_text())
    assert again["compared"]["training_sha256"] != record["compared"]["training_sha256"]


def test_an_audit_that_was_stopped_goes_on_and_one_that_is_done_verifies_more(asked, tmp_path, monkeypatch):
    texts = [TINY["memorized"][0].text, *(prompt.text for prompt in TINY["general"][:3])]
    (captions := tmp_path / "list.txt").write_text("\n".join(texts))
    asked, out = (*asked, "--captions", captions, "--seeds", 2), tmp_path / "out"
    assert not run(monkeypatch, *asked, "--verify", 1)
    rows, pictures = rows_of(out), {path: Image.open(path).copy() for path in sorted(out.rglob("*.png"))}
    (cut := next((out / "heat").iterdir())).write_bytes(cut.read_bytes()[:60])
    next((out / "predictions").iterdir()).unlink()
    lines = (out / "gaps.jsonl").read_text().splitlines(keepends=True)
    (out / "gaps.jsonl").write_text("".join([*lines[:3], lines[3][:9]]))
    calls, sample = [], Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, *a, **o: (calls.append(a[0]), sample(self, *a, **o))[1])
    assert not run(monkeypatch, *asked, "--verify", 1)
    assert [len(texts) for texts in calls] == [1, 1]
    for path, picture in pictures.items():  # in another batch, rounded otherwise
        assert abs(pixels([Image.open(path)]) - pixels([picture])).max() < 0.03
    assert [row["id"] for row in rows_of(out)] == [row["id"] for row in rows]
    calls.clear()
    assert not run(monkeypatch, *asked, "--verify", 2)
    assert [len(texts) for texts in calls] == [2] and rows_of(out)[0]["score"] == rows[0]["score"]


def test_a_folder_of_another_audit_is_refused(sampler, tmp_path, pretended, monkeypatch):
    pretend(sampler, ["1.0", "2.0"], tmp_path / "out")
    asked = len(pretended)
    for changed, says in (
        ({"texts": ["1.0", "3.0"]}, "captions_sha256"),
        ({"ordinary": ["1.0"] * 19}, "ordinary_sha256"),
        ({"scale": 5.0}, "scale"),
        ({"settings": Settings(noises=2)}, "noises"),
        ({"calibration": calibration_of(sampler)}, "ordinary_sha256"),
    ):
        with pytest.raises(ValueError, match=f"its .*{says}"):
            pretend(sampler, **{"texts": ["1.0", "2.0"], "out": tmp_path / "out", **changed})
    bias = sampler.pipe.unet.conv_out.bias
    monkeypatch.setattr(bias, "data", bias.data + 1)
    with pytest.raises(ValueError, match="weights_sha256 differ"):
        pretend(sampler, ["1.0", "2.0"], tmp_path / "out")
    assert len(pretended) == asked


def test_an_audit_goes_on_under_another_path_of_its_model(sampler, tmp_path, pretended):
    rows = pretend(sampler, ["1.0", "2.0"], tmp_path / "out")
    pretended.clear()
    assert pretend(sampler, ["1.0", "2.0"], tmp_path / "out", model="../m/") == rows and not pretended
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"] == "../m/"


def test_ordinary_prompts_are_measured_once_for_a_model_and_its_settings(sampler, tmp_path, pretended, cache):
    """Whatever the captions; what was cut off or belongs to other settings is measured anew."""
    rows = pretend(sampler, ["1.0", "2.0"], tmp_path / "a")
    assert sum(len(one[0]) for one in pretended) == 2 + 19
    (kept,) = cache.rglob("*.jsonl")
    pretended.clear()
    again = pretend(sampler, ["2.0", "1.5", "1.0"], tmp_path / "b")
    assert [one[0] for one in pretended] == [["2.0", "1.5", "1.0"]]
    assert {row["caption"]: row["p"] for row in rows}.items() <= {row["caption"]: row["p"] for row in again}.items()
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:18]) + '{"id": "00')
    pretended.clear()
    pretend(sampler, ["1.0"], tmp_path / "c")
    assert [len(one[0]) for one in pretended] == [1, 1]
    pretended.clear()
    pretend(sampler, ["1.0"], tmp_path / "d", scale=5.0)
    assert sum(len(one[0]) for one in pretended) == 1 + 19 and len(list(cache.rglob("*.jsonl"))) == 2


def test_it_takes_files_as_strings_and_samples_as_calibrated(sampler, tmp_path, pretended, images):
    """A function for people: a file of captions, of prompts, a calibration and a folder of images by their names."""
    (captions := tmp_path / "captions.txt").write_text("1.0\n2.0\n")
    (ordinary := tmp_path / "ordinary.txt").write_text("1.0\n1.1\n1.2\n")
    calibration_of(sampler, scale=6.0, first_gaps=[(1.0,)] * 19).save(tmp_path / "c.json")
    given = {"ordinary": str(ordinary), "calibration": str(tmp_path / "c.json"), "training_images": str(images)}
    rows = audit(sampler, str(captions), str(tmp_path / "out"), Settings(first_steps=2), **given, progress=False)
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert len(rows) == 2 and (record["steps"], record["scale"], record["training_images"]) == (4, 6.0, 4)
    assert sum(len(one[0]) for one in pretended) == 2 + 3  # the calibration has but one first gap


def test_a_caption_that_fails_costs_no_other_and_is_told(sampler, tmp_path, pretended):
    rows = pretend(sampler, ["1.5", "bad", "2.5, and much more than is read", "0.5"], tmp_path / "out")
    assert [(row["id"], row["gap"], row["status"]) for row in rows] == [
        ("c0", 1.5, "ok"),
        ("c3", 0.5, "ok"),
        ("c1", None, "failed: a tokenizer is lost"),
        ("c2", None, "failed: could not convert string to float: '2.5, and much more than is read'"),
    ]
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert record["failed"] == ["c1", "c2"]
    assert "2 captions failed" in (tmp_path / "out" / "audit.html").read_text()
    pretended.clear()  # what failed is tried again; "bad" fails before it is noted
    pretend(sampler, ["1.5", "bad", "2.5, and much more than is read", "0.5"], tmp_path / "out")
    assert [run[0] for run in pretended] == [["2.5, and much more than is read"]]


def test_gaps_that_are_no_numbers_are_a_failure(sampler, tmp_path, pretended):
    rows = pretend(sampler, ["1.0", "1e400"], tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "failed: the noise gaps with seeds [1] are not finite"]


def test_a_caption_that_the_encoder_cuts_off_is_told(sampler, tmp_path, pretended):
    pretend(sampler, ["1.00000000001", "1.0"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["truncated"] == ["c0"]


def test_a_calibration_of_the_same_runs_spares_ordinary_prompts(sampler, tmp_path, pretended, caplog):
    rows = pretend(sampler, ["1.01", "2.0"], tmp_path / "a", calibration=calibration_of(sampler))
    assert "the 19 ordinary prompts are not measured" in caplog.text
    assert [one[0] for one in pretended] == [["1.01", "2.0"]]
    assert [(row["gap"], row["p"]) for row in rows] == [(2.0, 1 / 20), (1.01, (1 + 8) / 20)]
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["ordinary_source"] == "the calibration"


@pytest.mark.parametrize(
    "changed", ["scale", "noises", "first steps", "size", "model", "levels", "bare"], ids=lambda name: f"another {name}"
)
def test_what_was_measured_otherwise_is_measured_again(sampler, tmp_path, pretended, changed):
    """A p-value compares like with like, or it is none."""
    differs = {
        "scale": {"scale": 5.0},
        "first steps": {"first_gaps": [(1.0,)] * 19},
        "size": {"settings": {"size": [128, 128]}},
        "model": {"model": {"unet": {"form": "", "sample": [], "dtype": "float32"}}},
        "levels": {"timesteps": sampler.solver(5).levels[:4]},
        "bare": {"timesteps": (), "gap": (), "first_gaps": [()] * 19},
    }
    settings = Settings(noises=2 if changed == "noises" else 1, first_steps=2)
    known = calibration_of(sampler, **differs.get(changed, {}))
    pretend(sampler, ["1.0", "2.0"], tmp_path / "out", calibration=known, settings=settings)
    assert sum(len(one[0]) for one in pretended) == (2 + 19) * settings.noises
    assert len({seed for one in pretended for seed in one[1]}) == (2 + 19) * settings.noises
    assert {one[3] for one in pretended} == {2}


def test_a_calibration_gives_the_threshold_of_the_basin_score(sampler, tmp_path, pretended):
    """And pictures that fail, as all do here, cost no ranked caption."""
    known = calibration_of(sampler, scores=[k / 100 for k in range(100)], first_gaps=[(1.0,) * 4] * 100)
    options = {"calibration": known, "settings": Settings(verify=1, seeds=3)}
    rows = pretend(sampler, ["1.0", "2.0"], tmp_path / "out", **options)
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert record["threshold"] == known.threshold(0.01) and (record["verified"], record["pictures_failed"]) == (0, 3)
    assert [(row["gap"], row["score"], row["n"]) for row in rows] == [(2.0, None, None), (1.0, None, None)]
    assert "3 pictures failed" in (tmp_path / "out" / "audit.html").read_text()
    few = {**options, "calibration": calibration_of(sampler)}
    with pytest.raises(ValueError, match="19 ordinary pictures cannot tell"):
        pretend(sampler, ["1.0", "2.0"], tmp_path / "few", **few)
    assert not (tmp_path / "few").exists()


def test_the_command_says_what_failed(asked, tmp_path, monkeypatch, capsys, pretended):
    (captions := tmp_path / "list.jsonl").write_text('{"text": "bad"}\n{"text": "a"}')
    assert run(monkeypatch, *asked, "--captions", captions, "--verify", 2) == 1
    error = capsys.readouterr().err
    assert "1 captions failed (0000)" in error and "4 pictures failed" in error


def test_too_few_ordinary_prompts_are_told(sampler, tmp_path, pretended, caplog):
    rows = pretend(sampler, ["3.0"] + ["1.0"] * 29, tmp_path / "out")
    assert not any(row["flagged"] for row in rows) and "19 ordinary prompts are few beside 30 captions" in caplog.text
    assert "fewer than 15 captions" in (tmp_path / "out" / "audit.html").read_text()


def test_ordinary_captions_are_not_flagged(sampler, tmp_path, pretended):
    """Though half of them are above the median."""
    rows = pretend(sampler, [f"{0.92 + k / 100:.2f}" for k in range(17)], tmp_path / "out", settings=Settings(rate=0.05))
    assert not any(row["flagged"] for row in rows)


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", (), "hold no prompts"),
        ('{"text": "a"}', ("--verify", -1), "verify must be"),
        ('{"text": "a"}', ("--first-steps", 11), "first_steps must be 1 to 10"),
        ('{"text": "a"}', ("--noises", 0), "noises must be"),
        ('{"text": "a"}', ("--rate", 0), "rate must be between 0 and 1"),
        ('{"text": "a"}', ("--rate", 1), "rate must be between 0 and 1"),
        ('{"text": "a"}', ("--scale", 1), "scale is 1"),
        ('{"text": "a"}', ("--similarity", "nope", "--verify", 1, "--training-images", "SET"), "similarity must be among"),
        ('{"text": "a"}', ("--training-images", "nowhere", "--verify", 1), "'nowhere' does not exist"),
        ('{"text": "a"}', ("--training-images", "SET"), "verify is 0, so none is made: give --verify N"),
        ('{"text": "a"}', ("--calibration", "missing.json"), "missing.json"),
        ('{"text": "a"}', ("--prompts", "missing.jsonl"), "missing.jsonl"),
        ('{"text": "a"}', ("--prompts", "ONE"), "ordinary must be two prompts at least"),
        ('{"text": "a"}', ("--batch-size", 0), "batch_size must be"),
    ],
)
def test_bad_input_is_one_line_before_any_work(asked, images, tmp_path, monkeypatch, capsys, pretended, text, options, says):
    (captions := tmp_path / "list.jsonl").write_text(text)
    (one := tmp_path / "one.txt").write_text("a cat")
    options = [{"SET": images, "ONE": one}.get(option, option) for option in options]
    assert run(monkeypatch, *asked, "--captions", captions, *options) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1 and not pretended and not (tmp_path / "out").exists()


def test_captions_that_are_wrong_are_passed_over_on_request_and_no_caption_is_a_formula(asked, images, tmp_path, monkeypatch):
    lines = ['{"text": "=1+1", "file_name": "0.png"}', '{"text": "a \\ud83d"}', '{"text": "a cat", "file_name": "gone.png"}']
    lines += ['{"text": "a dog\u2028", "file_name": "1.png"}']
    (images / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (images / "2.tif").write_bytes(b"II*")
    asked += ("--captions", images, "--verify", 1, "--seeds", 1, "--training-images", images)
    assert run(monkeypatch, *asked) == 2 and not (tmp_path / "out").exists()
    assert run(monkeypatch, *asked, "--on-error", "skip") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "audit.csv").open(newline="")))
    assert {row["caption"] for row in rows} == {"'=1+1", "a dog\u2028"} and (tmp_path / "out" / "audit.html").is_file()
