"""Loads pipelines from folders, single files and the hub with diffusers' loaders. Pickled weights must be allowed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from packaging.version import Version
from safetensors import safe_open

from ..checks import line
from .registry import ADAPTERS

ASSETS = Path(__file__).parents[1] / "assets"
INDEX = "model_index.json"  # in the folder of every pipeline
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
# What diffusers' loader takes beside the pipeline's parts.
OPTIONS = frozenset(
    "variant revision token device_map cache_dir local_files_only force_download proxies low_cpu_mem_usage max_memory "
    "offload_folder quantization_config config original_config".split()
)


def shipped() -> dict[str, Path]:
    """The folders of the pipelines that ship with the project, by name."""
    return {index.parent.name: index.parent for index in sorted(ASSETS.glob(f"*/{INDEX}"))}


def located(path_or_id: str | Path) -> str | Path:
    """Return the folder of the shipped pipeline of this name. An existing path and any other name are returned unchanged."""
    return path_or_id if Path(path_or_id).exists() else shipped().get(str(path_or_id), path_or_id)


def load(path_or_id: str | Path, dtype: torch.dtype, allow_pickle: bool = False, **options: Any) -> DiffusionPipeline:
    """Load a pipeline.

    path_or_id: a folder in diffusers' format, a single file of weights, a hub id, or the name of a pipeline that ships. A
                string is a path if it is absolute, begins with "." or "~", ends with "/", names weights (.safetensors, .ckpt),
                or is not of the form 'owner/name'.
    options:    options of diffusers' `from_pretrained` and `from_single_file`, such as variant, revision, token, device_map and
                config. Or parts of the pipeline that replace those in the folder, such as vae=..., or safety_checker=None.

    Raises FileNotFoundError for a missing path, ValueError for anything else that keeps the pipeline from loading.
    """
    if set(options) - OPTIONS:
        known = [getattr(diffusers, name) for name in ADAPTERS if hasattr(diffusers, name)]
        parts = {part for pipeline in known for part in inspect.signature(pipeline).parameters}
        unknown = sorted(set(options) - OPTIONS - parts)
        if unknown:
            takes = ", ".join(sorted(OPTIONS | parts | {"device", "dtype"}))
            raise ValueError(f"{', '.join(unknown)}: no option of loading; there are {takes}")
    name = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    options[name] = dtype
    path_or_id = located(path_or_id)
    path = Path(path_or_id).expanduser()
    pickle_refused = "and pickle can run code when it is loaded: allow it explicitly (allow_pickle) if you trust the source"
    if path.is_file():
        if path.suffix != ".safetensors" and not allow_pickle:
            raise ValueError(f"model {str(path)!r} is not safetensors, {pickle_refused}")
        return _loaded(str(path), lambda: _pipeline_of(path).from_single_file(str(path), **options))
    if path.is_dir():
        if not (path / INDEX).is_file() and (path.parent / INDEX).is_file():
            raise ValueError(f"model {str(path)!r} is a part of the pipeline in {str(path.parent)!r}: give that folder")
        index = _loaded(str(path), lambda: DiffusionPipeline.load_config(path))
        options = {part: None for part, source in index.items() if source == [None, None]} | options  # saved without them
        pickled = _pickled(path, index, options)
        if pickled is not None and not allow_pickle:
            raise ValueError(f"model {str(path)!r} has pickled weights only ({pickled}), {pickle_refused}")
        source = str(path)
    elif _is_path(path_or_id):
        raise FileNotFoundError(
            f"model {str(path_or_id)!r} does not exist: give a folder in diffusers' format, a file of weights, or a hub id "
            "such as 'owner/name'"
        )
    else:
        source = str(path_or_id)
        where = {name: options.get(name) for name in ("cache_dir", "revision")}
        if HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(source, INDEX, **where), str):
            raise ValueError(
                f"model {source!r} is no folder, nor in the hub's cache, and HF_HUB_OFFLINE keeps it from being fetched"
            )
    options["use_safetensors"] = None if allow_pickle else True
    return _loaded(source, lambda: DiffusionPipeline.from_pretrained(source, **options))


def _loaded(source: str, loader: Callable[[], Any]) -> Any:
    """Return what `loader` loads. Its exceptions become a ValueError of one line, but an ImportError is raised as it is."""
    try:
        return loader()
    except ImportError:  # says best itself which package is missing
        raise
    except Exception as error:  # the loaders raise anything
        raise ValueError(f"model {source!r} cannot be loaded: {line(error)}") from error


def _is_path(given: str | Path) -> bool:
    if isinstance(given, Path):
        return True
    named = given.endswith(("/", "\\", ".safetensors", *PICKLED)) or given.startswith((".", "~"))
    return named or Path(given).is_absolute() or given.count("/") != 1


def _pickled(folder: Path, index: dict[str, Any], options: dict[str, Any]) -> str | None:
    """The first part, among those that `index` names and `options` does not replace, whose weights are only pickled.

    Returns "part/file", or None. Raises ValueError for a part that is missing.
    """
    parts = [name for name, value in index.items() if isinstance(value, list) and value and value[0] and name[0] != "_"]
    found = None
    for part in parts:
        if part in options:
            continue
        if not (folder / part).is_dir():
            raise ValueError(
                f"model {str(folder)!r} lacks its {part}, which model_index.json lists: add it, or give {part}=..."
                + (f", or leave it out with {part}=None" if part == "safety_checker" else "")
            )
        files = sorted(file.name for file in (folder / part).iterdir() if _of_variant(file.name, options.get("variant")))
        weights = [file for file in files if file.endswith(PICKLED)]
        if weights and not any(file.endswith(".safetensors") for file in files):
            found = found or f"{part}/{weights[0]}"
    return found


def _of_variant(file: str, variant: str | None) -> bool:
    """Whether `file` may be loaded under `variant`: model.safetensors under any, model.fp16.safetensors under "fp16"."""
    marks = file.split(".")[1:-1]
    return not marks or any(mark.split("-")[0] == variant for mark in marks)


def _pipeline_of(file: Path) -> type[StableDiffusionPipeline | StableDiffusionXLPipeline]:
    """The pipeline whose weights a single file holds. SDXL's text encoders are called conditioner."""
    if file.suffix != ".safetensors":
        names = torch.load(file, map_location="meta", weights_only=True)
        names = names.get("state_dict", names)
    else:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
    xl = any(name.startswith("conditioner.") for name in names)
    return StableDiffusionXLPipeline if xl else StableDiffusionPipeline
