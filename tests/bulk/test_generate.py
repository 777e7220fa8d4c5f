"""A run of generate: its folder, its manifest, and images that are those of the sampler alone."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from basinescape import At, Guard, Guidance, Sampler
from basinescape.bulk.job_plans import Plans
from basinescape.bulk.settings import Recipe
from basinescape.data.merge import merge
from basinescape.data.prompts import Job
from basinescape.guidance.early import EarlyLook
from basinescape.guidance.guard import Attempt
from bulkruns import QUICK, jobs, make, run, sound, write
from PIL import Image
from safetensors.torch import load_file
from smallguards import NONE, guarded


@pytest.fixture(scope="module")
def sampler(pipe):
    return Sampler.from_pipeline(pipe, "dpmsolver++")


def test_a_folder_is_filled_and_refused_to_another_run(tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "a picture of a cat", "id": "cat"}\n{"prompt": "a picture of a frog"}\n')
    arguments = ("--prompts", prompts, "--out", out, "--steps", 3, "--until", 500, "--device", "cpu")
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [(line["id"], line["status"], line["seed"]) for line in lines] == [("cat", "ok", 0), ("0001", "ok", 1)]
    assert sorted(path.name for path in (out / "images").iterdir()) == ["0001.png", "cat.png", "metadata.jsonl"]
    assert json.loads((out / "run.json").read_text())["steps"] == 3
    code, error = run(monkeypatch, capsys, *arguments, "--scale", 3)
    assert code == 2 and "another run" in error


def test_noise_gaps_are_told_in_the_fewest_digits_of_a_float32(sampler, tmp_path):
    make(sampler, jobs(1), tmp_path / "out", steps=4)
    (line,) = sound(tmp_path / "out")
    expected = sampler([line["prompt"]], [line["seed"]], 4, Guidance.cfg(7.5), output="latent", progress=False).noise_gap[0]
    torch.testing.assert_close(torch.tensor(line["noise_gap"]), expected)
    assert all(len(f"{gap}") <= 11 for gap in line["noise_gap"])  # a double that is a float32 has up to 19


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 1)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, "--steps", 2)
    assert code == 2 and "not empty" in error
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_what_was_cut_and_flagged_is_in_the_manifest_and_said_in_a_line(tmp_path, monkeypatch, capsys, drawn):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    write(prompts, 3)
    drawn.flagged, drawn.cut = {1}, {"a picture of a cat 0": "of 1", "a picture of a cat 2": "by night"}
    code, error = run(monkeypatch, capsys, "--prompts", prompts, "--out", out, *QUICK)
    assert code == 0
    assert [line["nsfw_content_detected"] for line in sound(out)] == [False, True, False]
    assert [line.get("truncated") for line in sound(out)] == ["of 1", None, "by night"]
    cut, flagged = error.splitlines()
    assert cut.startswith("2 cut") and "(p0, p2)" in cut and flagged.startswith("1 flagged") and "(p1)" in flagged


def test_negative_prompts_are_the_lines_own_before_the_runs(sampler, drawn, tmp_path):
    asked = [Job("a", "a", 0), Job("b", "b", 1, "blurry"), Job("c", "c", 2), Job("d", "d", 3, "")]
    make(sampler, asked, tmp_path / "none", height=64, width=128, clip_skip=1)
    (call,) = drawn.asked
    assert call["prompts"] == ["a", "b", "c", "d"]
    assert call["negative_prompt"] == [None, "blurry", None, ""]  # for SDXL none is not the same as an empty one
    assert {(call["height"], call["width"], call["clip_skip"]) for call in drawn.asked} == {(64, 128, 1)}
    drawn.asked.clear()
    make(sampler, asked, tmp_path / "one", negative_prompt="ugly")
    assert [call["negative_prompt"] for call in drawn.asked] == [["ugly", "blurry", "ugly", ""]]
    assert [line["negative_prompt"] for line in sound(tmp_path / "one")] == ["ugly", "blurry", "ugly", ""]
    assert all("negative_prompt" not in line for line in sound(tmp_path / "none")[::2])


def test_an_image_is_that_of_the_sampler_alone(random_pipeline, tmp_path):
    sampler = Sampler.from_pipeline(random_pipeline("sdxl", 8, "epsilon"))
    asked = [Job("a", "a cat", 0), Job("b", "a cat", 0, "blurry"), Job("c", "a cat", 0, "")]
    make(sampler, asked, tmp_path / "out", height=40, batch_size=1)
    for job in asked:
        alone = sampler([job.prompt], [job.seed], 2, Guidance.cfg(7.5), job.negative_prompt, height=40, progress=False).images[
            0
        ]
        with Image.open(tmp_path / "out" / "images" / f"{job.id}.png") as image:
            off = np.abs(np.asarray(image, dtype=int) - np.asarray(alone, dtype=int))
            assert off.max() <= 1 and image.size == (32, 40)  # a text is encoded beside others: rounding


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"height": 128}, "height"),
        ({"width": 128}, "width"),
        ({"clip_skip": 1}, "clip_skip"),
        ({"negative_prompt": "ugly"}, "negative_prompt"),
        ({"guidance": Guidance.cfg(3.0)}, "guidance"),
    ],
)
def test_other_settings_are_another_run(sampler, drawn, tmp_path, change, differs):
    make(sampler, jobs(1), tmp_path / "out", height=64)
    make(sampler, jobs(1), tmp_path / "out", batch_size=3)  # 64 is the model's own
    with pytest.raises(ValueError, match=f"another run .its {differs} differ"):
        make(sampler, **{"jobs": jobs(1), "out": tmp_path / "out"} | change)


def test_the_same_weights_under_another_path_are_the_same_run(sampler, drawn, tmp_path):
    """As on another machine, where a run goes on, and whose shards are merged with those made here."""
    make(sampler, jobs(1), tmp_path / "out", model="here/model")
    make(sampler, jobs(2), tmp_path / "out", model="there/model")
    assert [line["status"] for line in sound(tmp_path / "out")] == ["ok", "ok"]
    for i, path in enumerate(["here/model", "there/model"]):
        make(sampler, jobs(2), tmp_path / "parts", model=path, shard=(i, 2))
    assert merge(tmp_path / "parts", tmp_path / "whole") == (2, 2)


def test_a_guard_of_another_models_calibration_is_said_once_and_kept(sampler, drawn, tmp_path, caplog):
    """A run of an earlier version, which did not keep the model, goes on."""
    model = {"unet": {"form": "another", "sample": [], "dtype": "float32"}}
    known = replace(guarded(Guidance.delayed(7.5, until=At(600)), NONE), model=model)
    make(sampler, jobs(1), tmp_path / "out", known)
    make(sampler, jobs(1), tmp_path / "named", named={"guard": known})
    assert caplog.text.count("made on another model (its unet") == 1
    settings = json.loads((file := tmp_path / "out" / "run.json").read_text())
    assert Guidance.from_dict(settings["guidance"]).model == model
    del settings["guidance"]["model"]
    file.write_text(json.dumps(settings))
    make(sampler, jobs(2), tmp_path / "out", known)
    assert len(sound(tmp_path / "out")) == 2


GUIDANCES = {
    "cfg": Guidance.cfg(5.0),
    "delayed": Guidance.delayed(5.0, until=At(500)),
    "opposite": Guidance.opposite(1.0, 5.0, until=At(500)),
    "guard": guarded(Guidance.delayed(5.0, until=At(500)), NONE),
}


def test_a_line_names_the_guidance_and_the_model(small, tmp_path):
    """A model of the hub by its whole name, a folder without its path."""
    sampler, folder = Sampler.from_pipeline(small, "ddim"), tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    for model, named in (("owner/mine", "owner/mine"), (str(folder), "mine")):
        plans = Plans(sampler, Recipe(GUIDANCES["cfg"], 4, named=GUIDANCES), model)
        found = {name: plans.facts(Job("a", "a", 0, guidance=name)) for name in GUIDANCES}
        assert {name: one["guidance"] for name, one in found.items()} == {name: name for name in GUIDANCES}
        assert {one["model"] for one in found.values()} == {named}


@pytest.mark.parametrize("scale", [5.0, 1.0], ids=["both branches", "one branch"])
def test_a_first_attempt_takes_the_predictions_that_were_planned(small, scale):
    sampler, made = Sampler.from_pipeline(small, "ddim"), Guard((Attempt(Guidance.cfg(scale), 1e9, probes=3),))
    planned = Plans(sampler, Recipe(made, 4), "m").calls(Job("a", "a", 0).kind)
    assert sampler(["a"], [0], 4, made, output="latent", progress=False).calls.tolist() == [planned]


@pytest.mark.parametrize("given", [{"guidance": {"scale": 5}}, {"guidance": Guidance.cfg(5), "named": {"mine": 5.0}}])
def test_guidance_of_another_type_is_refused(given):
    with pytest.raises(ValueError, match="must be a Guidance or a Guard"):
        Recipe(**given)


def test_jobs_of_one_id_are_refused(sampler, tmp_path):
    with pytest.raises(ValueError, match="jobs, job 2: id 'A' is already used in job 1"):
        make(sampler, [Job("a", "a cat", 0), Job("A", "a dog", 1)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_jobs_of_other_steps_and_scales_are_as_in_runs_of_their_own(small, tmp_path):
    sampler = Sampler.from_pipeline(small, "ddim")
    asked = [Job("a", "a", 0), Job("b", "b", 1, steps=5), Job("c", "c", 2, scale=2), Job("d", "d", 3, None, 3, -1)]
    options = {"steps": 4, "batch_size": 4, "format": "latents"}
    delayed = partial(Guidance.delayed, until=At(600))
    make(sampler, asked, tmp_path / "all", delayed(5.0), **options)
    lines = {line["id"]: line for line in sound(tmp_path / "all")}
    for job in asked:
        own = {**options, "steps": job.steps or 4}
        guidance = delayed(5.0 if job.scale is None else job.scale)
        make(sampler, [Job(job.id, job.prompt, job.seed)], tmp_path / job.id, guidance, **own)
        (alone,), together = sound(tmp_path / job.id), lines[job.id]
        assert (together["steps"], together["scale"]) == (job.steps or 4, 5.0 if job.scale is None else job.scale)
        assert len(together["noise_gap"]) == own["steps"] and together["transition_step"] == alone["transition_step"]
        found, expected = (load_file(tmp_path / run / together["file"])["latents"] for run in ("all", job.id))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # a text is encoded beside others: rounding


def test_a_guarded_picture_has_the_same_bits_beside_other_jobs(small, tmp_path):
    """Its delayed attempt needs one branch of the network, and its neighbour's plain attempt two."""
    sampler, guidance = Sampler.from_pipeline(small), guarded(Guidance.delayed(7.5, until=At(300)))
    made = set()
    for steps in (6, 4):
        beside, job = jobs(2)
        make(sampler, [replace(beside, steps=steps), job], tmp_path / f"{steps}", guidance, steps=6, format="latents")
        made |= {line["sha256"] for line in sound(tmp_path / f"{steps}") if line["id"] == job.id}
    assert len(made) == 1


