"""The worst captions sampled to the end: pictures, their basin scores, where each was pushed, and what the model remembers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data.pictures import opened
from ..detection import basin
from ..guidance.guidance import Guidance
from ..runs.atomic import save_image
from ..runs.journal import Journal, read_lines
from ..runs.progress import moving, parts
from ..sampler import Sampler
from .heat import Heat, in_grey
from .index import Index
from .ranking import Look, bar, each

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
    """Plainly guided pictures of captions, in the folder `out`, judged.

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

    def __call__(self, looks: Sequence[Look], index: Index | None) -> dict[str, list[dict[str, Any]]]:
        """Lines about the pictures of each caption by its id, a copy or what is most like one first.

        looks: the captions, each with its pictures' seeds. A line has id, seed, score and suspect and, where there is an index
        of training images, what `Found` has. What fails is logged and has no line; it is made when the audit is run again.
        """
        files = Files(self.out)
        for path in (files.heat("", 0), files.prediction("")):
            path.parent.mkdir(exist_ok=True)
        lines = self._pictures(looks, files)
        self._predictions([look for look in looks if not files.prediction(look[0]).is_file()], files)
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

    def _pictures(self, looks: Sequence[Look], files: Files) -> list[dict[str, Any]]:
        path = self.out / "verified.jsonl"
        tasks = [(id, text, seed) for id, text, seeds in looks for seed in seeds]

        def known(line: dict[str, Any]) -> tuple[str, int]:
            return line["id"], line["seed"]

        def there(line: dict[str, Any]) -> tuple[str, int] | None:
            return known(line) if files.picture(*known(line)).is_file() and files.heat(*known(line)).is_file() else None

        with Journal(path, there) as journal:
            lines = {known(line): line for line in read_lines(path)}
            waiting = [task for task in tasks if (task[0], task[2]) not in lines]
            with bar("verifying", len(tasks), len(tasks) - len(waiting), self.progress) as shown:
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
        found = [dict(lines[id, seed]) for id, _, seed in tasks if (id, seed) in lines]
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
        if not made.finite.all():
            id, _, seed = batch[made.finite.tolist().index(False)]
            raise ValueError(f"the picture {id}-{seed} is not finite")
        scores = self.sampler.judge(made.latents, texts, seeds, self.threshold, batch_size=self.size).score
        maps = map(in_grey, heat.maps(self.sampler, self.usual))
        return list(zip(map(still, made.images), maps, (round(score, 5) for score in scores.tolist()), strict=True))

    def _predictions(self, looks: Sequence[Look], files: Files) -> None:
        with bar("remembered", len(looks), 0, self.progress and bool(looks)) as shown:
            for part in parts(len(looks), self.size):
                for some, made in each(lambda batch: predictions(self.sampler, batch), [looks[i] for i in part]):
                    for (id, _, _), picture in zip(some, [] if isinstance(made, Exception) else made, strict=False):
                        save_image(picture, files.prediction(id))
                    shown.update(len(some))


@torch.inference_mode()
def predictions(sampler: Sampler, looks: Sequence[Look]) -> list[Image.Image]:
    """What the model has in mind of each caption: its one-step conditional prediction from nothing but noise, decoded.

    From the first noise that a picture with the caption's first seed is judged by. Of a memorized caption it shows the training
    image, or the mixture of several; of others a blur.
    """
    model, probe = sampler.model, basin.Probe.of(sampler.scheduler)
    (height, width), options = sampler.size(), sampler.options
    shape = model.shape(height, width, **options)
    encoded = model.encode([text for _, text, _ in looks], height, width, **options)
    seeds = [seeds[0] for _, _, seeds in looks]
    noise = torch.stack([next(basin.noises(seed, shape)) for seed in seeds])
    given = (probe.given[1] * noise).to(model.device, model.dtype)
    told = torch.full((len(looks),), probe.timestep, device=model.device)
    predicted = model.network(encoded, plain=True)(given, told, "cond")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    latents = probe.cleaned(given, predicted).to(model.dtype)
    made = model.decode(latents, "pil", generators, height, width, **options)
    sampler.pipe.maybe_free_model_hooks()
    return list(map(still, made.images))


def still(picture: Image.Image | Sequence[Image.Image]) -> Image.Image:
    """A picture, or the middle one of a video's."""
    return picture if isinstance(picture, Image.Image) else picture[len(picture) // 2]
