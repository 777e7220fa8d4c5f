"""An audit: captions in every layout, ranked by their first steps, and each image's nearest training image, wherever it is."""

import csv
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from basinescape import Calibration, Sampler
from basinescape.audit import measures
from basinescape.audit.index import Index
from basinescape.audit.similarity import similarity
from basinescape.bench import cli
from basinescape.bench.evaluation.audit import Settings, audit
from basinescape.bench.scenario import PRESETS, prompts
from basinescape.data.captions import Prompt, read_captions
from basinescape.data.pictures import pixels
from PIL import Image, ImageChops

TINY = prompts(PRESETS["tiny"])


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for i, prompt in enumerate(TINY["memorized"][:4]):
        shutil.copy(prompt.image, folder / f"{i}.png")
    return folder


LAYOUTS = {
    "metadata.jsonl": '{"file_name": "0.png", "text": "one"}\n\n{"file_name": "1.png", "text": "two"}\n',
    "metadata.csv": "file_name,text\n0.png,one\n1.png,two\n",
    "list.jsonl": '{"image": "0.png", "caption": "one"}\n{"path": "1.png", "prompt": "two"}\n',
    "list.csv": 'caption,image\none,0.png\n"two",1.png\n',
    "list.json": '[{"text": "one", "file_name": "0.png"}, {"text": "two", "file_name": "1.png"}]',
    "captions.json": '{"0.png": "one", "1.png": ["two"]}',
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_captions_are_read_in_every_layout(images, name):
    (images / name).write_text(LAYOUTS[name])
    source = images if name.startswith("metadata") else images / name
    read = [(prompt.text, prompt.image) for prompt in read_captions(source, every=True)]
    assert read == [("one", images / "0.png"), ("two", images / "1.png")]


def test_a_folder_has_its_captions_in_text_files(images):
    (images / "sub").mkdir()
    (images / "3.png").rename(images / "sub" / "3.png")
    for path in images.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"of {path.stem}\n")
    assert [(prompt.id, prompt.text) for prompt in read_captions(images)] == [
        ("0", "of 0"),
        ("1", "of 1"),
        ("2", "of 2"),
        ("sub-3", "of 3"),
    ]


def test_captions_of_one_image_and_without_any_keep_apart(images):
    (images / "list.json").write_text('{"0.png": ["one", "uno"]}')
    assert [(prompt.id, prompt.text) for prompt in read_captions(images / "list.json", every=True)] == [
        ("0", "one"),
        ("0-2", "uno"),
    ]
    (images / "list.csv").write_text("text\none\ntwo\n")
    assert [(prompt.id, prompt.image) for prompt in read_captions(images / "list.csv")] == [("0000", None), ("0001", None)]


def test_the_nearest_is_found_anywhere_in_the_set_and_shifted(images):
    paths = sorted(images.glob("*.png"))
    opened = [Image.open(path).convert("RGB") for path in paths]
    noise = Image.fromarray(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy())
    asked = [ImageChops.offset(opened[2], 2, -2), opened[0].resize((256, 256)), noise]
    found = Index(paths, ["pixels"])(asked)
    assert [one.image for one in found[:2]] == [paths[2], paths[0]] and [one.copy for one in found] == [True, True, False]
    fitted = [image.resize((64, 64), Image.Resampling.BOX) for image in asked]
    expected = similarity(pixels(fitted), pixels(opened)).max(dim=1).values
    assert [one.similarity for one in found] == pytest.approx(expected.tolist(), abs=1e-4)


def test_each_measure_has_its_own_threshold_and_the_clearest_speaks(images, monkeypatch):
    """An embedding that takes everything for one thing has the last word only where it is surer."""
    monkeypatch.setitem(measures.EMBEDDINGS, "sscd", lambda: lambda found: torch.ones(len(found), 3).numpy())
    paths = sorted(images.glob("*.png"))
    (one,) = Index(paths, ["pixels", "sscd"])([Image.new("RGB", (8, 8))])
    assert (one.measure, one.copy) == ("sscd", True)
    assert Index(paths, ["pixels", "sscd"]).thresholds == {"pixels": 0.81, "sscd": 0.5}
    (one,) = Index(paths, ["pixels"], threshold=0.999)([Image.open(paths[0]).resize((70, 70))])
    assert not one.copy


