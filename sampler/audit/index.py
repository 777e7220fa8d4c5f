"""The index of training images: finds the one nearest to a picture in the whole set, by one measure or by several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.pictures import readings
from ..data.rows import Faults
from .measures import BATCH, THRESHOLDS, Similarity, installed


@dataclass(frozen=True)
class Found:
    """The training image nearest to a picture, by the measure in which it stands out most from the measure's threshold."""

    measure: str
    similarity: float
    image: Path
    copy: bool


class Index:
    """Training images, and how similar pictures are to them.

    measures: names in THRESHOLDS; None: those that are `installed`. threshold: for all of them; None: each one's own.
    on_error: of an image that cannot be read; see `Faults`.

    images: those that could be read. sha256: of their names and contents. thresholds: by measure.

    Raises ValueError for an unknown measure, an image that cannot be read, or no image; ImportError or OSError for a measure
    that lacks a package or its weights.
    """

    def __init__(
        self,
        images: Sequence[Path],
        measures: Sequence[str] | None = None,
        threshold: float | None = None,
        on_error: str = "stop",
    ):
        self.measures = list(dict.fromkeys(measures or filter(installed, THRESHOLDS)))
        unknown = [name for name in self.measures if name not in THRESHOLDS]
        if unknown:
            raise ValueError(f"similarity must be among {', '.join(THRESHOLDS)}; got {unknown[0]!r}")
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold!r}")
        if not images:
            raise ValueError("there are no training images to compare with")
        self.thresholds = {name: threshold or THRESHOLDS[name] for name in self.measures}
        self._similarity = {name: Similarity(name) for name in self.measures}
        self.images: list[Path] = []
        self._read(images, Faults(on_error))

    def _read(self, images: Sequence[Path], faults: Faults) -> None:
        digest, held = hashlib.sha256(), []
        for path in tqdm(images, desc="training images", delay=5):
            try:
                data = path.read_bytes()
                held.append(list(readings(data, f"training image {str(path)!r}")))
            except OSError as error:
                faults(f"training image {str(path)!r} cannot be read: {error}")
                continue
            except ValueError as error:
                faults(str(error))
                continue
            self.images.append(path)
            digest.update(repr((path.name, hashlib.sha256(data).hexdigest())).encode("utf-8", "surrogateescape"))
            if len(held) == BATCH:
                self._add(held)
                held = []
        if held:
            self._add(held)
        if not self.images:
            raise ValueError("there are no training images that can be read")
        self.sha256 = digest.hexdigest()

    def _add(self, held: Sequence[Sequence[Image.Image]]) -> None:
        for measure in self._similarity.values():
            measure.add(held)

    def similarity(self, pictures: Sequence[Image.Image], measure: str | None = None) -> Tensor:
        """(N, M) float32: every picture against every one of `images`, by one measure; None: the first."""
        return self._similarity[measure or self.measures[0]](pictures)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Found]:
        """The nearest training image of each picture."""
        found = []
        for name in self.measures:
            best = self.similarity(pictures, name).max(dim=1)
            found.append([self._found(name, *one) for one in zip(best.values.tolist(), best.indices.tolist(), strict=True)])
        return [max(of, key=self._margin) for of in zip(*found, strict=True)]

    def _found(self, name: str, value: float, where: int) -> Found:
        return Found(name, round(value, 4), self.images[where], value > self.thresholds[name])

    def _margin(self, found: Found) -> float:
        threshold = self.thresholds[found.measure]
        return (found.similarity - threshold) / (1 - threshold)


class Copies:
    """Compares images of a run with the training images of a folder, for its manifest. The arguments are those of `Index`."""

    def __init__(
        self,
        folder: Path,
        images: Sequence[Path],
        measures: Sequence[str] | None = None,
        threshold: float | None = None,
        on_error: str = "stop",
    ):
        self._folder, self._index = folder, Index(images, measures, threshold, on_error)
        self.settings = {
            "images": len(self._index.images),
            "sha256": self._index.sha256,
            "thresholds": self._index.thresholds,
        }

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        (found,) = self._index([image])
        nearest = str(found.image.relative_to(self._folder))
        return {"similarity": found.similarity, "measure": found.measure, "nearest": nearest, "copy": found.copy}
