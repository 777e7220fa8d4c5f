"""`generate` where parts of the pipeline come and go between devices, and with its stages in threads and without."""

import copy
from unittest.mock import patch

import pytest
import torch
from basinescape import At, Guidance, Sampler
from basinescape.bulk.executor import threaded
from basinescape.data.prompts import Job
from bulkruns import make, sound
from safetensors.torch import load_file
from smallguards import EVERY, NONE, guard

JOBS = [Job(f"p{i}", f"a picture of a cat {i}", i) for i in range(5)]
PLAIN = Guidance.cfg(5.0)
GUARD = guard((PLAIN, EVERY), (Guidance.delayed(5.0, until=At(600)), NONE))
OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cuda"),
    "group": lambda pipe: pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level"),
}


def latents(sampler, out, guidance=PLAIN):
    make(sampler, JOBS, out, guidance, steps=3, batch_size=2, format="latents")
    lines = sound(out)
    assert [line["status"] for line in lines] == ["ok"] * len(JOBS)
    return torch.stack([load_file(out / line["file"])["latents"] for line in lines])


@pytest.mark.parametrize("how", OFFLOADS)
def test_an_offloaded_pipeline_makes_the_same(random_pipeline, device, monkeypatch, tmp_path, how):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a pretended one")
    pipe = random_pipeline("sd", 8, "epsilon")
    expected = latents(Sampler.from_pipeline(copy.deepcopy(pipe)), tmp_path / "plain")
    OFFLOADS[how](pipe)
    sampler = Sampler.from_pipeline(pipe)
    assert not threaded(sampler)
    torch.testing.assert_close(latents(sampler, tmp_path / "out"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", [PLAIN, GUARD], ids=["plain", "guard"])
def test_stages_in_threads_and_without_make_the_same(small, tmp_path, guidance):
    sampler = Sampler.from_pipeline(small)
    assert not threaded(sampler)  # on a CPU nothing that computes runs beside the network
    inline = latents(sampler, tmp_path / "inline", guidance)
    with patch("basinescape.bulk.executor.threaded", lambda sampler: True):
        assert torch.equal(latents(sampler, tmp_path / "threads", guidance), inline)


def test_beside_a_gpu_the_stages_have_threads(small, device):
    assert threaded(Sampler.from_pipeline(copy.deepcopy(small).to("cuda")))
