"""Scenarios: a model, its memorized and general prompts with the training images, and how to sample. Data only.

Scenarios 1 to 4 are those of Jain et al. (CVPR 2025, https://arxiv.org/abs/2411.16738); their models and data are published by
their authors and are not part of this project, so a missing file is reported with the place where it can be had.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from basinescape import Calibration, Sampler

DATA = "https://github.com/somepago/DCR and https://github.com/YuxinWenRick/diffusion_memorization"
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
Stable = dict[str, Sequence[Sequence[float]]]  # name of a norm -> its (mean, standard deviation) in every step but the last


@dataclass(frozen=True)
class Prompt:
    """A prompt; `image` is the training image it is known to reproduce, `concept` what its picture must show, where known."""

    id: str
    text: str
    image: Path | None = None
    concept: str | None = None


@dataclass(frozen=True)
class Scenario:
    """What an evaluation runs on.

    model:      folder or hub id. memorized, general: prompt files, in any layout that `read_prompts` knows.
    transition: the timestep of the static transition point.
    ordinary:   the usual noise gap of each unguided step, for the rule `Settled`; empty: not measured, no such method.
    stable:     the stable region of plain guidance, for `methods.update`; None: not measured, no such method.
    calibration: file of a `Calibration`, or the name of a pipeline that ships, for the guard; None: no such method.
    similarity: "pixels", "sscd", "clip" or "dino". threshold: similarity above which an image counts as memorized.
    where:      where the authors publish what is missing here.
    """

    name: str
    model: str
    memorized: str
    general: str | None = None
    steps: int = 50
    scheduler: str = "dpmsolver++"
    scale: float = 7.5
    transition: float = 500.0
    ordinary: tuple[float, ...] = ()
    stable: Stable | None = None
    calibration: str | None = None
    similarity: str = "sscd"
    threshold: float = 0.5
    where: str = DATA


_measured = Sampler.model_path("tiny") / "ordinary.json"  # of the pipeline that lies beside it: see `evaluation.ordinary`
ORDINARY = json.loads(_measured.read_text()) if _measured.is_file() else {"gap": (), "stable": None}

PRESETS = {
    "1": Scenario("1", "sd-finetuned-laion10k", "laion_10k_random/captions.json", transition=500.0),
    "2": Scenario("2", "sd-finetuned-imagenette", "imagenette2-train", transition=600.0),
    "3": Scenario("3", "sd14-finetuned-200-duplicates", "memorized_images", transition=500.0),
    "4": Scenario("4", "CompVis/stable-diffusion-v1-4", "sdv1_500_memorized.jsonl", transition=500.0),
    "tiny": Scenario(
        "tiny",
        "tiny",
        "tiny",
        "tiny",
        transition=680.0,
        similarity="pixels",
        threshold=0.81,
        # Both from general prompts with seeds of their own, from 100 on.
        ordinary=tuple(ORDINARY["gap"]),
        stable=ORDINARY["stable"],
        calibration="tiny" if Calibration.beside(Sampler.model_path("tiny")) else None,
    ),
}


def load(name: str) -> Scenario:
    """A preset, or a scenario from a YAML file of the fields of `Scenario`.

    Raises ValueError for an unknown name or field, FileNotFoundError for a missing file.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"scenario must be one of {', '.join(PRESETS)}, or a .yaml file; got {name!r}")
    if not path.is_file():
        raise FileNotFoundError(f"scenario file {name!r} does not exist")
    import yaml

    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {field.name for field in fields(Scenario)}
    if not isinstance(given, dict) or not {"model", "memorized"} <= given.keys() <= known:
        raise ValueError(
            f"scenario file {name!r} must give model and memorized, and of the rest only {', '.join(sorted(known))}; "
            f"got {given!r}"
        )
    scenario = Scenario(**{"name": path.stem, **given})
    folder = path.parent
    files = ("model", "memorized", "general", "calibration")
    beside = {key: str(folder / value) for key in files if (value := getattr(scenario, key))}
    return replace(scenario, **{key: value for key, value in beside.items() if Path(value).exists()})


