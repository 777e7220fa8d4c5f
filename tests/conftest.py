"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def eager(monkeypatch):
    """The eager definitions on the CPU, where the tests otherwise interpret the kernels."""
    monkeypatch.setattr("basinescape.kernels.dispatch.INTERPRETED", False)


@pytest.fixture(scope="session")
def pipe():
    """The pipeline that ships, float32 on the CPU."""
    from basinescape import Sampler
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(Sampler.model_path("tiny"), use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu", torch.float32)
