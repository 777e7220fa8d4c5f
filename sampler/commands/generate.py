"""`basinescape generate`: an image for every prompt of a file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from . import model_loading
from .generate_options import Copies, Most, Output, Pictures, Speed, Where
from .guidance import guidances
from .guidance_options import GuidanceOptions, Method
from .quiet import quieten
from .runs import conclude, looked_at, shard_of, stoppable

if TYPE_CHECKING:
    from ..bulk.settings import Files

log = logging.getLogger(__name__)
EXAMPLE = """
  basinescape generate --model my-model --prompts prompts.jsonl --out set
  where prompts.jsonl has lines such as
  {"prompt": "a cat", "count": 4, "height": 512, "width": 768}"""


def generate(most: Most, guidance: GuidanceOptions, pictures: Pictures, output: Output, copies: Copies, speed: Speed) -> None:
    """Make an image for every prompt of a file. The same command goes on where it was stopped, and after prompts were added."""
    from ..data.prompts import Prompts

    shard, shown = shard_of(output.shard), looked_at(output.log, output.metrics, output.metrics_host, output.progress)
    jobs = Prompts(most.prompts, most.seed, output.on_error, most.count, later=True)
    if most.model is None:
        log.warning("no --model is given: the pictures are of 'tiny', a small one that ships, to try things out")
    model = most.model or "tiny"
    with stoppable():
        quieten()
        from ..bulk.generate import generate
        from ..bulk.settings import Placement, Recipe
        from ..calibration.calibration import steps_and_scale

        guidance.check()
        files = _files(output, shard, copies)
        known = model_loading.found(model, guidance.calibration)
        if guidance.method == Method.guard:
            known = model_loading.of_enough(known, guidance.calibration)
        names = ("device", "dtype", "attention", "allow_pickle", "compile", "capture")
        loading: dict[str, Any] = {name: getattr(speed, name) for name in names}
        load, scheduler = None, model_loading.scheduler_of(pictures.scheduler, known)
        if speed.workers is not None and speed.engine == Where.local:
            raise ValueError(f"workers is {speed.workers}, and this process works alone: give --engine ray, too")
        if speed.engine == Where.ray:
            load, loading = model_loading.for_workers(model, scheduler, loading, speed.workers)
        sampler = model_loading.sampler(model, known, scheduler, pictures.option, pictures.height, pictures.width, **loading)
        steps, scale = steps_and_scale(sampler, known, most.steps, guidance.scale)
        asked = {Method(kind.guidance) for kind in jobs.kinds if kind.guidance}
        own, named = guidances(guidance, sampler, known, steps, scale, asked)
        recipe = Recipe(own, steps, negative_prompt=pictures.negative_prompt, clip_skip=pictures.clip_skip, named=named)
        placement = Placement(speed.batch_size, load, speed.workers)
        conclude(generate(sampler, jobs, most.out, recipe, model, files, placement, shown), files.folder(most.out), model)


def _files(output: Output, shard: tuple[int, int] | None, copies: Copies) -> Files:
    """Return how pictures are written. Raises ValueError for an option without another that it needs."""
    from ..bulk.settings import Files
    from ..data.signing import Signer

    given: dict[str, Any] = {"captions": output.captions, "prompt_metadata": output.prompt_metadata}
    folder, measures = copies.training_images, (copies.similarity or None, copies.threshold)
    if folder is not None or copies.dedup:
        from ..auditing.duplicates import Duplicates
        from ..auditing.training_images import Copies as NearestTrainingImage

        given |= {"copies": NearestTrainingImage(folder, *measures, output.on_error)} if folder is not None else {}
        given |= {"duplicates": Duplicates(*measures)} if copies.dedup else {}
    elif measures != (None, None):
        raise ValueError("similarity and threshold compare pictures: give --training-images or --dedup, too")
    if (output.c2pa_certificate is None) != (output.c2pa_key is None):
        raise ValueError("c2pa_certificate and c2pa_key need each other: give both, or neither")
    if output.c2pa_certificate is not None and output.c2pa_key is not None:
        given["signer"] = Signer(output.c2pa_certificate, output.c2pa_key, output.format)
    return Files(output.format, shard, **given)
