"""The report: one page that holds every image, needs no network, and is not written where a run is missing."""

import base64
import json
import re
import sys
from dataclasses import asdict

import pytest
from basinescape.bench import cli
from basinescape.bench.evaluation.report import report
from basinescape.bench.scenario import Scenario
from PIL import Image

SIMILARITY = {"cfg": {"a": 0.4, "b": 0.95, "c": 0.7, "g": 0.1}, "delayed-at": {"a": 0.3, "b": 0.1, "c": 0.9, "g": 0.2}}
TEXT = {"a": "a boat <script>alert(1)</script>", "b": "a lamp & a chair", "c": "a tree", "g": "a cloud"}


@pytest.fixture
def run(tmp_path):
    """A run of 2 methods, 2 seeds, 3 memorized prompts with training images and 1 general prompt."""
    folder, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    for i, name in enumerate("abc"):
        Image.new("RGB", (8, 8), (i, 0, 255)).save(data / f"{name}.png")
    memorized = [{"id": name, "prompt": TEXT[name], "image": f"{name}.png"} for name in "abc"]
    (data / "memorized.jsonl").write_text("\n".join(map(json.dumps, memorized)))
    lines, shade = [], 0
    for method, similarity in SIMILARITY.items():
        (folder / "images" / method).mkdir(parents=True)
        for name, value in similarity.items():
            for seed in (0, 1):
                shade += 1
                Image.new("RGB", (8, 8), (shade, shade, 0)).save(folder / "images" / method / f"{name}-{seed}.png")
                line = {"id": name, "method": method, "group": "general" if name == "g" else "memorized", "prompt": TEXT[name]}
                line |= {"seed": seed, "similarity": value, "memorized": value > 0.5, "concept_ok": None}
                line |= {"transition_step": 0 if method == "cfg" else 4, "network_calls": 12.0, "seconds": 0.5}
                lines.append(line | ({"noise_gap": [3.0, 1.0, 2.0]} if method == "cfg" else {}))
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scenario = Scenario("small", "some/model", str(data / "memorized.jsonl"), steps=3)
    settings = {"scenario": asdict(scenario), "scheduler": {"class": "DDIMScheduler"}, "dtype": "float32", "device": "cpu"}
    (folder / "run.json").write_text(json.dumps(settings | {"versions": {"torch": "2.13"}}))
    return folder


def page_of(run, tmp_path):
    report([run], tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def embedded(page):
    """The bytes of every embedded PNG, in the order of the page."""
    return [base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_training_images_stand_beside_the_first_seeds_most_similar_first(run, tmp_path):
    rows = [[tmp_path / "data" / f"{name}.png", *(run / "images" / m / f"{name}-0.png" for m in SIMILARITY)] for name in "bca"]
    page = page_of(run, tmp_path)
    assert embedded(page) == [path.read_bytes() for row in rows for path in row]
    assert re.findall(r'data-value="([^"]+)" class="memorized"', page) == ["0.95", "0.7", "0.9"]
    assert 'title="similarity 0.900, transition step 4"' in page


def test_nothing_is_fetched_and_text_stays_text(run, tmp_path):
    page = page_of(run, tmp_path)
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert "@import" not in page and not re.findall(r"url\((?!#)", page)
    assert "<script>alert" not in page and "a boat &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a lamp &amp; a chair" in page


def test_the_table_has_memorized_prompts_first_with_their_interval(run, tmp_path):
    page = page_of(run, tmp_path)
    body = page[page.index('<table class="methods">') : page.index("</table>")]
    cells = [re.findall(r">([^<]*)</t[dh]>", row) for row in body[body.index("<tbody>") :].split("</tr>")[:-1]]
    assert [row[:3] for row in cells] == [[m, g, n] for g, n in (("memorized", "6"), ("general", "2")) for m in SIMILARITY]
    assert cells[0][3] == "0.667 (0.000 to 1.000)"
    assert page.count("<svg") == 1


def test_without_training_images_and_curves_the_rest_is_shown(run, tmp_path):
    (tmp_path / "data" / "b.png").unlink()
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["method"] != "cfg"]
    (run / "results.jsonl").write_text("\n".join(map(json.dumps, kept)))
    page = page_of(run, tmp_path)
    assert embedded(page) == [(run / "images" / "delayed-at" / f"{name}-0.png").read_bytes() for name in "cab"]
    assert "<svg" not in page


def test_large_images_are_shrunk_and_figures_are_not(run, tmp_path):
    Image.new("RGB", (1024, 512)).save(run / "images" / "cfg" / "b-0.png")
    Image.new("RGB", (600, 400)).save(run / "onset <1>.png")
    page = page_of(run, tmp_path)
    assert len(re.findall(r'src="data:image/webp;base64,', page)) == 1
    assert embedded(page)[0] == (run / "onset <1>.png").read_bytes()
    assert "<figcaption>onset &lt;1&gt;.png</figcaption>" in page


@pytest.mark.parametrize("missing", ["run.json", "results.jsonl"])
def test_a_folder_without_a_run_is_named_and_nothing_is_written(run, tmp_path, monkeypatch, capsys, missing):
    other, page = tmp_path / "other", tmp_path / "new" / "page.html"
    other.mkdir()
    for name in {"run.json", "results.jsonl"} - {missing}:
        (other / name).write_bytes((run / name).read_bytes())
    monkeypatch.setattr(sys, "argv", ["basinescape", "report", str(run), str(other), "--out", str(page)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and str(other) in error and missing in error
    assert not page.parent.exists()


def test_runs_that_hold_no_images_are_refused(run, tmp_path):
    (run / "results.jsonl").write_text('{"id": "a", "met')
    with pytest.raises(ValueError, match="holds no image yet"):
        report([run], tmp_path / "page.html")
    (run / "run.json").write_text('{"model": "tiny"}')
    with pytest.raises(ValueError, match="names no scenario"):
        report([run], tmp_path / "page.html")
    assert not list(tmp_path.glob("page*"))
