"""The quality of an evaluation's images: text alignment, distance from ordinary images, similarity to training images.

It is computed from the saved images of a run folder, so that a measure may be added long after the run. The folder gets
`quality.csv`, a row for each method and group, and `quality.jsonl`, a line an image; the same images give the same files.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basinescape.auditing.measures import EMBEDDINGS, Embedding, projected
from basinescape.data.pictures import images_in, opened, pixels
from basinescape.data.tables import write_csv
from basinescape.runs.atomic import atomic_write
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm import tqdm

from ..scenario import Scenario, limited, prompts
from .classifier import ConceptClassifier
from .evaluate import image_path, read_run
from .measure import ScenarioImages
from .metrics import interval
from .scenes import CONCEPTS, FLOW_CONCEPTS, SIZE, draw_facts, flow_scene, tiny_scene

log = logging.getLogger(__name__)

BATCH = 64  # images in memory at a time
SUBSETS, SUBSET = 100, 100  # of KID; a group of fewer images has subsets of half of them
FEWEST = 4  # images with a distance: half of them are a subset of KID, which compares pairs
SCENES, FIRST = 2000, 3_000_000_000  # reference scenes, and seeds that neither training nor the threshold use

PerImage = Callable[[Sequence[Image.Image], Sequence[dict[str, Any]]], list[float]]  # of images and their results.jsonl lines


def quality(
    run: str | Path,
    clip: str | None = None,
    features: str | None = "concept",
    references: str | Path | None = None,
    similarity: str | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure the saved images of the run folder `run`; returns the rows of `quality.csv`.

    clip:       a CLIP model, folder or hub id, for `clip_score` with its 95% bootstrap over prompts; None: not computed.
    features:   one of FEATURES for `fid`, `kid_mean` and `kid_std`; None: not computed.
    references: the folder, searched through, of the images that FID and KID are the distance from; None: 2,000 fresh scenes,
                for a pipeline that ships alone.
    similarity: a name that `Similarity` knows, for its mean and 95th percentile; None: not computed.

    An image that is missing or broken is counted as such, logged and left out. Raises, before anything is measured or
    written, ValueError for a bad argument, FileNotFoundError for what is not there, ImportError or OSError for a model that
    is not installed or cannot be loaded.
    """
    folder = Path(run)
    settings, lines = read_run(folder)
    scenario = Scenario.read(settings["scenario"])
    if clip is None and features is None and similarity is None:
        raise ValueError("clip, features and similarity are all None: nothing to measure")
    paths = _check(scenario, features, references)
    measures: dict[str, PerImage] = {}
    if similarity is not None:
        measures[similarity] = _likeness(similarity, scenario, settings["limit"], lines)
    if clip is not None:
        measures["clip_score"] = clip_scores(clip)
    embed = FEATURES[features](scenario) if features is not None else None
    real = _embedded(embed, map(_opened, paths) if references is not None else fresh_scenes(scenario.model)) if embed else None

    rows, entries = [], []
    for method, group in tqdm(dict.fromkeys((line["method"], line["group"]) for line in lines), disable=not progress):
        part = [line for line in lines if (line["method"], line["group"]) == (method, group)]
        found, made = _measured(folder, sorted(part, key=lambda line: (line["id"], line["seed"])), measures, embed)
        if found:
            row: dict[str, Any] = {"method": method, "group": group, "n": len(found), "missing": len(part) - len(found)}
            row |= {"clip": clip} | _alignment(found) if clip is not None else {}
            row |= _alike(similarity, found) if similarity is not None else {}
            if real is not None and made is not None:
                row |= {"features": features, **distances(real, made)}
                if len(made) < FEWEST:
                    log.warning("%s, %s: no distance of %d images, which takes %d or more", method, group, len(made), FEWEST)
            rows.append(row)
            entries += found
    if not rows:
        raise ValueError(f"run folder {str(folder)!r} holds no image that can be read")
    write_csv(folder / "quality.csv", rows)
    with atomic_write(folder / "quality.jsonl") as file:
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return rows


