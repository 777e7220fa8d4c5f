"""The evaluation: the prompts it reads, its resumption, its table, and what the analysis makes of a sweep."""

import csv
import json
import re
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from basinescape import Calibration, Sampler
from basinescape.bench import cli
from basinescape.bench import scenario as scenarios
from basinescape.bench.commands.evaluation import FIELDS
from basinescape.bench.evaluation.analyze import analyze
from basinescape.bench.evaluation.detection import SIZE, anisotropy, detection
from basinescape.bench.evaluation.evaluate import evaluate, table
from basinescape.bench.evaluation.measure import Measure, ScenarioImages
from basinescape.bench.evaluation.trajectories import Laboratory
from basinescape.bench.scenario import PRESETS, Prompt, Scenario, prompts
from basinescape.data.captions import read_captions
from families import CASES
from PIL import Image

pytestmark = pytest.mark.shipped
TINY = replace(PRESETS["tiny"], steps=4)


def test_prompts_are_read_in_the_layouts_their_authors_publish(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": ["first", "second"], "b.png": "only"}))
    assert [(p.id, p.text) for p in read_captions(tmp_path / "captions.json")] == [("a", "first"), ("b", "only")]
    (tmp_path / "list.jsonl").write_text('{"caption": "x", "image": "a.png"}\n\n{"prompt": "y", "id": "why"}\n')
    found = read_captions(tmp_path / "list.jsonl")
    assert [(p.id, p.text, p.image) for p in found] == [("0000", "x", tmp_path / "a.png"), ("why", "y", None)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"from {name}'s file\n")
    assert [p.text for p in read_captions(tmp_path)] == ["from a's file", "from b's file"]
    (tmp_path / "list.csv").write_text('id,text,image,concept\nb,"x, y",,cat\nz,w,a.png,\n')
    found = read_captions(tmp_path / "list.csv")
    assert [(p.id, p.text, p.image, p.concept) for p in found] == [
        ("b", "x, y", None, "cat"),
        ("z", "w", tmp_path / "a.png", None),
    ]
    assert [p.image for p in read_captions(tmp_path / "list.csv", images=tmp_path)] == [tmp_path / "b.png", tmp_path / "a.png"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "of a data set"}\n')
    assert [(p.text, p.image) for p in read_captions(tmp_path)] == [("of a data set", tmp_path / "b.png")]
    (tmp_path / "list.json").write_text('[{"prompt": "p", "id": 3}]')
    assert [(p.id, p.text) for p in read_captions(tmp_path / "list.json")] == [("3", "p")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"captain": "x"}', "needs prompt, caption or text; it has captain"),
        ('{"caption": "x", "image": "gone.png"}', "gone.png"),
        ("", "no prompts"),
        ('{"caption": "x"}\n{"capt', "line 2: not JSON"),
        ('["x"]', "must be an object"),
        ('{"caption": " "}', "empty caption"),
        ('{"caption": "x", "id": "../x"}', "id must be"),
        ('{"caption": "x", "id": "a"}\n{"caption": "y", "id": "A"}', "comes twice"),
    ],
)
def test_a_broken_prompt_list_is_named(tmp_path, content, says):
    (tmp_path / "list.jsonl").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        read_captions(tmp_path / "list.jsonl")


def test_a_missing_scenario_says_where_its_data_is_published():
    with pytest.raises(FileNotFoundError, match="their authors publish them: https://"):
        prompts(PRESETS["4"])
    with pytest.raises(ValueError, match="scenario must be one of 1, 2, 3, 4, tiny"):
        scenarios.load("5")


