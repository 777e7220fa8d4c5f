"""A folder holds one run: of one model's weights, and of prompts, training images and a calibration as they were."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from basinescape import Sampler
from basinescape.bench.evaluation.evaluate import evaluate
from basinescape.bench.scenario import PRESETS
from bulkruns import QUICK, run, write
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.shipped


@pytest.fixture
def scenario(tmp_path):
    """The small pipeline's, in a folder that a test may change."""
    folder = tmp_path / "my-model"
    shutil.copytree(Sampler.model_path("tiny"), folder)
    files = {"model": str(folder), "memorized": str(folder / "memorized.jsonl"), "images": str(folder / "memorized")}
    return replace(PRESETS["tiny"], general=None, calibration=None, steps=2, **files)


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def weights(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] + torch.ones_like(tensors[name])}, file)


def training_image(folder):
    first, second, *_ = sorted((folder / "memorized").glob("*.*"))
    shutil.copy(second, first)


def another_training_image(folder):
    Image.new("RGB", (64, 64)).save(folder / "memorized" / "zzz.png")


def caption(folder):
    first, *others = (folder / "memorized.jsonl").read_text().splitlines()
    (folder / "memorized.jsonl").write_text("\n".join([first.replace("a ", "the ", 1), *others]) + "\n")


def calibration(folder):
    stored = json.loads((folder / "calibration.json").read_text())
    (folder / "calibration.json").write_text(json.dumps(stored | {"scores": [0.5, *stored["scores"][1:]]}))


def classifier(folder):
    (folder / "classifier" / "config.json").write_text((folder / "classifier" / "config.json").read_text() + "\n")


CHANGES = {
    weights: "weights",
    training_image: "training_images_sha256",
    another_training_image: "training_images_sha256",
    caption: "prompts_sha256",
    calibration: "calibration_sha256",
    classifier: "classifier_sha256",
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_evaluation_of_what_has_changed_under_its_name_is_another(scenario, tmp_path, change):
    if change is calibration:
        scenario = replace(scenario, calibration=str(tmp_path / "my-model" / "calibration.json"))
    asked = {"methods": ["cfg"], "out": tmp_path / "run", "seeds": 1, "limit": 1, "progress": False}
    rows = evaluate(scenario, **asked)
    assert evaluate(scenario, **asked) == rows  # nothing has changed
    before = contents(tmp_path / "run")
    change(tmp_path / "my-model")
    with pytest.raises(ValueError, match=rf"holds another run \(its {CHANGES[change]} differ\)"):
        evaluate(scenario, **asked)
    assert contents(tmp_path / "run") == before


def test_a_line_of_results_that_lacks_something_is_made_again(scenario, tmp_path):
    asked = {"methods": ["cfg"], "out": tmp_path / "run", "seeds": 1, "limit": 2, "progress": False}
    evaluate(scenario, **asked)
    results = tmp_path / "run" / "results.jsonl"
    first, second = map(json.loads, results.read_text().splitlines())
    del first["method"]
    results.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    evaluate(scenario, **asked)
    lines = list(map(json.loads, results.read_text().splitlines()))
    assert lines[0] == second and {line["id"] for line in lines} == {first["id"], second["id"]} and len(lines) == 2


@pytest.mark.parametrize("change", ["replaced", "added", "removed", "renamed"])
def test_a_run_beside_other_training_images_is_another(tmp_path, monkeypatch, capsys, drawn, change):
    """Under the same settings; the manifest names the nearest of them, and would be of both."""
    write(tmp_path / "p.jsonl", 2)
    images = tmp_path / "training"
    images.mkdir()
    for i, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (8, 8), colour).save(images / f"{i}.png")
    asked = ("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", "--training-images", images, *QUICK)
    asked += ("--similarity", "pixels")
    assert run(monkeypatch, capsys, *asked)[0] == run(monkeypatch, capsys, *asked)[0] == 0
    before = contents(tmp_path / "out")
    if change == "replaced":
        shutil.copy(images / "0.png", images / "1.png")
    elif change == "added":
        shutil.copy(images / "0.png", images / "3.png")
    elif change == "removed":
        (images / "1.png").unlink()
    else:
        (images / "1.png").rename(images / "one.png")
    code, error = run(monkeypatch, capsys, *asked)
    assert code == 2 and "holds another run (its training_images differ" in error and contents(tmp_path / "out") == before