def _check(scenario: Scenario, features: str | None, references: str | Path | None) -> list[Path]:
    """The reference images; raises for features and references that do not fit the run."""
    if features is not None and features not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(FEATURES)}, or None; got {features!r}")
    if features == "concept" and not (Path(scenario.source) / "classifier").is_dir():
        raise ValueError(
            f"features 'concept' need a classifier beside the model, and {scenario.model!r} has none: choose others, or none"
        )
    if references is None:
        if features is not None and scenario.model not in FRESH:
            raise ValueError(f"references must be a folder of images for scenario {scenario.name!r}, got None")
        return []
    if not Path(references).is_dir():
        raise FileNotFoundError(f"references folder {str(references)!r} does not exist")
    paths = images_in(references)
    if len(paths) < FEWEST:
        raise ValueError(f"references folder {str(references)!r} must hold at least {FEWEST} images, has {len(paths)}")
    return paths


def _likeness(name: str, scenario: Scenario, limit: int | None, lines: Sequence[dict[str, Any]]) -> PerImage:
    """Similarity to the prompt's training image, as the evaluation measures it."""
    groups = limited(prompts(scenario), limit)
    known = {(group, prompt.id): prompt for group, found in groups.items() for prompt in found}
    strangers = {(line["group"], line["id"]) for line in lines} - known.keys()
    if strangers:
        raise ValueError(f"scenario {scenario.name!r} no longer has the run's {' prompt '.join(min(strangers))}")
    measure = ScenarioImages(name, groups)

    def alike(images: Sequence[Image.Image], found: Sequence[dict[str, Any]]) -> list[float]:
        matched = measure(images, [known[line["group"], line["id"]] for line in found])
        return [match["similarity"] for match in matched]

    return alike


def _measured(
    folder: Path, lines: Sequence[dict[str, Any]], measures: dict[str, PerImage], embed: Embedding | None
) -> tuple[list[dict[str, Any]], np.ndarray | None]:
    """The entries of quality.jsonl for those lines whose image can be read, and these images' features (N, D)."""
    entries, parts, missing = [], [], []

    def readable() -> Iterator[tuple[Image.Image, dict[str, Any]]]:
        for line in lines:
            try:
                yield _opened(image_path(folder, line)), line
            except OSError as error:
                missing.append(f"{image_path(folder, line)} ({type(error).__name__})")

    found = readable()
    while batch := list(islice(found, BATCH)):
        images, here = zip(*batch, strict=True)
        columns = {name: measure(images, here) for name, measure in measures.items()}
        for i, line in enumerate(here):
            values = {name: round(column[i], 5) for name, column in columns.items()}
            entries.append({name: line[name] for name in ("method", "group", "id", "seed")} | values)
        if embed:
            parts.append(embed(images))
    if missing:
        names = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        log.warning("%d of %d images are left out: %s", len(missing), len(lines), names)
    return entries, np.concatenate(parts) if parts else None


def _opened(path: Path) -> Image.Image:
    """The image, in RGB; raises OSError where it is missing or broken."""
    try:
        return opened(path, f"image {str(path)!r}")
    except ValueError as error:
        raise OSError(str(error)) from error


def _embedded(embed: Embedding, images: Iterable[Image.Image]) -> np.ndarray:
    """Features (N, D) of the images, some at a time."""
    images, parts = iter(images), []
    while batch := list(islice(images, BATCH)):
        parts.append(embed(batch))
    return np.concatenate(parts)


def fresh_scenes(model: str, count: int = SCENES) -> Iterator[Image.Image]:
    """What ordinary pictures of a model of FRESH ought to look like: every concept equally often, always the same scenes.

    Raises FileNotFoundError where the font of the glyphs is missing.
    """
    return (FRESH[model](i) for i in range(count))


def _scene_of_tiny(i: int) -> Image.Image:
    return tiny_scene(list(CONCEPTS)[i % len(CONCEPTS)], FIRST + i)


def _scene_of_flow(i: int) -> Image.Image:
    return flow_scene(draw_facts(np.random.default_rng(FIRST + i), FLOW_CONCEPTS[i % len(FLOW_CONCEPTS)]), FIRST + i)


FRESH = {"tiny": _scene_of_tiny, "flow": _scene_of_flow}