def test_a_scenario_of_ones_own(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"caption": "x"}')
    (tmp_path / "mine.yaml").write_text("model: owner/name\nmemorized: list.jsonl\nsteps: 7\nsimilarity: pixels\n")
    expected = Scenario("mine", "owner/name", str(tmp_path / "list.jsonl"), steps=7, similarity="pixels", threshold=0.81)
    assert scenarios.load(str(tmp_path / "mine.yaml")) == expected
    assert all(re.search(rf"\b{field.name}\b", FIELDS) for field in fields(Scenario))
    for text, says in (
        ("model: owner/name\nmemorized: list.jsonl\nstep: 7\n", "it has model, memorized, step$"),
        ("model: owner/name\n", "must give model and memorized"),
        ("a: [", "is not YAML"),
        ('model: m\nmemorized: p\nsteps: "3"\n', "steps must be of type int, got '3'"),
        ("model: m\nmemorized: p\noptions: 5\n", "options must be of type dict, got 5"),
        ("model:\nmemorized: p\n", "model must be of type str, got None"),
        ("model: m\nmemorized: p\nsimilarity: lpips\n", "similarity must be among pixels, sscd, dino, clip; got 'lpips'"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=says):
            scenarios.load(str(tmp_path / "mine.yaml"))


def test_options_make_a_scenario_or_change_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "p.jsonl").write_text('{"caption": "x"}')
    made = scenarios.load(model="model", memorized="p.jsonl", steps=9, similarity="sscd")
    paths = str(tmp_path / "model"), str(tmp_path / "p.jsonl")  # whole: a report finds them from anywhere
    assert made == Scenario("model", *paths, steps=9, similarity="sscd", threshold=0.5) and made.calibration is None
    calibration = replace(Calibration.load("tiny"), steps=40, scale=6.0)
    calibration.save(tmp_path / "model" / "calibration.json")
    found = scenarios.load(model="model", memorized="p.jsonl")  # sampled as the guard was calibrated
    assert found.calibration == str(tmp_path / "model" / "calibration.json")
    assert (found.steps, found.scale, found.transition) == (40, 6.0, calibration.baseline.transition)
    assert scenarios.load(model="model", memorized="p.jsonl", steps=9).steps == 9
    tiny = scenarios.load()
    assert len(prompts(scenarios.load("tiny", memorized="p.jsonl"))["memorized"]) == 1
    assert tiny == PRESETS["tiny"] and scenarios.load("tiny", transition=560.0) == replace(tiny, transition=560.0)
    assert scenarios.load(steps=20).steps == 20 and scenarios.load(similarity="sscd").threshold == 0.5
    for there, name in ((True, "sscd"), (False, "pixels")):
        monkeypatch.setattr(scenarios, "installed", lambda measure, there=there: there)
        assert scenarios.load(model="model", memorized="p.jsonl").similarity == name
    with pytest.raises(ValueError, match="model and prompts must be given together"):
        scenarios.load(model="model")


def test_general_prompts_do_not_take_the_files_of_others(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"caption": "{name}"}}')
    found = prompts(Scenario("x", "m", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))
    assert [(p.id, p.text) for group in found.values() for p in group] == [("0000", "a"), ("general-0000", "b")]


