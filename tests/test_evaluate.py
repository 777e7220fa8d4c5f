"""The evaluation: the prompts it reads, its resumption, its table, and what the analysis makes of a sweep."""

import csv
import json
from dataclasses import replace

import pytest
from basinescape import Calibration, Sampler
from basinescape.bench import scenario as scenarios
from basinescape.bench.evaluation.analyze import edges, starting_at
from basinescape.bench.evaluation.evaluate import evaluate, table
from basinescape.bench.scenario import PRESETS, Scenario, prompts, read_prompts
from PIL import Image

TINY = replace(PRESETS["tiny"], steps=4)


def test_prompts_are_read_in_the_layouts_their_authors_publish(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": ["first", "second"], "b.png": "only"}))
    assert [(p.id, p.text) for p in read_prompts(tmp_path / "captions.json")] == [("a", "first"), ("b", "only")]
    (tmp_path / "list.jsonl").write_text('{"caption": "x", "image": "a.png"}\n\n{"prompt": "y", "id": "why"}\n')
    found = read_prompts(tmp_path / "list.jsonl")
    assert [(p.id, p.text, p.image) for p in found] == [("0000", "x", tmp_path / "a.png"), ("why", "y", None)]
    (tmp_path / "a.txt").write_text("from a file\n")
    assert [p.text for p in read_prompts(tmp_path)] == ["from a file", tmp_path.name.replace("_", " ")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"captain": "x"}', "neither caption nor prompt"),
        ('{"caption": "x", "image": "gone.png"}', "gone.png"),
        ("", "no prompts"),
    ],
)
def test_a_broken_prompt_list_is_named(tmp_path, content, says):
    (tmp_path / "list.jsonl").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        read_prompts(tmp_path / "list.jsonl")


def test_a_missing_scenario_says_where_its_data_is_published():
    with pytest.raises(FileNotFoundError, match="their authors publish them: https://"):
        prompts(PRESETS["4"])
    with pytest.raises(ValueError, match="scenario must be one of 1, 2, 3, 4, tiny"):
        scenarios.load("5")


def test_a_scenario_of_ones_own(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"caption": "x"}')
    (tmp_path / "mine.yaml").write_text("model: owner/name\nmemorized: list.jsonl\nsteps: 7\n")
    expected = Scenario("mine", "owner/name", str(tmp_path / "list.jsonl"), steps=7)
    assert scenarios.load(str(tmp_path / "mine.yaml")) == expected
    (tmp_path / "mine.yaml").write_text("model: owner/name\nmemorized: list.jsonl\nstep: 7\n")
    with pytest.raises(ValueError, match="step"):
        scenarios.load(str(tmp_path / "mine.yaml"))


def test_a_killed_evaluation_goes_on_and_gives_the_same_table(tmp_path):
    whole = evaluate(TINY, ["cfg", "delayed-at"], tmp_path / "a", seeds=1, limit=2, batch_size=2, progress=False)
    evaluate(TINY, ["cfg"], tmp_path / "b", seeds=1, limit=2, batch_size=2, progress=False)
    lines = (tmp_path / "b" / "results.jsonl").read_text().splitlines()
    (tmp_path / "b" / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:25])  # cut off in a line
    (gone := next((tmp_path / "b" / "images").glob("*/*.png"))).unlink()
    again = evaluate(TINY, ["cfg", "delayed-at"], tmp_path / "b", seeds=1, limit=2, batch_size=2, progress=False)
    assert gone.is_file() and len([json.loads(line) for line in (tmp_path / "b" / "results.jsonl").open()]) == 8
    untimed = [[{**row, "seconds": None} for row in rows] for rows in (whole, again)]
    assert sorted(untimed[0], key=str) == sorted(untimed[1], key=str)
    stored = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()]
    with (tmp_path / "a" / "table.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in table(stored)] == kept
    assert len(list((tmp_path / "a" / "images").glob("*/*.png"))) == len(stored) == 8
    with pytest.raises(ValueError, match="another run"):
        evaluate(TINY, ["cfg"], tmp_path / "a", seeds=2, limit=2, batch_size=2, progress=False)


def test_a_guard_is_evaluated_with_what_it_says_of_its_images(tmp_path):
    """On seeds counted up from another one; a copy that is marked suspect is not published unknowingly."""
    sampler = Sampler.from_pretrained(Sampler.model_path("tiny"), "cpu", "float32", TINY.scheduler)
    ordinary = [prompt.text for prompt in prompts(TINY)["general"][:4]]
    Calibration.measure(sampler, ordinary, steps=TINY.steps, progress=False).save(tmp_path / "c.json")
    scenario = replace(TINY, calibration=str(tmp_path / "c.json"))
    evaluate(scenario, ["guard"], tmp_path / "run", seeds=2, limit=2, first_seed=7, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert sorted({line["seed"] for line in lines}) == [7, 8] and len(lines) == 8
    assert all(line["attempts"] >= 1 and line["score"] > 0 and line["suspect"] in (True, False) for line in lines)
    marked = [
        line | {"memorized": copy, "suspect": suspect} for line, copy, suspect in zip(lines, COPIES, SUSPECTS, strict=True)
    ]
    rows = table([line | {"group": "memorized"} for line in marked])
    assert [(row["suspect_share"], row["unmarked_copies"]) for row in rows] == [(0.5, 0.25)]


COPIES = [True, True, True, True, False, False, False, False]
SUSPECTS = [True, True, False, False, True, True, False, False]


def test_edges_are_the_first_onsets_after_the_last_copy():
    rows = [
        {"id": "x", "seed": 0, "onset": onset, "memorized": memorized}
        for onset, memorized in [(0, True), (2, False), (4, True), (6, False), (8, False)]
    ]
    always = [{"id": "y", "seed": 0, "onset": onset, "memorized": True} for onset in (0, 2, 4, 6, 8)]
    never = [{"id": "z", "seed": 0, "onset": onset, "memorized": False} for onset in (0, 2, 4, 6, 8)]
    assert edges(rows + always + never) == {("x", 0): 6, ("y", 0): 9, ("z", 0): 0}


def test_a_sweep_starts_where_it_says():
    weights = starting_at(3, 7.5, 6).weights([900, 700, 500, 300, 100, 0])
    assert [after for _, after in weights] == [0, 0, 0, 7.5, 7.5, 7.5]
