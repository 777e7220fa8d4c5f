"""Samples of a run that are not finite: tried once in float32, marked, and without an image."""

import pytest
import torch
from basinescape import Sampler
from bulkruns import jobs, make, sound

pytestmark = pytest.mark.usefixtures("ways")


def test_what_is_not_finite_is_tried_once_in_float32(random_pipeline, drawn, tmp_path):
    sampler = Sampler.from_pipeline(random_pipeline("sd", 8, "epsilon").to(torch.bfloat16))
    drawn.infinite = {"a picture of a cat 1": {"bfloat16"}, "a picture of a cat 2": {"bfloat16", "float32"}}
    make(sampler, jobs(4), tmp_path / "out", batch_size=3)
    written = {line["id"]: line for line in sound(tmp_path / "out")}
    failed = "failed: the sample is not finite"
    assert {id: line["status"] for id, line in written.items()} == {"p0": "ok", "p1": "ok", "p2": failed, "p3": "ok"}
    assert {id for id, line in written.items() if line.get("retried") == "float32"} == {"p1", "p2"}
    assert [call["prompts"] for call in drawn.asked][1:] == [["a picture of a cat 1", "a picture of a cat 2"]]
    assert sorted(path.stem for path in (tmp_path / "out" / "images").glob("*.png")) == ["p0", "p1", "p3"]
    assert sampler.pipe.unet.dtype == torch.bfloat16


def test_a_fault_in_float32_is_that_samples_own(random_pipeline, drawn, tmp_path, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("no memory for float32")

    sampler = Sampler.from_pipeline(random_pipeline("sd", 8, "epsilon").to(torch.bfloat16))
    monkeypatch.setattr(Sampler, "in_float32", full)
    drawn.infinite = {"a picture of a cat 0": {"bfloat16"}}
    make(sampler, jobs(2), tmp_path / "out")
    assert {line["id"]: line["status"] for line in sound(tmp_path / "out")} == {
        "p0": "failed: the sample is not finite, and in float32: no memory for float32",
        "p1": "ok",
    }


def test_a_network_that_gives_nan_is_marked_and_saves_no_image(random_pipeline, tmp_path):
    pipe = random_pipeline("sd", 8, "epsilon")
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    make(Sampler.from_pipeline(pipe), jobs(1), tmp_path / "out")
    (line,) = sound(tmp_path / "out")
    assert line["status"] == "failed: the sample is not finite" and "retried" not in line  # it was float32
    assert line["noise_gap"] == [None, None] and not list((tmp_path / "out" / "images").iterdir())
