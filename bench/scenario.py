"""Scenarios: a model, its memorized and general prompts with the training images, and the sampling settings.

Scenarios 1 to 4 are from Jain et al. (CVPR 2025, https://arxiv.org/abs/2411.16738). The authors publish the models and data,
which are not part of this project. If a file is missing, the error says where to get it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from basinescape import Calibration, Sampler, models
from basinescape.auditing.measures import THRESHOLDS, installed
from basinescape.calibration.baseline import STATIC
from basinescape.data.captions import Prompt, read_captions

__all__ = ["PRESETS", "Prompt", "Scenario", "limited", "load", "loaded", "prompts"]

DATA = "https://github.com/somepago/DCR and https://github.com/YuxinWenRick/diffusion_memorization"
NEAR = "which lets near-duplicates alone count, as there is no usual one"
# The source of the usual threshold of each similarity.
ORIGINS = {
    "pixels": "measured on tiny: of 6,400 fresh scenes of the same concept one in a thousand is above 0.80",
    "sscd": "that of Somepalli et al. and Jain et al.",
    "clip": NEAR,
    "dino": NEAR,
}


@dataclass(frozen=True)
class Scenario:
    """The model, the prompts, the training images and the settings of an evaluation.

    model:      folder, hub id, or the name of a pipeline that ships. If the model's folder has a classifier of concepts, in
                `classifier/`, it judges whether pictures show the concepts of their prompts.
    memorized, general: captions that may be memorized, and ordinary ones, in any layout that `read_captions` knows; or the name
                of a pipeline that ships, for the captions that ship with it.
    images:     folder of training images, with captions or without; None: the images that the prompt files name, if any.
    calibration: file of a `Calibration`, or the name of a pipeline that ships; None: the one beside the model, if there is one.
    steps, scheduler, scale, options: how to sample; options are arguments of the pipeline's own call, such as height or
                max_sequence_length. None: as calibrated, and without a calibration as the model's own pipeline does.
    transition: the timestep of the static transition; None: the calibration's, else the paper's.
    similarity: "pixels", "sscd", "clip" or "dino"; None: sscd if it is installed, else pixels.
    threshold:  an image of a larger similarity counts as memorized; None: the usual threshold of the similarity.
    where:      for an error message: where the authors publish a missing file.

    Raises ValueError for an unknown similarity.
    """

    name: str
    model: str
    memorized: str
    general: str | None = None
    images: str | None = None
    steps: int | None = None
    scheduler: str | None = None
    scale: float | None = None
    transition: float | None = None
    calibration: str | None = None
    similarity: str | None = None
    threshold: float | None = None
    where: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        similarity = self.similarity or ("sscd" if installed("sscd") else "pixels")
        object.__setattr__(self, "similarity", similarity)
        if similarity not in THRESHOLDS:
            raise ValueError(f"similarity must be among {', '.join(THRESHOLDS)}; got {similarity!r}")
        if self.threshold is None:
            object.__setattr__(self, "threshold", THRESHOLDS[similarity])

    @property
    def source(self) -> str | Path:
        """The folder or hub id from which the sampler is loaded."""
        return models.shipped().get(self.model, self.model)

    @property
    def folder(self) -> Path | None:
        """The folder that holds the training images; None if they are not all in one folder."""
        if self.images is not None:
            return Path(self.images)
        return models.shipped()[self.memorized] / "memorized" if self.memorized in models.shipped() else None

    @property
    def copy(self) -> str:
        """One line that defines a copy and names the source of the threshold."""
        usual = self.threshold == THRESHOLDS[str(self.similarity)]
        origin = ORIGINS[str(self.similarity)] if usual else "as the scenario says"
        return f"similarity ({self.similarity}) to a training image above {self.threshold}, {origin}"

    @property
    def how(self) -> tuple[int, float, float]:
        """(steps, scale, transition). Raises ValueError if one of them is None; `loaded` fills them in."""
        if self.steps is None or self.scale is None or self.transition is None:
            raise ValueError(f"scenario {self.name!r} leaves steps, scale or transition open: scenario.loaded fills them in")
        return self.steps, self.scale, self.transition

    @property
    def calibrated(self) -> Calibration | None:
        """The calibration, read from its file; None without one."""
        return None if self.calibration is None else Calibration.load(self.calibration)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Scenario:
        """The scenario in a run's settings, without fields of other versions. Raises TypeError without a required field."""
        return cls(**{field.name: stored[field.name] for field in fields(cls) if field.name in stored})


def _ships(name: str, **sampled: Any) -> Scenario:
    """The scenario of a pipeline that ships with its captions and a calibration."""
    return Scenario(name, name, name, name, similarity="pixels", transition=680.0, calibration=name, **sampled)


def _papers(name: str, model: str, memorized: str, transition: float = 500.0) -> Scenario:
    """A scenario of Jain et al."""
    how: dict[str, Any] = {"steps": 50, "scheduler": "dpmsolver++", "scale": 7.5, "similarity": "sscd", "where": DATA}
    return Scenario(name, model, memorized, transition=transition, **how)


