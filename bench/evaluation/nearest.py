"""The nearest training image of a picture, anywhere in a set: by several measures of likeness, each with its own threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basinescape.folder import files_sha256
from PIL import Image, ImageOps
from torch import Tensor

from . import metrics, similarity
from .metrics import EMBEDDINGS, MODELS, SIDE, pixels, unit

BATCH = 256  # images in memory at a time

# The similarity above which a picture counts as a copy. dino and clip have no usual one: these are high enough for near
# duplicates alone. `threshold` measures them where they can run.
THRESHOLDS = metrics.THRESHOLDS | {"dino": 0.9, "clip": 0.95}


@dataclass(frozen=True)
class Found:
    """The nearest training image of one picture, by the measure that speaks clearest of those that were asked."""

    measure: str
    similarity: float
    image: Path
    copy: bool


def installed() -> list[str]:
    """The measures that can run here and now: pixels always, the others where their packages and weights are."""
    there = ["pixels"]
    if metrics.installed("sscd"):
        there.append("sscd")
    from huggingface_hub import try_to_load_from_cache

    return there + [name for name, id in MODELS.items() if isinstance(try_to_load_from_cache(id, "model.safetensors"), str)]


class Nearest:
    """Finds the nearest of some training images.

    measures: names in THRESHOLDS; None: what is `installed`. threshold: of them all, in the place of their own.

    Raises ValueError for an unknown measure or an image that cannot be read, ImportError or OSError for a measure that lacks
    something.
    """

    def __init__(self, images: Sequence[Path], measures: Sequence[str] | None = None, threshold: float | None = None):
        self.images, self.measures = list(images), list(dict.fromkeys(measures or installed()))
        unknown = [name for name in self.measures if name not in THRESHOLDS]
        if unknown:
            raise ValueError(f"similarity must be among {', '.join(THRESHOLDS)}; got {unknown[0]!r}")
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold!r}")
        if not self.images:
            raise ValueError("there are no training images to compare with")
        self.thresholds = {name: threshold or THRESHOLDS[name] for name in self.measures}
        self._views = {name: _pixel_views if name == "pixels" else _embedded(name) for name in self.measures}
        parts: dict[str, list[Tensor]] = {name: [] for name in self.measures}
        for start in range(0, len(self.images), BATCH):
            opened = [_opened(path) for path in self.images[start : start + BATCH]]
            for name in self.measures:
                parts[name].append(_pixel_cores(opened) if name == "pixels" else self._views[name](opened)[0])
        self._search = {name: index(torch.cat(vectors)) for name, vectors in parts.items()}

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Found]:
        """The nearest training image of each picture: that of the measure in which it stands out most from its threshold."""
        found = []
        for name in self.measures:
            views = self._views[name](pictures)
            values, where = self._search[name](views.flatten(0, 1))
            best = values.view(views.shape[:2]).max(dim=0)
            where = where.view(views.shape[:2]).gather(0, best.indices[None])[0]
            found.append([self._found(name, *one) for one in zip(best.values.tolist(), where.tolist(), strict=True)])
        return [max(of, key=self._margin) for of in zip(*found, strict=True)]

    def _found(self, name: str, value: float, where: int) -> Found:
        return Found(name, round(value, 4), self.images[where], value > self.thresholds[name])

    def _margin(self, found: Found) -> float:
        threshold = self.thresholds[found.measure]
        return (found.similarity - threshold) / (1 - threshold)


class Copies:
    """What the manifest of a run says of an image beside the training images of a folder; the rest is `Nearest`'s."""

    def __init__(
        self, folder: Path, images: Sequence[Path], measures: Sequence[str] | None = None, threshold: float | None = None
    ):
        self._folder, self._nearest = folder, Nearest(images, measures, threshold)
        self.settings = {
            "images": len(images),
            "sha256": files_sha256(images),
            "thresholds": self._nearest.thresholds,
        }

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        (found,) = self._nearest([image])
        nearest = str(found.image.relative_to(self._folder))
        return {"similarity": found.similarity, "measure": found.measure, "nearest": nearest, "copy": found.copy}


def index(vectors: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What finds the largest inner product with `vectors` (M, D), and where: (N, D) -> (N,), (N,). Faiss where it is there."""
    if find_spec("faiss"):
        import faiss

        flat = faiss.IndexFlatIP(vectors.shape[1])
        flat.add(np.ascontiguousarray(vectors))

        def search(queries: Tensor) -> tuple[Tensor, Tensor]:
            values, where = flat.search(np.ascontiguousarray(queries), 1)
            return torch.from_numpy(values[:, 0]), torch.from_numpy(where[:, 0])

        return search
    return lambda queries: tuple((queries @ vectors.T).max(dim=1))


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # the latter is Pillow's for a broken PNG
        raise ValueError(f"training image {str(path)!r} cannot be read: {error}") from error


def _small(images: Sequence[Image.Image]) -> Tensor:
    return pixels([ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BOX) for image in images])


def _pixel_cores(images: Sequence[Image.Image]) -> Tensor:
    return similarity.cores(_small(images))


def _pixel_views(images: Sequence[Image.Image]) -> Tensor:
    return similarity.shifted(_small(images))


def _embedded(name: str) -> Callable[[Sequence[Image.Image]], Tensor]:
    embed = EMBEDDINGS[name]()
    return lambda images: torch.from_numpy(unit(embed(images)))[None]