def test_a_job_that_the_guidance_does_not_fit_is_named_before_any_work(small, tmp_path):
    sampler, out = Sampler.from_pipeline(small, "ddim"), tmp_path / "out"
    asked = [Job("a", "a", 0), Job("b", "b", 1, steps=5)]
    with pytest.raises(ValueError, match=r"jobs, job 2: .*shape"):
        make(sampler, asked, out, Guidance.cfg(5.0, shape=(1.0,) * 4), steps=4)
    assert not out.exists()


def test_a_guard_follows_a_jobs_own_steps_and_scale(small, tmp_path):
    """Without its early look, which is calibrated for those of the run."""
    sampler = Sampler.from_pipeline(small, "ddim")
    early = EarlyLook((1.0,) * 4, tuple(sampler.solver(4).levels), 1, 0.0)  # gives up every attempt that it looks at
    made = replace(guarded(Guidance.delayed(5.0, until=At(600)), NONE), early=early)
    asked = [Job("a", "a", 0), Job("b", "b", 1, steps=5), Job("c", "c", 2, scale=2.0)]
    make(sampler, asked, tmp_path, made, steps=4, format="latents")
    lines = {line["id"]: line for line in sound(tmp_path)}
    assert [lines[id]["attempts"] for id in "abc"] == [2, 1, 1] and not any(line["suspect"] for line in lines.values())
    for id, job in zip("bc", asked[1:], strict=True):
        alone = sampler(
            [job.prompt], [job.seed], job.steps or 4, Guidance.cfg(job.scale or 5.0), output="latent", progress=False
        )
        torch.testing.assert_close(load_file(tmp_path / lines[id]["file"])["latents"], alone.latents[0], rtol=1e-3, atol=1e-3)
