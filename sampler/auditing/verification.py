"""The worst captions sampled to the end: their pictures, basin scores, maps of the noise gap, and one-step predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..calibration.cost_bar import PlainRuns
from ..data.pictures import opened
from ..detection import basin_score
from ..guidance.guidance import Guidance
from ..runs.atomic import save_image
from ..runs.batch_retry import halving, parts
from ..runs.jsonl_journal import Journal, read_lines
from ..runs.progress import moving
from ..sampler import Sampler
from .heat import Heat, in_grey
from .ranking import Task
from .training_images import TrainingImages

# Paths in an audit's folder, to be formatted with a line about a picture.
PICTURE, HEAT, PREDICTION = "images/{id}-{seed}.png", "heat/{id}-{seed}.png", "predictions/{id}.png"
Line = dict[str, Any]


@dataclass(frozen=True)
class Verification:
    """Makes pictures of captions, into the folder `out`, and judges them.

    usual: the usual noise gaps of a run's first steps, over which the maps of heat are summed. threshold: of the basin score.
    index: of the training images; None: there are none.
    """

    runs: PlainRuns
    out: Path
    usual: Sequence[float]
    threshold: float
    index: TrainingImages | None

    def __call__(self, tasks: Sequence[Task]) -> dict[str, list[Line]]:
        """Return lines about the pictures of each caption, by its id: copies first, then by falling score.

        tasks: the captions, each with its pictures' seeds. A line has id, seed, score and suspect and, if there is an index of
        training images, the fields that it returns. A picture that fails is logged and has no line; the next run of the audit
        makes it.
        """
        for name in (HEAT, PREDICTION):
            (self.out / name).parent.mkdir(exist_ok=True)
        lines = self._pictures(tasks)
        self._predictions(tasks)
        if self.index is not None:
            for part in parts(len(lines), self.runs.size):
                some = [lines[i] for i in part]
                pictures = [opened(path := self.out / PICTURE.format(**line), str(path)) for line in some]
                for line, found in zip(some, self.index(pictures), strict=True):
                    line |= found | {"nearest": str(found["nearest"])}
        by_id: dict[str, list[Line]] = {}
        for line in sorted(lines, key=lambda line: (-line.get("copy", False), -line["score"])):
            by_id.setdefault(line["id"], []).append(line)
        return by_id

    def _pictures(self, tasks: Sequence[Task]) -> list[Line]:
        path = self.out / "verified.jsonl"
        asked = [(id, seed, text) for id, text, seeds in tasks for seed in seeds]

        def known(line: Line) -> tuple[str, int] | None:
            there = all(_readable(self.out / name.format(**line)) for name in (PICTURE, HEAT))
            return (line["id"], line["seed"]) if there else None

        with Journal(path, known) as journal:
            lines = {(line["id"], line["seed"]): line for line in read_lines(path)}
            waiting = [one for one in asked if one[:2] not in lines]
            texts = [text for _, _, text in waiting]
            with self.runs.bar("pictures", "pictures", len(asked), len(asked) - len(waiting), texts) as shown:
                for part in parts(len(waiting), self.runs.size):
                    for some, made in halving(lambda batch: self._sampled(batch, shown), [waiting[i] for i in part]):
                        for (id, seed, _), one in zip(some, [] if isinstance(made, Exception) else made, strict=False):
                            picture, heat, score = one
                            line = lines[id, seed] = {"id": id, "seed": seed, "score": score}
                            save_image(picture, self.out / PICTURE.format(**line))
                            save_image(heat, self.out / HEAT.format(**line))
                            journal.append(line)
                        shown.update(len(some))
        found = [dict(lines[one[:2]]) for one in asked if one[:2] in lines]
        for line in found:
            line["score"] = math.nan if line["score"] is None else line["score"]
            line["suspect"] = bool(basin_score.suspects(line["score"], self.threshold))
        return found

    def _sampled(self, batch: Sequence[tuple[str, int, str]], shown: tqdm) -> list[tuple[Image.Image, Image.Image, float]]:
        """Return picture, heat and score of each (id, seed, text)."""
        runs, heat = self.runs, Heat(len(self.usual))
        texts, seeds = [text for _, _, text in batch], [seed for _, seed, _ in batch]
        sampler, progress = runs.sampler.wrapped(heat.watch), moving(shown, len(batch))
        made = sampler(texts, seeds, runs.steps, Guidance.cfg(runs.scale), progress=progress)
        finite = made.latents.isfinite().flatten(1).all(dim=1) if made.finite is None else made.finite
        if not finite.all():
            id, seed, _ = batch[finite.tolist().index(False)]
            raise ValueError(f"the picture {id}-{seed} is not finite")
        scores = runs.sampler.judge(made.latents, texts, seeds, self.threshold, batch_size=runs.size).score
        maps = map(in_grey, heat.maps(runs.sampler, self.usual))
        return list(zip(map(still, made.images), maps, (round(score, 5) for score in scores.tolist()), strict=True))

    def _predictions(self, tasks: Sequence[Task]) -> None:
        waiting = [task for task in tasks if not _readable(self.out / PREDICTION.format(id=task[0]))]
        with self.runs.bar("one-step predictions", "captions", len(tasks), len(tasks) - len(waiting), ()) as shown:
            for part in parts(len(waiting), self.runs.size):
                for some, made in halving(lambda batch: predictions(self.runs.sampler, batch), [waiting[i] for i in part]):
                    for (id, _, _), picture in zip(some, [] if isinstance(made, Exception) else made, strict=False):
                        save_image(picture, self.out / PREDICTION.format(id=id))
                    shown.update(len(some))


def _readable(path: Path) -> bool:
    try:
        opened(path, str(path))
    except ValueError:  # it is missing or broken, and is made again
        return False
    return True


@torch.inference_mode()
def predictions(sampler: Sampler, tasks: Sequence[Task]) -> list[Image.Image]:
    """Return the one-step conditional prediction of each caption from pure noise, decoded.

    The noise is the first of those that judge a picture of the caption's first seed. For a memorized caption the prediction
    shows the training image, or a mixture of several; for others it is a blur.
    """
    model, probe = sampler.model, basin_score.Probe.of(sampler.scheduler)
    (height, width), options = sampler.size(), sampler.options
    shape = model.shape(height, width, **options)
    encoded = model.encode([text for _, text, _ in tasks], height, width, **options)
    seeds = [seeds[0] for _, _, seeds in tasks]
    noise = torch.stack([next(basin_score.noises(seed, shape)) for seed in seeds])
    given = (probe.given[1] * noise).to(model.device, model.dtype)
    timesteps = torch.full((len(tasks),), probe.timestep, device=model.device)
    predicted = model.network(encoded, plain=True)(given, timesteps, "cond")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    latents = probe.cleaned(given, predicted).to(model.dtype)
    made = model.decode(latents, "pil", generators, height, width, **options)
    pipe: Any = sampler.pipe  # mypy does not see the methods of diffusers' pipelines
    pipe.maybe_free_model_hooks()
    return list(map(still, made.images))


def still(picture: Image.Image | Sequence[Image.Image]) -> Image.Image:
    """Return a picture itself, or the middle frame of a video."""
    return picture if isinstance(picture, Image.Image) else picture[len(picture) // 2]