def test_memorized_captions_come_first(pipe, tmp_path):
    """By the first five of fifty steps, with the calibration that ships."""
    captions = [prompt for prompt in TINY["memorized"] if prompt.id in ("m00", "m04", "m08")] + TINY["general"][:5]
    sampler = Sampler.from_pipeline(pipe, "dpmsolver++")
    rows = audit(
        sampler, "m", captions, tmp_path / "out", Calibration.load("tiny"), settings=Settings(noises=2), progress=False
    )
    assert {row["id"] for row in rows[:3]} == {"m00", "m04", "m08"}
    assert all(row["flagged"] for row in rows[:2]) and not any(row["flagged"] for row in rows[4:])
    assert all(row["copies"] is None for row in rows)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["basinescape", "audit", "--no-progress", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A copy of the small pipeline under another name, calibrated for five steps."""
    mine = tmp_path_factory.mktemp("models") / "my-model"
    shutil.copytree(Sampler.model_path("tiny"), mine, ignore=shutil.ignore_patterns("calibration.json", "memorized*"))
    sampler = Sampler.from_pretrained(mine, "cpu", "float32", "dpmsolver++")
    ordinary = [prompt.text for prompt in TINY["general"][:6]]
    Calibration.measure(sampler, ordinary, 100, 5, rungs=[], progress=False).save(mine / "calibration.json")
    return mine


def test_an_audit_from_captions_to_pictures_side_by_side(calibrated, images, tmp_path, monkeypatch, capsys):
    """The images of the first two captions are exchanged, so that what comes out is the other one's."""
    texts = [prompt.text for prompt in TINY["memorized"][:2]]
    lines = [{"file_name": "1.png", "text": texts[0]}, {"file_name": "0.png", "text": texts[1]}]
    lines += [{"file_name": f"{i}.png", "text": TINY["general"][i].text} for i in (2, 3)]
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    asked = ("--model", calibrated, "--captions", images, "--out", out, "--scheduler", "dpmsolver++", "--device", "cpu")
    asked += ("--first-steps", 2, "--noises", 2, "--verify", 2, "--seeds", 2, "--similarity", "pixels", "--threshold", 0.5)
    assert not run(monkeypatch, *asked)
    said = capsys.readouterr().out
    assert "4 captions" in said and "of the worst 2, 2 reproduce a training image" in said
    rows = list(csv.DictReader((out / "audit.csv").open()))
    assert {row["id"] for row in rows[:2]} == {"0000", "0001"} and [row["copies"] for row in rows[2:]] == ["", ""]
    own = {"0000": "0.png", "0001": "1.png"}
    assert all(row["nearest"].endswith(own[row["id"]]) and int(row["copies"]) >= 1 for row in rows[:2])
    page = (out / "audit.html").read_text()
    assert page.count("data:image/") >= 4 + 2 * 2 and page.count('class="other"') == 4 and page.count('class="copy"') >= 2
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {"data:"}
    assert page.index(rows[0]["caption"]) < page.index(rows[2]["caption"])

    # What is gone is made again, what is there is not, and the page is the same.
    made = sorted(path.name for path in (out / "images").iterdir())
    (out / "images" / made[0]).unlink()
    with (out / "scores.jsonl").open("r+") as file:
        lines = file.readlines()
        file.seek(0)
        file.truncate()
        file.writelines([*lines[:3], lines[3][:9]])
    calls, sample = [], Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, *a, **o: (calls.append(a[0]), sample(self, *a, **o))[1])
    assert not run(monkeypatch, *asked)
    assert [len(texts) for texts in calls] == [2, 1] and sorted(path.name for path in (out / "images").iterdir()) == made
    again = list(csv.DictReader((out / "audit.csv").open()))
    assert [row["id"] for row in again] == [row["id"] for row in rows]
    assert [float(row["score"]) for row in again] == pytest.approx([float(row["score"]) for row in rows], rel=1e-3)
    assert run(monkeypatch, *asked, "--noises", 3) == 2 and "another run" in capsys.readouterr().err