def noise_image(seed, size=(32, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_an_image_is_compared_with_its_own_training_image_and_with_any_other(tmp_path):
    for seed, size in enumerate([(32, 32), (48, 64), (32, 32)]):
        noise_image(seed, size).save(tmp_path / f"{seed}.png")
    own = [Prompt("a", "a", tmp_path / "0.png"), Prompt("b", "b", tmp_path / "1.png")]
    measure = ScenarioImages("pixels", {"memorized": own}, [tmp_path / "2.png", tmp_path / "0.png"], tmp_path)
    likely, without = measure([noise_image(2), noise_image(1, (48, 64))], [own[0], Prompt("g", "g")])
    assert likely["nearest"] == "2.png" and likely["nearest_similarity"] > 0.99 > 0.5 > likely["similarity"]
    assert without["nearest"] == "b" and without["similarity"] == without["nearest_similarity"] > 0.99
    (tmp_path / "p.jsonl").write_text('{"caption": "a", "id": "a", "image": "0.png"}')
    scenario = Scenario("x", "m", str(tmp_path / "p.jsonl"), images=str(tmp_path), similarity="pixels")
    groups = prompts(scenario)
    (row,) = Measure(scenario, groups)([noise_image(2)], groups["memorized"])
    assert row["memorized"] and row["nearest"] == "2.png" and row["similarity"] < 0.5 < row["nearest_similarity"]
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"bad.png' cannot be read"):
        Measure(scenario, groups)


@pytest.fixture(scope="module")
def own_model(random_pipeline, tmp_path_factory):
    """A folder with a small model of random weights, 32 x 32 pixels, that nothing here knows."""
    folder = tmp_path_factory.mktemp("own") / "my-model"
    random_pipeline("sd", 8, "epsilon").save_pretrained(folder)
    return folder


def test_what_a_scenario_leaves_open_is_as_calibrated_else_the_models_own(own_model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"caption": "x"}')
    given = {"model": str(own_model), "memorized": str(tmp_path / "p.jsonl")}
    open_still = scenarios.load(**given)
    with pytest.raises(ValueError, match="leaves steps, scale or transition open"):
        _ = open_still.how
    scenario, sampler = scenarios.loaded(open_still, "cpu", "float32")
    assert scenario.how == (50, 7.5, 500.0) and sampler.size() == (32, 32)  # of diffusers' own call
    assert type(sampler.scheduler) is type(Sampler.from_pretrained(own_model, "cpu", "float32").scheduler)

    settings = {"scheduler": {"class": "EulerDiscreteScheduler"}, "size": [40, 32], "options": {"clip_skip": 1}}
    Calibration(settings, 9, 3.0, (), (), (0.1,), ((),)).save(tmp_path / "c.json")
    given["calibration"] = str(tmp_path / "c.json")
    scenario, sampler = scenarios.loaded(scenarios.load(**given), "cpu", "float32")
    assert (scenario.how, sampler.size(), sampler.options) == ((9, 3.0, 500.0), (40, 32), {"clip_skip": 1})
    assert type(sampler.scheduler).__name__ == "EulerDiscreteScheduler"
    scenario, sampler = scenarios.loaded(
        scenarios.load(**given, steps=5, scheduler="ddim", options={"height": 32}), "cpu", "float32"
    )
    assert scenario.how == (5, 3.0, 500.0) and sampler.size() == (32, 32) and "DDIM" in type(sampler.scheduler).__name__


def run(monkeypatch, capsys, *arguments):
    """Exit code, standard output and error of `basinescape`."""
    monkeypatch.setattr(sys, "argv", ["basinescape", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, *capsys.readouterr()


BROKEN = """
def method(sampler, prompts, seeds, steps):
    if "b" in prompts:
        raise KeyError("b")
    from basinescape import Guidance
    return sampler(prompts, seeds, steps, Guidance.cfg(2.0), progress=False)
"""


def test_a_model_and_captions_of_ones_own(own_model, tmp_path, monkeypatch, capsys):
    """Without images and concepts first, then with a folder of images; a method that fails loses no other's image."""
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "mine.py").write_text(BROKEN)
    asked = ("evaluate", "--model", own_model, "--prompts", tmp_path / "p.jsonl", "--steps", 3, "--seeds", 1, "--no-progress")
    code, out, error = run(monkeypatch, capsys, *asked, "--out", tmp_path / "run")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:5]] == ["cfg", "delayed-at", "opposite-at", "guard"]
    assert "Copies were not counted" in out and max(map(len, out.splitlines())) <= 80
    assert "methods: cfg, delayed-at, opposite-at, guard\n" in error
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").open()]
    assert {line["memorized"] for line in lines} == {line["concept_ok"] for line in lines} == {None}
    assert run(monkeypatch, capsys, "report", tmp_path / "run", "--out", tmp_path / "page.html")[0] == 0

    (tmp_path / "images").mkdir()
    (tmp_path / "empty").mkdir()
    source = tmp_path / "run" / "images" / "cfg" / "0000-0.png"
    (tmp_path / "images" / "0001.png").write_bytes(source.read_bytes())  # what the other caption's image will be
    methods = ("--images", tmp_path / "images", "--similarity", "pixels", "--methods", f"cfg,{tmp_path / 'mine.py'}:method")
    code, out, error = run(monkeypatch, capsys, *asked, *methods, "--out", tmp_path / "again")
    assert code == 1 and "1 images failed, the last of them: KeyError: 'b' (method mine.method, prompt 0001, seed 0)" in error
    words = " ".join(out.split())
    assert "Shares of 1 image cannot tell methods apart" in words and "95% interval of the share" in words
    assert "A copy: similarity (pixels) to a training image above 0.81, measured on tiny" in words
    lines = {(line["method"], line["id"]): line for line in map(json.loads, (tmp_path / "again" / "results.jsonl").open())}
    assert lines.keys() == {("cfg", "0000"), ("cfg", "0001"), ("mine.method", "0000")}
    assert (lines["cfg", "0000"]["nearest"], lines["cfg", "0000"]["memorized"]) == ("0001", True)
    (tmp_path / "mine.py").write_text(BROKEN.replace('"b" in', "False and").replace("2.0", "3.0"))
    assert run(monkeypatch, capsys, *asked, *methods, "--out", tmp_path / "again")[0] == 0
    own = [line for line in map(json.loads, (tmp_path / "again" / "results.jsonl").open()) if "digest" in line]
    assert len({line["digest"] for line in own}) == 1  # the image that the earlier file made is made again
    assert [len(line["noise_gap"]) for line in own] == [3, 3]
    CASES["wan"].make(None).save_pretrained(videos := tmp_path / "videos")
    for options, says in (
        (("--methods", "guard-calibrated"), "'guard-calibrated', which needs a calibration"),
        (("--methods", "shape-nope"), "must be all, FILE.py:NAME, or among cfg"),
        (("--similarity", "lpips"), "similarity must be among"),
        (("--images", tmp_path / "none"), "does not exist"),
        (("--images", tmp_path / "empty"), "holds no picture"),
        (("--images", tmp_path / "images", "--threshold", 5), "threshold must be between 0 and 1"),
        (("--scheduler", "nope"), "scheduler must be own"),
        (("--methods", ""), "methods must name at least one"),
        (("--first-seed", -1), "first_seed must be a whole number of at least 0"),
        (("--model", videos), "makes videos, and scenarios compare pictures"),
    ):
        code, _, error = run(monkeypatch, capsys, *asked, *options, "--out", tmp_path / "bad")
        assert code == 2 and says in error and not (tmp_path / "bad").exists()


