"""What an evaluation measures on each image: its likeness to a training image, and the concept that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from basinescape import Sampler
from PIL import Image

from ..scenario import Prompt, Scenario
from ..testbed.classifier import ConceptClassifier
from .metrics import Similarity, pixels


class Likeness:
    """Similarity of an image to its prompt's training image, to the nearest one of all where the prompt has none.

    name: of a `Similarity`, which says what is raised. Raises ValueError, too, where no prompt has a training image.
    """

    def __init__(self, name: str, groups: dict[str, list[Prompt]]):
        known = [prompt for found in groups.values() for prompt in found if prompt.image]
        if not known:
            raise ValueError("the scenario's prompts have no training image to compare with")
        self._column = {prompt.id: i for i, prompt in enumerate(known)}
        self._similarity = Similarity(name, [Image.open(prompt.image) for prompt in known])

    def __call__(self, images: Sequence[Image.Image], found: Sequence[Prompt]) -> list[float]:
        return [
            (row[self._column[prompt.id]] if prompt.image else row.max()).item()
            for row, prompt in zip(self._similarity(images), found, strict=True)
        ]


class Measure:
    """What is measured on an image: its likeness to a training image, its concept."""

    def __init__(self, scenario: Scenario, groups: dict[str, list[Prompt]]):
        self._likeness = Likeness(scenario.similarity, groups)
        self._threshold = scenario.threshold
        folder = Sampler.model_path("tiny") / "classifier"
        self._classifier = ConceptClassifier.load(folder) if scenario.model == "tiny" else None

    def __call__(self, images: Sequence[Image.Image], found: Sequence[Prompt]) -> list[dict[str, Any]]:
        shown = self._classifier.name(pixels(images)) if self._classifier else [None] * len(images)
        rows = []
        for value, prompt, concept in zip(self._likeness(images, found), found, shown, strict=True):
            right = None if prompt.concept is None or concept is None else concept == prompt.concept
            rows.append({"similarity": round(value, 5), "memorized": value > self._threshold, "concept_ok": right})
        return rows
