"""The index of training images: finds the one nearest to a picture in the whole set, by one measure or by several."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.pictures import images_in, opened, readings
from ..data.rows import Faults
from .measures import BATCH, THRESHOLDS, Similarity, installed

BLOCK = 64  # pictures of a set that are compared together


class Comparison:
    """Pictures with which others are compared, by one measure or by several.

    measures: names in THRESHOLDS; None: what is `installed`. threshold: of them all, in the place of their own.

    thresholds: by measure.

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
        """More pictures to compare with, each one or the several that trainers make of one file."""
        for measure in self._similarity.values():
            measure.add(pictures)

    def similarity(self, pictures: Sequence[Image.Image], measure: str | None = None) -> Tensor:
        """(N, M) float32: every picture against every one that was added, by one of the measures, the first unless named."""
        return self._similarity[measure or self.measures[0]](pictures)

    def clearest(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
        """Every picture against every one that was added, by the measure that speaks clearest: each (N, M).

        Returns how far above that measure's threshold they are, as a share of what is left to 1, where above 0 is a copy; the
        similarity; and the number of the measure in `measures`.
        """
        values = torch.stack([self.similarity(pictures, name) for name in self.measures])
        thresholds = torch.tensor([self.thresholds[name] for name in self.measures])[:, None, None]
        margins, chosen = ((values - thresholds) / (1 - thresholds)).max(dim=0)
        return margins, values.gather(0, chosen[None])[0], chosen


class Index(Comparison):
    """Training images, and how like them pictures are.

    on_error: of an image that cannot be read; see `Faults`. The rest is `Comparison`'s.

    images: those that could be read. sha256: of their names and contents.

    Raises ValueError, too, for an image that cannot be read, or where there is none.
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
        """Of each picture the nearest training image, by the measure in which it stands out most from its threshold.

        similarity, measure: how like it is, by which measure. nearest: the training image, a path. copy: above the threshold?
        """
        margins, values, chosen = self.clearest(pictures)
        found = []
        for k, where in enumerate(margins.argmax(dim=1).tolist()):
            name, value = self.measures[int(chosen[k, where])], values[k, where].item()
            said = {"similarity": round(value, 4), "measure": name, "nearest": self.images[where]}
            found.append({**said, "copy": value > self.thresholds[name]})
        return found


class Copies:
    """Compares images of a run with the training images in a folder, for its manifest. The rest is `Index`'s."""

    def __init__(
        self, folder: Path, measures: Sequence[str] | None = None, threshold: float | None = None, on_error: str = "stop"
    ):
        self._folder, self._index = folder, Index(images_in(folder), measures, threshold, on_error)
        index = self._index
        self.settings = {"images": len(index.images), "sha256": index.sha256, "thresholds": index.thresholds}

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        (found,) = self._index([image])
        return {**found, "nearest": str(found["nearest"].relative_to(self._folder))}


class Duplicates:
    """What the manifest of a run says of each picture beside the others of the set, against a model's favourite picture.

    nearest_in_set, similarity_in_set, measure_in_set: the id of the other picture that is most like it, and how like it is.
    duplicate_of: the id of the first picture before it, in the order of the prompts, that it is a near-duplicate of and that is
        itself none; only where there is one. So those without it are a set without near-duplicates.

    A picture takes about 10 KB of memory by its pixels and 2 KB by sscd, and is compared with every other. The rest is
    `Comparison`'s.
    """

    names = ("nearest_in_set", "similarity_in_set", "measure_in_set", "duplicate_of")

    def __init__(self, measures: Sequence[str] | None = None, threshold: float | None = None):
        self._given = measures, threshold
        self.settings = {"thresholds": Comparison(measures, threshold).thresholds}

    def __call__(self, pictures: Iterable[tuple[str, bytes]]) -> dict[str, dict[str, Any]]:
        """What is said of each picture, by id. pictures: ids and files, in the order of the prompts, read one after another."""
        compared, ids, kept = Comparison(*self._given), list[str](), torch.empty(0, dtype=torch.bool)
        nearest, notes, pictures = torch.empty(4, 0, dtype=torch.float64), dict[str, dict[str, Any]](), iter(pictures)
        while some := list(islice(pictures, BLOCK)):
            start = len(ids)
            ids += [id for id, _ in some]
            images = [opened(data, f"image {id}") for id, data in some]
            compared.add(images)
            margins, values, measures = compared.clearest(images)
            for k, id in enumerate(ids[start:]):
                margins[k, start + k] = -torch.inf
                earlier = torch.nonzero((margins[k, : start + k] > 0) & kept).flatten()
                kept = torch.cat([kept, torch.tensor([not len(earlier)])])
                notes[id] = {"duplicate_of": ids[int(earlier[0])]} if len(earlier) else {}
            if start:
                of_earlier = _nearest(margins[:, :start], values[:, :start], measures[:, :start], 0)
                of_earlier[3] += start
                nearest = torch.where(of_earlier[0] > nearest[0], of_earlier, nearest)
            nearest = torch.cat([nearest, _nearest(margins, values, measures, 1)], dim=1)
        for id, (margin, value, measure, where) in zip(ids, nearest.T.tolist(), strict=True):
            if margin > -torch.inf:  # it is not the only one
                name = compared.measures[int(measure)]
                notes[id] |= {"nearest_in_set": ids[int(where)], "similarity_in_set": round(value, 4), "measure_in_set": name}
        return notes


def _nearest(margins: Tensor, values: Tensor, measures: Tensor, dim: int) -> Tensor:
    """Of what `Comparison.clearest` returns, the largest margins over a dimension, with value, measure and place: (4, n)."""
    top, where = margins.max(dim)
    chosen = where.unsqueeze(dim)
    return torch.stack([top.double(), *(one.gather(dim, chosen).squeeze(dim) for one in (values, measures)), where])