def test_a_caption_that_fails_costs_no_other(calibrated, monkeypatch, tmp_path):
    calibration = Calibration.load(calibrated / "calibration.json")
    gap = torch.tensor(calibration.rungs[0].gap)

    def sampled(self, prompts, seeds, steps, guidance, **options):
        if "bad" in prompts:
            raise RuntimeError("a tokenizer\nis lost")
        times = torch.tensor([2.0 if text == "b" else 1.0 for text in prompts])
        return SimpleNamespace(noise_gap=gap.expand(len(prompts), -1) * times[:, None])

    captions = [Prompt(text, text) for text in ("a", "bad", "b")]
    sampler = Sampler.from_pretrained(calibrated, "cpu", "float32", "dpmsolver++")
    monkeypatch.setattr(Sampler, "__call__", sampled)
    rows = audit(sampler, "m", captions, tmp_path / "out", calibration, 5, progress=False)
    assert [(row["id"], row["score"], row["status"]) for row in rows] == [
        ("b", 2.0, "ok"),
        ("a", 1.0, "ok"),
        ("bad", None, "failed: a tokenizer is lost"),
    ]


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", (), "hold no prompts"),
        ('{"text": "a"', (), "line 1: not JSON"),
        ('{"captain": "a"}', (), "line 1: needs prompt, caption or text; it has captain"),
        ('{"text": "a", "file_name": "gone.png"}', (), "'gone.png' is not in"),
        ('{"text": "a"}', ("--verify", 1), "no training images"),
        ('{"text": "a"}', ("--verify", -1), "verify must be"),
        ('{"text": "a"}', ("--first-steps", 11), "first_steps must be 1 to 10"),
        ('{"text": "a"}', ("--noises", 0), "noises must be"),
        ('{"text": "a"}', ("--rate", 0), "rate must be between 0 and 1"),
        ('{"text": "a"}', ("--similarity", "nope", "--verify", 1, "--training-images", "SET"), "similarity must be among"),
        ('{"text": "a"}', ("--training-images", "nowhere"), "'nowhere' does not exist"),
        ('{"text": "a"}', ("--calibration", "missing.json"), "missing.json"),
        ('{"text": "a"}', ("--steps", 40), "too far"),
        ('{"text": "a"}', ("--batch-size", 0), "batch_size must be"),
    ],
)
def test_bad_input_is_one_line_before_any_work(calibrated, images, tmp_path, monkeypatch, capsys, drawn, text, options, says):
    (captions := tmp_path / "list.jsonl").write_text(text)
    options = [images if option == "SET" else option for option in options]
    asked = ("--model", calibrated, "--captions", captions, "--out", tmp_path / "out", "--scheduler", "dpmsolver++")
    assert run(monkeypatch, *asked, "--device", "cpu", *options) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1 and not drawn.asked and not (tmp_path / "out").exists()


def test_captions_that_are_wrong_are_passed_over_on_request_and_no_caption_is_a_formula(
    calibrated, images, tmp_path, monkeypatch
):
    lines = ['{"text": "=1+1", "file_name": "0.png"}', '{"text": "a \\ud83d"}', '{"text": "a cat", "file_name": "gone.png"}']
    (images / "metadata.jsonl").write_text(
        "\n".join([*lines, '{"text": "a dog\u2028", "file_name": "1.png"}']), encoding="utf-8"
    )
    (images / "2.tif").write_bytes(b"II*")
    asked = ("--model", calibrated, "--captions", images, "--out", tmp_path / "out", "--scheduler", "dpmsolver++")
    asked += ("--device", "cpu", "--verify", 1, "--seeds", 1, "--similarity", "pixels", "--training-images", images)
    assert run(monkeypatch, *asked) == 2 and not (tmp_path / "out").exists()
    assert run(monkeypatch, *asked, "--on-error", "skip") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "audit.csv").open(newline="")))
    assert {row["caption"] for row in rows} == {"'=1+1", "a dog\u2028"}
    assert (tmp_path / "out" / "audit.html").is_file()


def test_without_a_calibration_it_says_how_to_make_one(mine, tmp_path, monkeypatch, capsys):
    (captions := tmp_path / "list.jsonl").write_text('{"text": "a"}')
    assert run(monkeypatch, "--model", mine, "--captions", captions, "--out", tmp_path / "out") == 2
    assert f"basinescape calibrate --model {mine}" in capsys.readouterr().err


def test_an_image_without_a_caption_is_no_caption(tmp_path):
    """The folder's name is one only where every folder of images is named for what they show."""
    for name in ("tench/a.png", "golf_ball/b.png"):
        (tmp_path / "named" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "named" / name)
    assert [prompt.text for prompt in read_captions(tmp_path / "named")] == ["golf ball", "tench"]
    (tmp_path / "named" / "tench" / "a.txt").write_text("a tench")
    with pytest.raises(ValueError, match=r"1 of 2 images have no caption: put that of 'golf_ball/b\.png' into 'b\.txt'"):
        read_captions(tmp_path / "named")
    with pytest.raises(ValueError, match="1 of 1 images have no caption"):
        read_captions(tmp_path / "named" / "golf_ball")
