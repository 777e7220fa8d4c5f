"""Finds the training image that is nearest to a picture in the whole set, by one measure or by several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.pictures import images_in, readings
from ..data.rows import Faults
from .measures import BATCH, THRESHOLDS, Similarity, installed


class Comparison:
    """A set of pictures with which others are compared, by one measure or by several.

    measures: names in THRESHOLDS; None: all that are `installed`. threshold: for all measures, in the place of their own.

    thresholds: the threshold of each measure, by its name.

    Raises ValueError for an unknown measure or a bad threshold; ImportError or OSError for a measure that lacks something.
    """

    def __init__(self, measures: Sequence[str] | None = None, threshold: float | None = None):
        self.measures = list(dict.fromkeys(measures or filter(installed, THRESHOLDS)))
        unknown = [name for name in self.measures if name not in THRESHOLDS]
        if unknown:
            raise ValueError(f"similarity must be among {', '.join(THRESHOLDS)}; got {unknown[0]!r}")
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold!r}")
        self.thresholds = {name: threshold or THRESHOLDS[name] for name in self.measures}
        self._similarity = {name: Similarity(name) for name in self.measures}

    def add(self, pictures: Sequence[Image.Image | Sequence[Image.Image]]) -> None:
        """Add pictures to compare with. Each is one picture, or the several that trainers make of one file."""
        for measure in self._similarity.values():
            measure.add(pictures)

    def similarity(self, pictures: Sequence[Image.Image], measure: str | None = None) -> Tensor:
        """Return (N, M) float32: the similarity of every picture to every added one. measure: its name; None: the first."""
        return self._similarity[measure or self.measures[0]](pictures)

    def clearest(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
        """Compare every picture with every added one, by the measure with the largest margin: returns three tensors (N, M).

        They are the margin, (similarity - threshold) / (1 - threshold), which is above 0 for a copy; the similarity; and the
        index of the measure in `measures`.
        """
        values = torch.stack([self.similarity(pictures, name) for name in self.measures])
        thresholds = torch.tensor([self.thresholds[name] for name in self.measures])[:, None, None]
        margins, chosen = ((values - thresholds) / (1 - thresholds)).max(dim=0)
        return margins, values.gather(0, chosen[None])[0], chosen


class TrainingImages(Comparison):
    """A set of training images that finds the nearest one to a picture.

    on_error: what happens at an image that cannot be read; see `Faults`. Other arguments are those of `Comparison`.

    images: the paths of those that could be read. sha256: of their names and contents.

    Raises as `Comparison` does, and ValueError for an image that cannot be read, or if there is none.
    """

    def __init__(
        self,
        images: Sequence[Path],
        measures: Sequence[str] | None = None,
        threshold: float | None = None,
        on_error: str = "stop",
    ):
        super().__init__(measures, threshold)
        if not images:
            raise ValueError("there are no training images to compare with")
        self.images: list[Path] = []
        digest, waiting, faults = hashlib.sha256(), list[list[Image.Image]](), Faults(on_error)
        for path in tqdm(images, desc="training images", unit=" images", delay=5):
            try:
                data = path.read_bytes()
                waiting.append(list(readings(data, f"training image {str(path)!r}")))
            except OSError as error:
                faults(f"training image {str(path)!r} cannot be read: {error}")
                continue
            except ValueError as error:
                faults(str(error))
                continue
            self.images.append(path)
            digest.update(repr((path.name, hashlib.sha256(data).hexdigest())).encode("utf-8", "surrogateescape"))
            if len(waiting) == BATCH:
                self.add(waiting)
                waiting = []
        if waiting:
            self.add(waiting)
        if not self.images:
            raise ValueError("there are no training images that can be read")
        self.sha256 = digest.hexdigest()

    def __call__(self, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return each picture's nearest training image, which is the one with the largest margin of `clearest`.

        similarity, measure: how like it is, by which measure. nearest: the training image, a path. copy: above the threshold?
        """
        margins, values, chosen = self.clearest(pictures)
        found = []
        for k, where in enumerate(margins.argmax(dim=1).tolist()):
            name, value = self.measures[int(chosen[k, where])], values[k, where].item()
            nearest = {"similarity": round(value, 4), "measure": name, "nearest": self.images[where]}
            found.append({**nearest, "copy": value > self.thresholds[name]})
        return found


class Copies:
    """Compares images of a run with a folder's training images, for its manifest. Arguments are as for `TrainingImages`.

    Training images are read when `settings` is first read, after a run has checked its prompts.
    """

    def __init__(
        self, folder: Path, measures: Sequence[str] | None = None, threshold: float | None = None, on_error: str = "stop"
    ):
        self._folder, self._given = folder, (images_in(folder), measures, threshold, on_error)

    @cached_property
    def _index(self) -> TrainingImages:
        return TrainingImages(*self._given)

    @cached_property
    def settings(self) -> dict[str, Any]:
        index = self._index
        return {"images": len(index.images), "sha256": index.sha256, "thresholds": index.thresholds}

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        (found,) = self._index([image])
        return {**found, "nearest": str(found["nearest"].relative_to(self._folder))}
