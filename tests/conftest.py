"""Fixtures of all tests, the marks that follow from them, and the option for the whole matrix of schedulers.

Without a GPU, kernels run in Triton's interpreter, which must be chosen before they are imported. It is slow: only tests marked
`interpreter` use it. All other tests use the eager definitions.
"""

import os
import shutil

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # small work: threads that wait for each other on a shared machine cost more than they bring
MARKED = {"device": "interpreter", "tiny": "shipped"}  # a test that needs the fixture has the mark


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="all of tests/schedulers/test_matrix.py and test_gpu_whole.py")


def pytest_collection_modifyitems(items):
    for item in items:
        for fixture in MARKED.keys() & set(item.fixturenames):
            item.add_marker(MARKED[fixture])


@pytest.fixture(autouse=True)
def _implementation(request, monkeypatch):
    if request.node.get_closest_marker("interpreter") is None:
        monkeypatch.setattr("basinescape.kernels.dispatch.INTERPRETED", False)


@pytest.fixture
def eager(monkeypatch):
    """The eager definitions on the CPU, in tests that otherwise interpret the kernels."""
    monkeypatch.setattr("basinescape.kernels.dispatch.INTERPRETED", False)


@pytest.fixture(scope="session")
def guarded(tmp_path_factory):
    from basinescape.kernels.dispatch import INTERPRETED
    from pretended import install_guard

    if torch.version.cuda or not INTERPRETED or shutil.which("g++") is None:
        pytest.skip("the pretended device needs a CPU build of torch, the interpreter and g++")
    install_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def device(guarded):
    """A pretended CUDA device."""
    from pretended import pretended

    with pretended() as device:
        yield device


@pytest.fixture(scope="session")
def tiny():
    """The pipeline that ships, float32 on the CPU."""
    from basinescape import Sampler
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(Sampler.model_path("tiny"), use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu", torch.float32)


@pytest.fixture(scope="session")
def pipe(tiny):
    """The same, where a module does not say otherwise."""
    return tiny


@pytest.fixture(scope="session")
def words():
    """The tokenizer of the pipeline that ships."""
    from basinescape import Sampler
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(Sampler.model_path("tiny") / "tokenizer")


@pytest.fixture(scope="session")
def random_pipeline(words):
    """A function that makes a small pipeline with random weights: (kind "sd" or "sdxl", latent size, prediction type)."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def make(kind, size, prediction):
        torch.manual_seed(0)
        xl = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
        }
        unet = UNet2DConditionModel(
            sample_size=size,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=64 if kind == "sdxl" else 32,
            attention_head_dim=4,
            **(xl if kind == "sdxl" else {}),
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=8,
            sample_size=4 * size,
        )
        text = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=words.model_max_length,
            projection_dim=32,
            eos_token_id=words.eos_token_id,
            bos_token_id=words.bos_token_id,
        )
        parts = {
            "vae": vae,
            "text_encoder": CLIPTextModel(text),
            "tokenizer": words,
            "unet": unet,
            "scheduler": DDIMScheduler(
                clip_sample=False, steps_offset=1, beta_schedule="scaled_linear", prediction_type=prediction
            ),
        }
        if kind == "sdxl":
            made = StableDiffusionXLPipeline(
                **parts,
                text_encoder_2=CLIPTextModelWithProjection(text),
                tokenizer_2=words,
                add_watermarker=False,
            )
        else:
            made = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    return make


@pytest.fixture(scope="session")
def small(random_pipeline):
    """A pipeline with random weights and latents of the small pipeline's size, four times as fast as that."""
    return random_pipeline("sd", 16, "epsilon")


@pytest.fixture
def drawn(monkeypatch):
    """A `Drawn`: every sampler's pictures are drawn without a network."""
    from basinescape.models.sd import StableDiffusion
    from bulkruns import Drawn

    drawn = Drawn()
    for name in ("encode", "network", "decode"):
        own = getattr(drawn, name)
        monkeypatch.setattr(StableDiffusion, name, lambda model, *given, own=own, **named: own(model, *given, **named))
    return drawn


@pytest.fixture
def mine(tmp_path):
    """A copy of the small pipeline under another name, without a calibration."""
    from basinescape import Sampler

    folder = tmp_path / "my-model"
    shutil.copytree(
        Sampler.model_path("tiny"), folder, ignore=shutil.ignore_patterns("calibration.json", "memorized*", "ordinary.jsonl")
    )
    return folder
