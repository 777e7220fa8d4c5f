"""Scenarios: a model, its memorized and general prompts with the training images, and how to sample. Data only.

Scenarios 1 to 4 are those of Jain et al. (CVPR 2025, https://arxiv.org/abs/2411.16738); their models and data are published by
their authors and are not part of this project, so a missing file is reported with the place where it can be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from basinescape import Calibration, models
from basinescape.audit.measures import THRESHOLDS, installed
from basinescape.data.captions import Prompt, read_captions

__all__ = ["PRESETS", "Prompt", "Scenario", "limited", "load", "prompts"]

DATA = "https://github.com/somepago/DCR and https://github.com/YuxinWenRick/diffusion_memorization"
Stable = dict[str, Sequence[Sequence[float]]]  # name of a norm -> its (mean, standard deviation) in every step but the last


@dataclass(frozen=True)
class Scenario:
    """What an evaluation runs on.

    model:      folder, hub id, or the name of a pipeline that ships. A classifier of concepts beside the model, in
                `classifier/`, judges those of the prompts.
    memorized, general: captions that may be memorized, and ordinary ones, in any layout that `read_captions` knows; or the name
                of a pipeline that ships with its own.
    images:     folder of training images, of the captions and others; None: those that the prompt files name, perhaps none.
    options:    of the pipeline's own call, as height or max_sequence_length.
    transition: the timestep of the static transition point.
    ordinary:   the usual noise gap of each unguided step, for the rule `Settled`; empty: not measured, no such method.
    stable:     the stable region of plain guidance, for `methods.update`; None: not measured, no such method.
    calibration: file of a `Calibration`, or the name of a pipeline that ships, for the guard; None: no such method.
    similarity: "pixels", "sscd", "clip" or "dino"; None: sscd where it is installed, else pixels.
    threshold:  similarity above which an image counts as memorized; None: that of the similarity.
    where:      where the authors publish what is missing here.

    Raises ValueError for an unknown similarity.
    """

    name: str
    model: str
    memorized: str
    general: str | None = None
    images: str | None = None
    steps: int = 50
    scheduler: str = "dpmsolver++"
    scale: float = 7.5
    transition: float = 500.0
    ordinary: tuple[float, ...] = ()
    stable: Stable | None = None
    calibration: str | None = None
    similarity: str | None = None
    threshold: float | None = None
    where: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.similarity is None:
            object.__setattr__(self, "similarity", "sscd" if installed("sscd") else "pixels")
        if self.similarity not in THRESHOLDS:
            raise ValueError(f"similarity must be among {', '.join(THRESHOLDS)}; got {self.similarity!r}")
        if self.threshold is None:
            object.__setattr__(self, "threshold", THRESHOLDS[self.similarity])

    @property
    def source(self) -> str | Path:
        """What a sampler is loaded from."""
        return models.shipped().get(self.model, self.model)

    @property
    def folder(self) -> Path | None:
        """Where the training images are, if they are all in one folder."""
        if self.images is not None:
            return Path(self.images)
        return models.shipped()[self.memorized] / "memorized" if self.memorized in models.shipped() else None

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Scenario:
        """What a run's settings say of it; fields of other versions are left out. Raises TypeError where it is not one."""
        return cls(**{field.name: stored[field.name] for field in fields(cls) if field.name in stored})


def _ships(name: str, **sampled: Any) -> Scenario:
    """The scenario of a pipeline that ships with its captions, and perhaps a calibration."""
    scenario = Scenario(name, name, name, name, similarity="pixels", **sampled)
    beside = Calibration.beside(scenario.source)
    ordinary = Calibration.load(beside).ordinary if beside else None
    if ordinary is None:
        return scenario
    return replace(scenario, ordinary=ordinary.unguided, stable=ordinary.stable, calibration=name)


PAPER = {"similarity": "sscd", "where": DATA}
PRESETS = {
    "1": Scenario("1", "sd-finetuned-laion10k", "laion_10k_random/captions.json", transition=500.0, **PAPER),
    "2": Scenario("2", "sd-finetuned-imagenette", "imagenette2-train", transition=600.0, **PAPER),
    "3": Scenario("3", "sd14-finetuned-200-duplicates", "memorized_images", transition=500.0, **PAPER),
    "4": Scenario("4", "CompVis/stable-diffusion-v1-4", "sdv1_500_memorized.jsonl", transition=500.0, **PAPER),
    "tiny": _ships("tiny", transition=680.0),
    "flow": _ships("flow", transition=680.0, steps=28, scheduler="own", scale=7.0, options={"max_sequence_length": 16}),
}