def _alignment(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    values = [entry["clip_score"] for entry in entries]
    low, high = interval(values, [entry["id"] for entry in entries])
    return {"clip_score": _short(np.mean(values)), "clip_low": _short(low), "clip_high": _short(high)}


def _alike(name: str, entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    values = [entry[name] for entry in entries]
    return {f"{name}_mean": _short(np.mean(values)), f"{name}_p95": _short(np.quantile(values, 0.95))}


def distances(real: np.ndarray, made: np.ndarray) -> dict[str, float | None]:
    """`fid`, `kid_mean` and `kid_std` of features (N, D) and (M, D); None where there are too few."""
    if min(len(real), len(made)) < FEWEST:
        return dict.fromkeys(("fid", "kid_mean", "kid_std"))
    mean, deviation = kid(real, made)
    return {"fid": _short(fid(real, made)), "kid_mean": _short(mean), "kid_std": _short(deviation)}


def _short(value: float) -> float:
    """Five digits: KID is small where features have length 1."""
    return float(f"{value:.5g}")


def fid(real: np.ndarray, made: np.ndarray) -> float:
    """Frechet distance of the Gaussians of two sets of features, (N, D) and (M, D), each of at least 2 images.

    Heusel et al., NeurIPS 2017, https://arxiv.org/abs/1706.08500. Biased upwards for small sets: compare sets of one size.
    """
    return _compared(FrechetInceptionDistance, real, made).item()


def kid(real: np.ndarray, made: np.ndarray, subsets: int = SUBSETS, size: int = SUBSET) -> tuple[float, float]:
    """Mean and deviation, over random subsets, of the squared polynomial MMD of features (N, D) and (M, D).

    Binkowski et al., ICLR 2018, https://arxiv.org/abs/1801.01401. The mean is unbiased at any size. Always the same subsets.
    """
    if min(len(real), len(made)) < size:
        size = min(len(real), len(made)) // 2
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features are kept in memory
        torch.manual_seed(0)
        mean, deviation = _compared(partial(KernelInceptionDistance, subsets=subsets, subset_size=size), real, made)
    return mean.item(), deviation.item()


def _compared(metric: Callable[..., Any], real: np.ndarray, made: np.ndarray) -> Any:
    """A metric of torchmetrics on features that are there already: it would extract them once for each metric."""
    extractor: Any = nn.Identity()
    extractor.num_features = real.shape[1]
    found = metric(extractor)
    found.update(torch.from_numpy(real).double(), real=True)
    found.update(torch.from_numpy(made).double(), real=False)
    return found.compute()


def clip_scores(model: str) -> PerImage:
    """The CLIP score of each image and its prompt: 100 times the cosine of their embeddings, 0 where that is negative.

    Hessel et al., EMNLP 2021, https://arxiv.org/abs/2104.08718. model: folder or hub id; only safetensors are loaded. Raises
    OSError where the model cannot be had.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        network = CLIPModel.from_pretrained(model, use_safetensors=True).eval()
        processor = CLIPProcessor.from_pretrained(model)
    except OSError as error:
        raise OSError(f"clip must be a CLIP model in safetensors, a folder or hub id; got {model!r}: {error}") from error

    @torch.inference_mode()
    def score(images: Sequence[Image.Image], lines: Sequence[dict[str, Any]]) -> list[float]:
        shown = projected(network.get_image_features(**processor(images=list(images), return_tensors="pt")))
        texts = [line["prompt"] for line in lines]
        read = processor(
            text=texts, return_tensors="pt", padding=True, truncation=True
        )  # the end token is kept: CLIP reads there
        said = projected(network.get_text_features(**read))
        return (100 * torch.cosine_similarity(shown, said)).clamp(min=0).tolist()

    return score


def concept(scenario: Scenario) -> Embedding:
    """What the concept classifier beside the model sees before it decides: 128 numbers an image."""
    network = ConceptClassifier.load(Path(scenario.source) / "classifier")

    @torch.inference_mode()
    def embed(images: Sequence[Image.Image]) -> np.ndarray:
        size = (SIZE, SIZE)
        fitted = [image if image.size == size else image.resize(size, Image.Resampling.BOX) for image in images]
        return network.pooled(pixels(fitted)).numpy()

    return embed


def inception(scenario: Scenario) -> Embedding:
    """Inception-v3 as FID and KID were defined with: 2,048 numbers an image.

    Needs torch-fidelity, which needs torchvision and downloads the weights, a pickle. Raises ImportError without it.
    """
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"])

    @torch.inference_mode()
    def embed(images: Sequence[Image.Image]) -> np.ndarray:
        return torch.cat([network(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]) for image in images]).numpy()

    return embed


def _whatever_scenario(make: Callable[[], Embedding]) -> Callable[[Scenario], Embedding]:
    return lambda scenario: make()


FEATURES: dict[str, Callable[[Scenario], Embedding]] = {
    "concept": concept,
    "inception": inception,
    **{name: _whatever_scenario(make) for name, make in EMBEDDINGS.items()},
}
