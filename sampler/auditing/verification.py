"""The worst captions sampled to the end: their pictures, basin scores, maps of the noise gap, and one-step predictions."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..calibration import cost
from ..data.pictures import opened
from ..detection import basin
from ..guidance.guidance import Guidance
from ..runs.atomic import save_image
from ..runs.journal import Journal, read_lines
from ..runs.progress import moving, parts
from ..sampler import Sampler
from .heat import Heat, in_grey
from .index import Index
from .ranking import Task, bar, each

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """Where an audit's folder `out` has its pictures."""

    out: Path

    def picture(self, id: str, seed: int) -> Path:
        return self.out / "images" / f"{id}-{seed}.png"

    def heat(self, id: str, seed: int) -> Path:
        return self.out / "heat" / f"{id}-{seed}.png"

    def prediction(self, id: str) -> Path:
        return self.out / "predictions" / f"{id}.png"


@dataclass(frozen=True)
class Verification:
    """Makes pictures of captions with plain guidance, into the folder `out`, and judges them.

    steps, scale: of a run. usual: the usual noise gaps of its first steps, over which the maps of heat are summed.
    threshold: of the basin score. size: samples a batch.
    """

    sampler: Sampler
    out: Path
    steps: int
    scale: float
    usual: Sequence[float]
    threshold: float
    size: int
    progress: bool

    def __call__(self, tasks: Sequence[Task], index: Index | None) -> dict[str, list[dict[str, Any]]]:
        """Lines about the pictures of each caption by its id: copies first, then by falling score.

        tasks: the captions, each with its pictures' seeds. A line has id, seed, score and suspect and, where there is an index
        of training images, what `Found` has. A picture that fails is logged and has no line; it is made when the audit is run
        again.
        """
        files = Files(self.out)
        for path in (files.heat("", 0), files.prediction("")):
            path.parent.mkdir(exist_ok=True)
        lines = self._pictures(tasks, files)
        self._predictions([task for task in tasks if not files.prediction(task[0]).is_file()], files)
        if index is not None:
            for part in parts(len(lines), self.size):
                some = [lines[i] for i in part]
                pictures = [opened(path := files.picture(line["id"], line["seed"]), str(path)) for line in some]
                for line, found in zip(some, index(pictures), strict=True):
                    line |= {"copy": found.copy, "similarity": found.similarity, "measure": found.measure}
                    line["nearest"] = str(found.image)
        by_id: dict[str, list[dict[str, Any]]] = {}
        for line in sorted(lines, key=lambda line: (-line.get("copy", False), -line["score"])):
            by_id.setdefault(line["id"], []).append(line)
        return by_id

    def _pictures(self, tasks: Sequence[Task], files: Files) -> list[dict[str, Any]]:
        path = self.out / "verified.jsonl"
        pictures = [(id, text, seed) for id, text, seeds in tasks for seed in seeds]

        def known(line: dict[str, Any]) -> tuple[str, int]:
            return line["id"], line["seed"]

        def there(line: dict[str, Any]) -> tuple[str, int] | None:
            return known(line) if files.picture(*known(line)).is_file() and files.heat(*known(line)).is_file() else None

        with Journal(path, there) as journal:
            lines = {known(line): line for line in read_lines(path)}
            waiting = [one for one in pictures if (one[0], one[2]) not in lines]
            if waiting and self.progress:
                texts, (size, steps) = [text for _, text, _ in waiting], (self.size, self.steps)
                cost.announce("pictures to verify", self.sampler, texts, len(texts), steps, steps, self.scale, size)
            with bar("pictures", len(pictures), len(pictures) - len(waiting), self.progress) as shown:
                for part in parts(len(waiting), self.size):
                    for some, made in each(lambda batch: self._sampled(batch, shown), [waiting[i] for i in part]):
                        for (id, _, seed), one in zip(some, [] if isinstance(made, Exception) else made, strict=False):
                            picture, heat, score = one
                            save_image(picture, files.picture(id, seed))
                            save_image(heat, files.heat(id, seed))
                            line = {"id": id, "seed": seed, "score": score}
                            journal.append(line)
                            lines[id, seed] = line
                        shown.update(len(some))
        found = [dict(lines[id, seed]) for id, _, seed in pictures if (id, seed) in lines]
        for line in found:
            line["score"] = math.nan if line["score"] is None else line["score"]
            line["suspect"] = bool(basin.suspects(line["score"], self.threshold))
        return found

    def _sampled(self, batch: Sequence[tuple[str, str, int]], shown: Any) -> list[tuple[Image.Image, Image.Image, float]]:
        """Picture, heat and score of each (id, text, seed)."""
        texts, seeds = [text for _, text, _ in batch], [seed for _, _, seed in batch]
        heat = Heat(len(self.usual))
        told = moving(shown, len(batch))
        made = self.sampler.wrapped(heat.watch)(texts, seeds, self.steps, Guidance.cfg(self.scale), progress=told)
        finite = made.latents.isfinite().flatten(1).all(dim=1) if made.finite is None else made.finite
        if not finite.all():
            id, _, seed = batch[finite.tolist().index(False)]
            raise ValueError(f"the picture {id}-{seed} is not finite")
        scores = self.sampler.judge(made.latents, texts, seeds, self.threshold, batch_size=self.size).score
        maps = map(in_grey, heat.maps(self.sampler, self.usual))
        return list(zip(map(still, made.images), maps, (round(score, 5) for score in scores.tolist()), strict=True))

    def _predictions(self, tasks: Sequence[Task], files: Files) -> None:
        with bar("one-step predictions", len(tasks), 0, self.progress and bool(tasks)) as shown:
            for part in parts(len(tasks), self.size):
                for some, made in each(lambda batch: predictions(self.sampler, batch), [tasks[i] for i in part]):
                    for (id, _, _), picture in zip(some, [] if isinstance(made, Exception) else made, strict=False):
                        save_image(picture, files.prediction(id))
                    shown.update(len(some))


@torch.inference_mode()
def predictions(sampler: Sampler, tasks: Sequence[Task]) -> list[Image.Image]:
    """The one-step conditional prediction of each caption from pure noise, decoded.

    The noise is the first that a picture with the caption's first seed is judged by. For a memorized caption the prediction
    shows the training image, or a mixture of several; for others it is a blur.
    """
    model, probe = sampler.model, basin.Probe.of(sampler.scheduler)
    (height, width), options = sampler.size(), sampler.options
    shape = model.shape(height, width, **options)
    encoded = model.encode([text for _, text, _ in tasks], height, width, **options)
    seeds = [seeds[0] for _, _, seeds in tasks]
    noise = torch.stack([next(basin.noises(seed, shape)) for seed in seeds])
    given = (probe.given[1] * noise).to(model.device, model.dtype)
    told = torch.full((len(tasks),), probe.timestep, device=model.device)
    predicted = model.network(encoded, plain=True)(given, told, "cond")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    latents = probe.cleaned(given, predicted).to(model.dtype)
    made = model.decode(latents, "pil", generators, height, width, **options)
    pipe: Any = sampler.pipe  # mypy does not see the methods of diffusers' pipelines
    pipe.maybe_free_model_hooks()
    return list(map(still, made.images))


def still(picture: Image.Image | Sequence[Image.Image]) -> Image.Image:
    """A picture; of a video its middle frame."""
    return picture if isinstance(picture, Image.Image) else picture[len(picture) // 2]