FILES = ("model", "memorized", "general", "images", "calibration")  # fields that may name a file or folder
MEASURED = {"ordinary": (), "stable": None, "calibration": None}  # what belongs to one model and one way to sample from it
SAMPLED = {"model", "steps", "scheduler", "scale", "options"}  # fields that say how


def load(name: str | None = None, **given: Any) -> Scenario:
    """A preset, or a scenario from a YAML file of the fields of `Scenario`, with the fields in `given` that are not None.

    name: None for a scenario of `given` alone, or "tiny" where that names neither model nor prompts. Files are made absolute;
    a calibration that lies beside the model is found, and says how to sample where a scenario of `given` alone does not.

    Raises ValueError for an unknown name or field, FileNotFoundError for a missing file.
    """
    given = {field: value for field, value in given.items() if value is not None} | _absolute(given, Path())
    if name is None and ("model" in given or "memorized" in given):
        if not {"model", "memorized"} <= given.keys():
            raise ValueError("model and prompts must be given together, or beside a scenario")
        beside = given.get("calibration") or Calibration.beside(given["model"])
        return _calibrated(Scenario(**{"name": Path(given["model"]).name, "scheduler": "own", **_measured(beside), **given}))
    base = PRESETS.get(name or "tiny") or _from_yaml(name)
    if SAMPLED & given.keys():
        base = replace(base, **MEASURED)
    if "similarity" in given:
        base = replace(base, similarity=given["similarity"], threshold=given.get("threshold"))
    return _calibrated(replace(base, **given))


def _from_yaml(name: str) -> Scenario:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"scenario must be one of {', '.join(PRESETS)}, or a .yaml file; got {name!r}")
    if not path.is_file():
        raise FileNotFoundError(f"scenario file {name!r} does not exist")
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"scenario file {name!r} is not YAML: {error}") from error
    known = {field.name for field in fields(Scenario)}
    if not isinstance(given, dict) or not {"model", "memorized"} <= given.keys() <= known:
        has = ", ".join(map(str, given)) if isinstance(given, dict) else repr(given)
        raise ValueError(
            f"scenario file {name!r} must give model and memorized, and of the rest only {', '.join(sorted(known))}; "
            f"it has {has}"
        )
    return Scenario(**{"name": path.stem, **given, **_absolute(given, path.parent)})


def _absolute(given: dict[str, Any], folder: Path) -> dict[str, str]:
    """Those of the fields that name a file in `folder`, with the whole path; a hub id, or what ships here, is none."""
    named = {field: given[field] for field in FILES if isinstance(given.get(field), str | Path)}
    found = {field: folder / value for field, value in named.items()}
    return {field: str(path.resolve()) for field, path in found.items() if path.exists()}


def _measured(calibration: str | Path | None) -> dict[str, Any]:
    """How a calibration, if there is one, was sampled, and the static transition that it guesses."""
    if calibration is None:
        return {}
    found = Calibration.load(calibration)
    return {"steps": found.steps, "scale": found.scale} | ({"transition": found.ordinary.transition} if found.ordinary else {})


def _calibrated(scenario: Scenario) -> Scenario:
    beside = Calibration.beside(scenario.source)
    return replace(scenario, calibration=str(beside)) if scenario.calibration is None and beside else scenario


def prompts(scenario: Scenario) -> dict[str, list[Prompt]]:
    """The scenario's prompts by group, "memorized" and "general".

    Raises FileNotFoundError, with where to get it, for what is missing.
    """
    groups = {"memorized": _group(scenario, "memorized")}
    if scenario.general:
        taken = {prompt.id.casefold() for prompt in groups["memorized"]}  # ids name files
        groups["general"] = [
            replace(prompt, image=None, id=f"general-{prompt.id}" if prompt.id.casefold() in taken else prompt.id)
            for prompt in _group(scenario, "general")
        ]
    return groups


def _group(scenario: Scenario, group: str) -> list[Prompt]:
    source, images = getattr(scenario, group), scenario.folder if group == "memorized" else None
    if source in models.shipped():
        source = models.shipped()[source] / f"{group}.jsonl"
    return read_captions(source, scenario.where, images)


def limited(groups: dict[str, Sequence[Prompt]], limit: int | None) -> dict[str, list[Prompt]]:
    """The first `limit` prompts of each group."""
    return {name: list(found[:limit]) for name, found in groups.items()}
