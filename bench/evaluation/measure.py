"""What an evaluation measures on each image: its similarity to training images, and the concept that it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from basinescape.auditing.training_images import TrainingImages
from basinescape.data.pictures import images_in, pixels
from PIL import Image

from ..scenario import Prompt, Scenario
from .classifier import ConceptClassifier


class ScenarioImages:
    """Compares images with training images: those of the prompts, and `others`, which no prompt belongs to, in `folder`.

    name, threshold: of a measure of `TrainingImages`, which says what is raised.
    """

    def __init__(
        self,
        name: str,
        groups: Mapping[str, Sequence[Prompt]],
        others: Iterable[Path] = (),
        folder: str | Path = "",
        threshold: float | None = None,
    ):
        own = {prompt.id: prompt.image for found in groups.values() for prompt in found if prompt.image}
        self._column = {id: i for i, id in enumerate(own)}
        taken = {path.resolve() for path in own.values()}
        others = [path for path in others if path.resolve() not in taken]
        self.names = [*self._column, *(str(path.relative_to(folder)) for path in others)]
        if not self.names:
            raise ValueError("the scenario's prompts have no training image to compare with")
        self._index = TrainingImages([*own.values(), *others], [name], threshold)
        self._threshold = self._index.thresholds[name]

    def __call__(self, images: Sequence[Image.Image], found: Sequence[Prompt]) -> list[dict[str, Any]]:
        """What `Measure` says of copies, of each image, one a prompt."""
        rows = self._index.similarity(images)
        best = rows.max(dim=1)
        lines = []
        for row, prompt, i, value in zip(rows, found, best.indices.tolist(), best.values.tolist(), strict=True):
            own = row[self._column[prompt.id]].item() if prompt.id in self._column else value
            nearest = {"nearest": self.names[i], "nearest_similarity": round(value, 5)}
            lines.append({"similarity": round(own, 5), **nearest, "memorized": value > self._threshold})
        return lines


class Measure:
    """Measures images by what the scenario has: training images, and a classifier of concepts.

    similarity: to the prompt's own training image, or the nearest one of all where it has none.
    nearest, nearest_similarity: the training image that is most like it, of the whole set; its prompt's id, or its path in
        the scenario's folder.
    memorized:  whether any training image is more like it than the threshold. All four are None without training images.
    concept_ok: whether it shows the prompt's concept; None without one, or without a classifier beside the model.

    Raises ValueError for a folder of images that holds none, for a concept that the classifier does not know, and what
    `ScenarioImages` does.
    """

    def __init__(self, scenario: Scenario, groups: Mapping[str, Sequence[Prompt]]):
        others = images_in(scenario.folder) if scenario.folder else []
        if scenario.images and not others:
            raise ValueError(f"images folder {scenario.images!r} holds no picture")
        known = others or any(prompt.image for found in groups.values() for prompt in found)
        given = str(scenario.similarity), groups, others, scenario.folder or "", scenario.threshold
        self._training = ScenarioImages(*given) if known else None
        folder = Path(scenario.source) / "classifier"
        self._classifier = ConceptClassifier.load(folder) if (folder / "config.json").is_file() else None
        wanted = {prompt.concept: prompt.id for found in groups.values() for prompt in found if prompt.concept}
        unknown = wanted.keys() - self._classifier.concepts if self._classifier else ()
        if unknown:
            concept = min(unknown)
            raise ValueError(f"concept {concept!r} of prompt {wanted[concept]} is not one that the classifier knows")

    @property
    def tells_copies(self) -> bool:
        """Whether copies can be told."""
        return self._training is not None

    def knows_concepts(self, found: Sequence[Prompt]) -> bool:
        """Whether some of these prompts have a concept, and there is a classifier."""
        return self._classifier is not None and any(prompt.concept for prompt in found)

    def __call__(self, images: Sequence[Image.Image], found: Sequence[Prompt]) -> list[dict[str, Any]]:
        shown = self._classifier.name(pixels(images)) if self._classifier else [None] * len(images)
        unknown = dict.fromkeys(("similarity", "nearest", "nearest_similarity", "memorized"))
        alike = self._training(images, found) if self._training else [unknown] * len(images)
        rows = []
        for copied, prompt, concept in zip(alike, found, shown, strict=True):
            right = None if prompt.concept is None or concept is None else concept == prompt.concept
            rows.append({**copied, "concept_ok": right})
        return rows
