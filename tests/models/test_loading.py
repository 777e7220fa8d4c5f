"""Loading: what is a path, what is pickled, and that whatever goes wrong is one line."""

import json
import shutil

import pytest
import torch
from basinescape import Sampler
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file


@pytest.fixture
def folder(random_pipeline, tmp_path):
    """A pipeline in a folder of its own."""
    random_pipeline("sd", 8, "epsilon").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(path, **options):
    return Sampler.from_pretrained(path, device="cpu", **options)


def test_files_beside_the_parts_are_none_of_the_models(folder):
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "optimizer.bin").write_bytes(b"x")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")  # the same in the other format, never opened
    load(folder)


def test_a_variant_is_loaded_by_its_name(folder):
    pipe = load(folder).pipe
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(0.5)
    pipe.save_pretrained(folder, variant="fp16")
    assert (load(folder, variant="fp16").pipe.unet.conv_out.weight == 0.5).all()
    assert not (load(folder).pipe.unet.conv_out.weight == 0.5).all()
    with pytest.raises(ValueError, match="bf16"):
        load(folder, variant="bf16")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    load(folder, variant="fp16")
    with pytest.raises(ValueError, match="pickle"):
        load(folder)


@pytest.mark.parametrize("path", ["./a/b", "../x", "a/b/", "./x", "~/x", "a/b/c", "x", "/a", "a/model.safetensors"])
def test_what_looks_like_a_path_is_one(path, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(path)


def test_what_cannot_be_loaded_is_said_before_diffusers_tries(folder, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="is a part of the pipeline in"):
        load(folder / "unet")
    monkeypatch.setattr("basinescape.models.loading.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nor in the hub's cache, and HF_HUB_OFFLINE"):
        load("owner/name", cache_dir=str(tmp_path))


def test_a_hub_id_goes_to_diffusers_with_its_revision(random_pipeline, monkeypatch):
    pipe, seen = random_pipeline("sd", 8, "epsilon"), []
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.from_pretrained", lambda source, **options: seen.append((source, options)) or pipe
    )
    load("owner/name", revision="v2", token="t", variant="fp16", cache_dir="c")
    load("owner/name", allow_pickle=True)
    (source, options), (_, pickled) = seen
    assert source == "owner/name" and options["use_safetensors"] is True and pickled["use_safetensors"] is None
    assert {"revision": "v2", "token": "t", "variant": "fp16", "cache_dir": "c"}.items() <= options.items()


def test_a_part_that_is_not_there_is_named_and_a_checker_may_be_left_out(folder):
    index = folder / "model_index.json"
    named = json.loads(index.read_text())
    named["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(named))
    with pytest.raises(ValueError, match="safety_checker=None"):
        load(folder)
    assert load(folder, safety_checker=None).pipe.safety_checker is None
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="lacks its tokenizer"):
        load(folder, safety_checker=None)


@pytest.mark.parametrize("broken", ["tokenizer/*", "unet/*.safetensors", "unet/config.json", "model_index.json"])
def test_a_broken_folder_is_a_valueerror_of_one_line(folder, broken):
    for file in folder.glob(broken):
        file.write_bytes(b"{")
    with pytest.raises(ValueError, match="model") as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_an_unknown_option_of_loading_is_named(folder):
    with pytest.raises(ValueError, match="varient"):
        load(folder, varient="fp16")
    with pytest.raises(ValueError, match=r"torch_dtype: no option of loading; there are .* device, .* dtype,"):
        Sampler.from_pretrained(folder, torch_dtype=torch.float16)
    with pytest.raises(ValueError, match="device_map"):
        load(folder, device_map="balanced")


@pytest.mark.parametrize(
    ("name", "cls"), [("cond_stage_model.x", StableDiffusionPipeline), ("conditioner.x", StableDiffusionXLPipeline)]
)
def test_a_single_file_is_read_as_the_family_it_holds(random_pipeline, tmp_path, monkeypatch, name, cls):
    file, seen = tmp_path / "model.safetensors", []
    save_file({name: torch.zeros(1)}, file)
    pipe = random_pipeline("sd" if cls is StableDiffusionPipeline else "sdxl", 8, "epsilon")
    monkeypatch.setattr(cls, "from_single_file", lambda path, **options: seen.append((path, options)) or pipe)
    assert load(file, config="folder").pipe is pipe
    assert seen[0][0] == str(file) and seen[0][1]["config"] == "folder"


def test_a_single_file_that_cannot_be_loaded_is_a_valueerror_of_one_line(folder, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="cannot be loaded") as raised:
        load(file, config=str(folder), local_files_only=True)
    assert "\n" not in str(raised.value)
    file.rename(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="pickle"):
        load(tmp_path / "model.ckpt")
