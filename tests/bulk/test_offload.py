"""`generate` where parts of the pipeline come and go between devices, and with its stages in threads and without."""

import copy
import threading
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from basinescape import At, Guidance, Sampler
from basinescape.bulk import encode_decode
from basinescape.bulk.executor import threaded
from basinescape.data.prompts import Job
from basinescape.sampling.cuda_graphs import Session
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


@pytest.mark.slow
@pytest.mark.parametrize("format", ["latents", "png"])
def test_while_a_step_is_captured_no_other_thread_uses_the_device(small, device, monkeypatch, tmp_path, format):
    """In a capture, waiting for the device raises an exception in every thread."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a pretended one")
    monkeypatch.setattr("basinescape.kernels.dispatch.INTERPRETED", True)
    monkeypatch.setattr("basinescape.sampling.cuda_graphs.WARM_UP", 0)
    sampler = Sampler.from_pipeline(copy.deepcopy(small).to("cuda"), capture=True)
    capturing, capture, picture = threading.Event(), Session.capture, encode_decode._picture

    def slowly(session, *arguments):
        def take(branch, take=session.take):
            capturing.set()
            time.sleep(0.1)  # for the other threads
            return take(branch)

        with patch.object(session, "take", take):
            capture(session, *arguments)
        capturing.clear()

    def meanwhile(*arguments):
        capturing.wait(0.3)
        return picture(*arguments)

    monkeypatch.setattr(Session, "capture", slowly)
    monkeypatch.setattr(encode_decode, "_picture", meanwhile)
    jobs = [replace(job, height=height, width=64) for job, height in zip(JOBS[:3], (64, 48, 32), strict=True)]
    make(sampler, jobs, tmp_path / "out", PLAIN, steps=2, batch_size=1, format=format)
    assert [line["status"] for line in sound(tmp_path / "out")] == ["ok"] * 3
    assert sampler.graphs.failure is None