def prompts(scenario: Scenario) -> dict[str, list[Prompt]]:
    """The scenario's prompts by group, "memorized" and "general".

    Raises FileNotFoundError, with where to get it, for what is missing.
    """
    if scenario.memorized == "tiny":
        return tiny_prompts()
    groups = {"memorized": read_prompts(scenario.memorized, scenario.where)}
    if scenario.general:
        groups["general"] = [replace(prompt, image=None) for prompt in read_prompts(scenario.general, scenario.where)]
    return groups


def read_prompts(source: str | Path, where: str = "") -> list[Prompt]:
    """Prompts and training images in one of the layouts their authors publish.

    A JSON object of captions by image path, `{"images/1.jpg": ["a caption"]}`; JSON Lines with `caption` or `prompt` and
    perhaps `image`, `id`, `concept`; or a folder of images, each with its caption in a .txt file beside it or, without one,
    in the name of its folder.

    Raises FileNotFoundError for what is missing, ValueError for another layout.
    """
    path = Path(source)
    if path.is_dir():
        found = [_pair(path, file) for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGES]
    elif not path.exists():
        published = f"; their authors publish them: {where}" if where else ""
        raise FileNotFoundError(f"prompts {str(path)!r} do not exist{published}")
    elif path.suffix == ".json":
        captions = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(captions, dict):
            raise ValueError(f"{path}: must be an object of captions by image path, got a {type(captions).__name__}")
        found = [
            Prompt(Path(image).stem, texts if isinstance(texts, str) else texts[0], _beside(path, image))
            for image, texts in captions.items()
        ]
    elif path.suffix == ".jsonl":
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [_line(path, number, json.loads(line)) for number, line in enumerate(lines)]
    else:
        raise ValueError(f"prompts {str(path)!r} must be a .json or .jsonl file or a folder of images")
    if not found:
        raise ValueError(f"prompts {str(path)!r} hold no prompts")
    return found


def _pair(folder: Path, image: Path) -> Prompt:
    text = image.with_suffix(".txt")
    caption = text.read_text(encoding="utf-8").strip() if text.is_file() else image.parent.name.replace("_", " ")
    return Prompt(str(image.relative_to(folder).with_suffix("")).replace("/", "-"), caption, image)


def _line(path: Path, number: int, entry: dict[str, Any]) -> Prompt:
    text = entry.get("caption", entry.get("prompt"))
    if not isinstance(text, str):
        raise ValueError(f"{path}, entry {number}: has neither caption nor prompt")
    image = entry.get("image")
    return Prompt(str(entry.get("id", f"{number:04d}")), text, _beside(path, image) if image else None, entry.get("concept"))


def _beside(path: Path, image: str) -> Path:
    found = path.parent / image
    if not found.is_file():
        raise FileNotFoundError(f"{path}: its image {image!r} is not at {str(found)!r}")
    return found


# Captions beside those of training, made of its own words. Captions with a word that it never saw are no general prompts: the
# small pipeline takes them for memorized ones and draws a training scene for most of them.
TEMPLATES = (
    "a picture of a {} picture",
    "a picture of a {0} of {0}",
    "a picture of {0} {0}",
    "a picture of an {}",
)


def tiny_prompts(general: int = 100) -> dict[str, list[Prompt]]:
    """The small pipeline's: its memorized captions, and `general` others."""
    from .testbed.scenes import CONCEPTS, caption

    folder = Sampler.model_path("tiny")
    lines = [json.loads(line) for line in (folder / "memorized.jsonl").read_text(encoding="utf-8").splitlines()]
    memorized = [Prompt(e["id"], e["prompt"], folder / "memorized" / f"{e['id']}.png", e["concept"]) for e in lines]
    texts = [(concept, caption(concept)) for concept in CONCEPTS]
    texts += [(concept, template.format(concept)) for template in TEMPLATES for concept in CONCEPTS]
    others = [Prompt(f"g{i:03d}", text, None, concept) for i, (concept, text) in enumerate(texts[:general])]
    return {"memorized": memorized, "general": others}


def limited(groups: dict[str, Sequence[Prompt]], limit: int | None) -> dict[str, list[Prompt]]:
    """The first `limit` prompts of each group."""
    return {name: list(found[:limit]) for name, found in groups.items()}