PRESETS = {
    "1": _papers("1", "sd-finetuned-laion10k", "laion_10k_random/captions.json"),
    "2": _papers("2", "sd-finetuned-imagenette", "imagenette2-train", 600.0),
    "3": _papers("3", "sd14-finetuned-200-duplicates", "memorized_images"),
    "4": _papers("4", "CompVis/stable-diffusion-v1-4", "sdv1_500_memorized.jsonl"),
    "tiny": _ships("tiny", steps=50, scheduler="dpmsolver++", scale=7.5),
    "flow": _ships("flow", steps=28, scheduler="own", scale=7.0, options={"max_sequence_length": 16}),
}


KINDS = {"model": str, "memorized": str, "steps": int, "options": dict}  # of fields in a .yaml file that nothing checks later
FILES = ("model", "memorized", "general", "images", "calibration")  # fields that may name a file or folder


def load(name: str | None = None, **given: Any) -> Scenario:
    """Load a preset, or a YAML file of the fields of `Scenario`; fields in `given` that are not None replace its own.

    name: a preset or a .yaml file. None: the scenario is made of `given` alone; or "tiny", if `given` has neither model nor
    memorized. Paths of files that exist are made absolute. Fields that are None are taken from the calibration, if any.

    Raises ValueError for an unknown name or field, FileNotFoundError for a missing file.
    """
    given = {field: value for field, value in given.items() if value is not None} | _absolute(given, Path())
    if name is None and ("model" in given or "memorized" in given):
        if not {"model", "memorized"} <= given.keys():
            raise ValueError("model and prompts must be given together, or beside a scenario")
        return _as_calibrated(Scenario(**{"name": Path(given["model"]).name, **given}))
    base = PRESETS.get(name or "tiny") or _from_yaml(str(name))
    if "similarity" in given:
        base = replace(base, similarity=given["similarity"], threshold=given.get("threshold"))
    if "model" in given:
        base = replace(base, calibration=None)
    return _as_calibrated(replace(base, **given))


def _as_calibrated(scenario: Scenario) -> Scenario:
    """The scenario, with fields that are None taken from its calibration or, without one, from the one beside the model."""
    path = scenario.calibration or Calibration.beside(scenario.source)
    scenario = replace(scenario, calibration=None if path is None else str(path))
    known = scenario.calibrated
    if known is None:
        return scenario
    transition = STATIC if known.baseline is None else known.baseline.transition
    return _filled(scenario, steps=known.steps, scale=known.scale, transition=transition)


def _filled(scenario: Scenario, **values: Any) -> Scenario:
    """The scenario, with `values` for those of its fields that are None."""
    return replace(scenario, **{name: value for name, value in values.items() if getattr(scenario, name) is None})


def loaded(scenario: Scenario, device: str | None = None, dtype: str | None = None) -> tuple[Scenario, Sampler]:
    """(scenario, sampler): the model is loaded, and its own steps and scale replace those that are None.

    A transition that is None becomes the paper's. Raises ValueError for a model that makes videos, and what
    `Sampler.from_pretrained` does, also for a calibrated scheduler.
    """
    known = scenario.calibrated
    settings = {} if known is None else known.settings
    scheduler = scenario.scheduler or (known and known.scheduler) or "own"
    sampler = Sampler.from_pretrained(scenario.source, device, dtype, scheduler)
    sampler = sampler.using(*settings.get("size", ()), **settings.get("options", {})).using(**scenario.options)
    model = sampler.model
    if "num_frames" in model.options:
        raise ValueError(f"model {scenario.model!r} makes videos, and scenarios compare pictures; audit takes it")
    return _filled(scenario, steps=model.own_steps, scale=model.own_scale, transition=STATIC), sampler


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
    for key, kind in KINDS.items():
        if not isinstance(given.get(key, kind()), kind):
            raise ValueError(f"scenario file {name!r}: {key} must be of type {kind.__name__}, got {given[key]!r}")
    return Scenario(**{"name": path.stem, **given, **_absolute(given, path.parent)})


def _absolute(given: dict[str, Any], folder: Path) -> dict[str, str]:
    """The fields of `given` that name an existing file in `folder`, as absolute paths. Hub ids and shipped names are not."""
    named = {field: given[field] for field in FILES if isinstance(given.get(field), str | Path)}
    found = {field: folder / value for field, value in named.items()}
    return {field: str(path.resolve()) for field, path in found.items() if path.exists()}


def prompts(scenario: Scenario) -> dict[str, list[Prompt]]:
    """The scenario's prompts by group, "memorized" and "general".

    Raises FileNotFoundError for a missing file or folder, and says where to get it.
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


def limited(groups: Mapping[str, Sequence[Prompt]], limit: int | None) -> dict[str, list[Prompt]]:
    """The first `limit` prompts of each group."""
    return {name: list(found[:limit]) for name, found in groups.items()}