def test_a_method_that_does_not_suit_is_named_before_any_work(tmp_path, caplog):
    scenario = TINY
    with pytest.raises(ValueError, match="method 'guard-calibrated': the guard's early look is calibrated for 50 steps"):
        evaluate(scenario, ["cfg", "guard-calibrated"], tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("images", "general"), [(True, False), (False, True)])
def test_an_analysis_needs_neither_concepts_nor_images_nor_general_prompts(own_model, tmp_path, caplog, images, general):
    noise_image(0).save(tmp_path / "0000.png")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    given = {"images": str(tmp_path)} if images else {}
    given |= {"general": str(tmp_path / "p.jsonl")} if general else {}
    scenario = scenarios.load(model=str(own_model), memorized=str(tmp_path / "p.jsonl"), steps=4, similarity="pixels", **given)
    summary = analyze(scenario, tmp_path / "out", 1, 1, onsets=(0, 2), progress=False)
    assert bool(summary["onset"]) == bool(summary["agreement"]) == images and bool(summary["detection"]) == general
    assert all(row["concept"] is None for row in summary["onset"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["prompts"]["memorized"] == 1
    assert ("no general prompts" in caplog.text) == images and ("no training images" in caplog.text) == general


def test_the_noise_alone_is_scored_by_two_pairs_of_predictions(random_pipeline):
    pipe = random_pipeline("sd", 8, "epsilon")
    sampler = Sampler.from_pipeline(pipe, "ddim")
    (row,) = anisotropy(Laboratory(sampler, 10, 7.5, None, progress=False), [Prompt("a", "a cat")], [5])
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    uncond, cond = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("", "a cat"))
    pipe.scheduler.set_timesteps(10)
    with torch.no_grad():
        (u, c), (low_u, low_c) = (
            [pipe.unet(noise, pipe.scheduler.timesteps[k], states).sample for states in (uncond, cond)] for k in (0, -3)
        )
    norm, cosine = ((c - u).norm() * (SIZE / 256) ** 0.5).item(), F.cosine_similarity(low_u, low_c - low_u, dim=1).mean().item()
    assert row == pytest.approx({"norm": norm, "cosine": cosine, "both": norm + 2 * cosine}, rel=1e-3, abs=1e-4)


def test_statistics_of_whole_runs_are_of_gaps_in_what_is_usual():
    lines = [
        {**dict.fromkeys(("gap", "relative", "alignment", "update"), gaps), "turn": turn, "score": score}
        for gaps, turn, score in (
            ([6.0, 1, 1, 1, 1, 1, 1, 1, 1, 2.0], 1.0, 0.9),
            ([4.0, 1, 1, 1, 1, 1, 1, 1, 1, 4.0], 2.0, 0.1),
        )
    ]
    alone = [{"norm": 1.0, "cosine": 0.1, "both": 2.0}, {"norm": 2.0, "cosine": 0.2, "both": 1.0}]
    found = detection(lines, [True, False], [2.0] * 10, alone)
    rows = {(row["statistic"], row["steps"]): row for row in found}
    assert {
        name: (rows[name]["auc"], rows[name]["network_calls"]) for name in rows if name[0] not in ("relative", "update")
    } == {
        ("gap", 1): (1.0, 2),
        ("gap", 5): (1.0, 10),
        ("alignment", 1): (1.0, 2),
        ("alignment", 5): (1.0, 10),
        ("product", 10): (0.0, 20),  # 3 * 1 below 2 * 2
        ("last", 10): (0.0, 20),
        ("collapse", 10): (0.0, 20),  # 6 * 2 below 4 * 4
        ("largest", 10): (1.0, 20),  # 3 above 2
        ("turn", 2): (0.0, 4),
        ("basin score", 10): (1.0, 24),
        ("noise alone, norm", 1): (0.0, 2),
        ("noise alone, cosine", 1): (0.0, 2),
        ("noise alone, both", 1): (1.0, 4),
    }


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


COPIES = [True, True, True, True, False, False, False, False]
SUSPECTS = [True, True, False, False, True, True, False, False]


def test_a_guard_is_evaluated_with_what_it_says_of_its_images(tmp_path):
    """On seeds counted up from another one; a copy that is marked suspect is not published unknowingly."""
    evaluate(TINY, ["guard"], tmp_path / "run", seeds=2, limit=2, first_seed=7, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert sorted({line["seed"] for line in lines}) == [7, 8] and len(lines) == 8
    assert all(line["attempts"] >= 1 and line["suspect"] == (not line["score"] <= 0.3) for line in lines)
    assert all(line["network_calls"] >= 2 * TINY.steps + 4 for line in lines)
    marked = [
        line | {"memorized": copy, "suspect": suspect} for line, copy, suspect in zip(lines, COPIES, SUSPECTS, strict=True)
    ]
    rows = table([line | {"group": "memorized"} for line in marked])
    assert [(row["suspect_share"], row["unmarked_copies"]) for row in rows] == [(0.5, 0.25)]
