"""The report: one page that holds every image, needs no network, and is not written where a run is missing."""

import base64
import csv
import gzip
import json
import re
import shutil
import sys
from dataclasses import asdict
from urllib.parse import unquote

import pytest
from basinescape.bench import cli
from basinescape.bench.evaluation.comparison import Comparison
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
    scenario = Scenario("small", "some/model", str(data / "memorized.jsonl"), steps=3, similarity="pixels", threshold=0.5)
    settings = {"scenario": asdict(scenario), "scheduler": {"class": "DDIMScheduler"}, "dtype": "float32", "device": "cpu"}
    (folder / "run.json").write_text(json.dumps(settings | {"versions": {"torch": "2.13"}}))
    return folder


def page_of(run, tmp_path):
    report([run], tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def embedded(page):
    """The bytes of every embedded PNG, in the order of the page."""
    return [base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def cells(page):
    """The rows of the table of methods, cell by cell, each with whether it is marked."""
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    return [re.findall(r'<t[dh] (?:class="number( best)?[^"]*" )?[^>]*>([^<]*)', row) for row in body.split("</tr>")[:-1]]


def changed(run, **columns):
    """The run's lines with other columns, given as functions of a line."""
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    made = [json.dumps(line | {name: column(line) for name, column in columns.items()}) for line in lines]
    (run / "results.jsonl").write_text("\n".join(made))


def test_captions_come_worst_first_with_their_training_image(run, tmp_path):
    changed(run, similarity=lambda line: line["similarity"] - 0.01 * (line["seed"] == 0))
    rows = [[tmp_path / "data" / f"{name}.png", *(run / "images" / m / f"{name}-1.png" for m in SIMILARITY)] for name in "cba"]
    page = page_of(run, tmp_path)
    assert embedded(page) == [path.read_bytes() for row in rows for path in row]
    assert re.findall(r'<figure class="copy">.*?</b>\s*([0-9.]+)', page) == ["0.70", "0.90", "0.95"]
    assert page.count("2 of 2 copied") == 3 and page.count("none of 2 copied") == 3
    assert re.findall(r'<article data-0="(-?[0-9]+)" data-1="([0-9.]+)"', page) == [
        ("-1", "0.7"),
        ("-2", "0.95"),
        ("-3", "0.4"),
    ]


def test_thousands_of_captions_are_cut_at_the_worst(run, tmp_path, monkeypatch):
    monkeypatch.setattr("basinescape.bench.evaluation.report.SHOWN", 2)
    page = page_of(run, tmp_path)
    assert "The worst 2 of 3." in page and page.count("<article") == 2 and TEXT["c"] in page


def test_nothing_is_fetched_and_text_stays_text(run, tmp_path):
    page = page_of(run, tmp_path)
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert "@import" not in page and not re.findall(r"url\((?!#)", page)
    assert "<script>alert" not in page and "a boat &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a lamp &amp; a chair" in page


def test_groups_stand_side_by_side_and_the_best_of_a_column_is_marked(run, tmp_path):
    concept = {"cfg": "bcg", "delayed-at": "abcg"}
    changed(run, concept_ok=lambda line: line["id"] in concept[line["method"]])
    page = page_of(run, tmp_path)
    assert re.findall(r'colspan="(\d)">([^<]*)<', page) == [("3", "memorized prompts"), ("3", "general prompts")]
    plain, delayed = (
        [("", label), *values]
        for label, values in (
            ("plain guidance", [("", "67%"), ("", "67%"), ("", "12"), ("", "0%"), ("", "100%"), ("", "12")]),
            ("delayed until t = 500", [(" best", "33%"), (" best", "100%"), ("", "12"), ("", "0%"), ("", "100%"), ("", "12")]),
        )
    )
    assert cells(page) == [plain, delayed]
    assert "<small>0% to 100%</small>" in page and page.count("<svg") == 2
    finding = re.search(r'class="finding">([^<]*)<', page)[1]
    assert finding == (
        "On memorized prompts plain guidance copies a training image in 67% of its images, delayed until t = 500 in 33% (95% "
        "interval 0% to 100%), with the concept right in 100% (plain 67%), at 12 network calls an image (plain 12)."
    )
    with (tmp_path / "page.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["memorized: copies"]) for row in rows] == [0.6667, 0.3333]
    assert [float(row["memorized: copies, high"]) for row in rows] == [1.0, 1.0]
    latex = (tmp_path / "page.tex").read_text()
    assert r"delayed until t = 500 & \textbf{33\%} (0\% to 100\%) & \textbf{100\%}" in latex and latex.count(r"\\") == 4
    links = re.findall(r'download="run.(\w+)" href="data:text/plain;charset=utf-8,([^"]*)"', page)
    assert {name: unquote(text) for name, text in links} == {
        "csv": (tmp_path / "page.csv").read_text(),
        "tex": latex,
    }


def test_what_a_guard_did_and_said_is_shown(run, tmp_path):
    judged = {"a": (1, False), "b": (3, True), "c": (2, False), "g": (1, False)}
    changed(
        run,
        attempts=lambda line: judged[line["id"]][0],
        suspect=lambda line: judged[line["id"]][1],
        method=lambda line: {"delayed-at": "guard"}.get(line["method"], line["method"]),
    )
    (run / "images" / "delayed-at").rename(run / "images" / "guard")
    page = page_of(run, tmp_path)
    ladder = "4 of 6 images began again (kept: 2 from attempt 1, 2 from attempt 2, 2 from attempt 3)"
    assert f"Guard, memorized prompts: {ladder}; marked suspect: 2; copies that are not marked: 2." in page
    assert "Guard, general prompts: 0 of 2 images began again; marked suspect: 0" in page
    assert page.count("<em>marked suspect</em>") == 2 and page.count("<em>not marked</em>") == 2
    assert page.count('class=" suspect"') == 1  # the copy that is marked has a copy's frame
    assert {"copies not marked", "marked suspect"} < set(re.findall(r"<button>([^<]*)</button>", page))


def test_a_run_is_read_packed_and_from_another_folder(run, tmp_path, monkeypatch):
    page = page_of(run, tmp_path)
    with gzip.open(run / "results.jsonl.gz", "wb") as file:
        file.write((run / "results.jsonl").read_bytes())
    (run / "results.jsonl").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert page_of(run, tmp_path) == page


def test_a_copy_of_another_training_image_is_shown_beside_it(run, tmp_path):
    changed(
        run, nearest=lambda line: "b" if line["id"] == "c" else line["id"], nearest_similarity=lambda line: line["similarity"]
    )
    page = page_of(run, tmp_path)
    assert re.findall("what ([^<]*) copied: ([^<]*)<", page) == [("plain guidance", "b"), ("delayed until t = 500", "b")]
    data = (tmp_path / "data" / "b.png").read_bytes()
    assert embedded(page).count(data) == 3


def test_without_images_and_curves_the_rest_is_shown(run, tmp_path):
    (tmp_path / "data" / "b.png").unlink()
    shutil.rmtree(run / "images" / "cfg")
    changed(run, **dict.fromkeys(("similarity", "memorized", "noise_gap"), lambda line: None))
    lines = [line for line in (run / "results.jsonl").read_text().splitlines() if json.loads(line)["method"] != "cfg"]
    (run / "results.jsonl").write_text("\n".join(lines))
    page = page_of(run, tmp_path)
    assert embedded(page) == [(run / "images" / "delayed-at" / f"{name}-0.png").read_bytes() for name in "abc"]
    assert "<svg" not in page and "Copies were not counted" in page
    shutil.rmtree(run / "images")
    assert "images are not in its folder" in page_of(run, tmp_path)


def test_large_images_are_shrunk_and_figures_are_not(run, tmp_path):
    Image.new("RGB", (1024, 512)).save(run / "images" / "cfg" / "b-0.png")
    Image.new("RGB", (600, 400)).save(run / "onset <1>.png")
    page = page_of(run, tmp_path)
    assert len(re.findall(r'src="data:image/webp;base64,', page)) == 1
    assert embedded(page)[-1] == (run / "onset <1>.png").read_bytes()
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


def test_few_images_and_the_threshold_are_told_of():
    row = {"method": "cfg", "group": "memorized", "n": 30, "memorized_share": 0.5, "memorized_low": 0.3, "memorized_high": 0.7}
    row |= {"concept_share": None, "suspect_share": 0.0, "unmarked_copies": 0.5, "network_calls": 100.0}
    few, enough = (Comparison.of([row | {"n": n}], 500.0).sure() for n in (29, 30))
    assert "Shares of 29 images cannot tell" in few and "cannot tell" not in enough and "95% interval" in enough
    assert Scenario("x", "m", "p", similarity="sscd", threshold=0.7).copy.endswith("above 0.7, as the scenario says")
    assert "Somepalli" in Scenario("x", "m", "p", similarity="sscd").copy


def test_a_lost_concept_counts_against_a_method():
    """Of methods without copies the one that keeps the concept is the best, not one that keeps none."""
    row = {"group": "memorized", "n": 30, "memorized_share": 0.0, "suspect_share": 0.0, "unmarked_copies": 0.0}
    row |= {"memorized_low": 0.0, "memorized_high": 0.1, "network_calls": 100.0}
    rows = [row | {"method": name, "concept_share": share} for name, share in (("delayed-at", 0.0), ("guard", 0.9))]
    assert Comparison.of(rows, 500.0).best.name == "guard"
