"""A run: a file of prompts in, a folder of images out, with a manifest that grows as images are finished.

The folder gets `images/<id>.png`, `manifest.jsonl` (a line an image) and `run.json` (all that is needed to make it again).
A run that was stopped goes on where it was when it is started again with the same settings; images that are gone or changed
since, and those that failed, are made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from tqdm import tqdm

from . import arguments, guard
from .batches import FORMAT, moving
from .folder import Journal, intact, open_folder, save_image, settings_of, sha256
from .guidance import Guidance
from .output import Output
from .prompts import Job
from .sampler import Sampler

log = logging.getLogger(__name__)


class Copies(Protocol):
    """What a run's images are compared with: `settings`, for run.json, and what a manifest line says of an image."""

    settings: Mapping[str, Any]

    def __call__(self, image: Image.Image) -> dict[str, Any]: ...


def describe(
    sampler: Sampler, model: str, jobs: Sequence[Job], negative_prompt: str | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Every setting and version that is needed to make a run again: the contents of run.json."""
    prompts = json.dumps([asdict(job) for job in jobs]).encode()
    return {
        "model": model,
        **settings,
        "guidance": settings["guidance"].to_dict(),
        "negative_prompt": negative_prompt,
        "prompts": len(jobs),
        "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
        **settings_of(sampler),
    }


def generate(
    sampler: Sampler,
    jobs: Sequence[Job],
    out: str | Path,
    guidance: Guidance,
    model: str,
    steps: int = 50,
    batch_size: int = 8,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    clip_skip: int | None = None,
    progress: bool = True,
    copies: Copies | None = None,
) -> list[dict[str, Any]]:
    """Make every job's image in the folder `out`; returns the manifest lines this call wrote, in the order it wrote them.

    model: what run.json calls the sampler's model.
    negative_prompt: of the jobs that have none of their own.
    height, width: pixels; default the model's own size.
    clip_skip: how many of the text encoder's last layers are left out, as in diffusers.
    copies: what else a manifest line says of its image, as how near it is to which training image.

    A manifest line says what was asked (id, prompt, seed, negative_prompt where there is one), `transition_step`,
    `transition_timestep`, `noise_gap`, and `status`: "ok" where the image is there and its pixels were finite, with the file's
    `sha256`, else "failed: " and why. Under a guard it has `attempts`, `score` and `suspect`. `nsfw_content_detected` is there
    where the pipeline has a safety checker, `truncated` where a prompt was cut at the text encoder's limit (the text that was
    left out), `retried` where the sample was not finite and was made again in float32.

    A batch that fails is tried again sample by sample, so that a fault costs no other sample; a failing one is not tried twice.

    Raises ValueError, before any sampling, for bad settings and for a folder that holds something else.
    """
    batch_size = arguments.at_least_one("batch_size", batch_size)
    if len({job.id.casefold() for job in jobs}) < len(jobs):
        raise ValueError("jobs must have ids that differ, in more than upper and lower case")
    height, width = sampler.size(height, width)
    guard.planned(sampler.solver(steps, height, width), guidance, torch.device("cpu"))  # raises for steps that it does not fit
    with torch.inference_mode():  # raises for what the model's text encoders cannot do
        sampler.model.encode([""], height, width, clip_skip=clip_skip)
    settings = {"steps": steps, "guidance": guidance, "height": height, "width": width, "clip_skip": clip_skip}
    run = describe(sampler, model, jobs, negative_prompt, settings)
    open_folder(out, run if copies is None else run | {"training_images": dict(copies.settings)})
    images = Path(out) / "images"

    def finished(line: dict[str, Any]) -> str | None:
        ok = line.get("status") == "ok" and intact(images / f"{line['id']}.png", line.get("sha256"))
        return line["id"] if ok else None

    written = []
    with Journal(Path(out) / "manifest.jsonl", finished) as journal:
        waiting = [job for job in jobs if job.id not in journal.lines]
        if negative_prompt is not None:
            waiting = [replace(job, negative_prompt=negative_prompt) if job.negative_prompt is None else job for job in waiting]
        done = len(jobs) - len(waiting)
        with tqdm(total=len(jobs), initial=done, desc="images", bar_format=FORMAT, disable=not progress) as bar:
            for batch in _batches(waiting, batch_size):
                for line, image in _make(sampler, batch, settings, partial(moving, bar)):
                    if image is not None:
                        path = images / f"{line['id']}.png"
                        save_image(image, path)
                        line |= {"status": "ok", "sha256": sha256(path)} | (copies(image) if copies else {})
                    journal.append(line)
                    written.append(line)
                    bar.update()
    return written


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs without a negative prompt apart: beside one that has it they would get "", which is another thing to SDXL."""
    for without in (True, False):
        alike = [job for job in jobs if (job.negative_prompt is None) == without]
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


Tell = Callable[[int], Callable[[float], None]]  # how many images are sampled -> what is told of their steps
Made = tuple[dict[str, Any], Image.Image | None]  # a manifest line, and the image where there is one to save


def _make(sampler: Sampler, batch: Sequence[Job], settings: dict[str, Any], tell: Tell) -> Iterator[Made]:
    """Sample a batch; one that fails is halved down to its fault, and what is not finite is sampled again in float32."""
    try:
        made = _sample(sampler, batch, settings, tell)
    except Exception as error:  # out of memory, or what a prompt does to a tokenizer: nobody can list them
        if len(batch) == 1:
            yield _failed(batch[0], error), None
            return
        log.warning("a batch of %d failed (%s); trying its halves", len(batch), _said(error))
    else:
        lower = sampler.model.half
        for i, job in enumerate(batch):
            yield _again(sampler, job, settings, tell) if lower and not made.finite[i] else _taken(job, made, i)
        return
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        yield from _make(sampler, half, settings, tell)


def _sample(sampler: Sampler, batch: Sequence[Job], settings: dict[str, Any], tell: Tell) -> Output:
    negative = None if batch[0].negative_prompt is None else [job.negative_prompt for job in batch]
    prompts, seeds = [job.prompt for job in batch], [job.seed for job in batch]
    size = len(batch)
    return sampler(prompts, seeds, negative_prompt=negative, progress=tell(size), batch_size=size, **settings)


def _again(sampler: Sampler, job: Job, settings: dict[str, Any], tell: Tell) -> Made:
    """What float32 makes of a sample that was not finite."""
    retried = {"retried": "float32"}
    try:
        with sampler.in_float32():
            made = _sample(sampler, [job], settings, tell)
    except Exception as error:
        return _failed(job, error, "the sample is not finite, and in float32: ") | retried, None
    line, image = _taken(job, made, 0)
    return line | retried, image


def _taken(job: Job, made: Output, i: int) -> Made:
    """Sample `i` of `made` as a manifest line, without the status where the image is still to be saved."""
    step = made.transition_step[i].item()
    line = _asked(job) | {
        "transition_step": step,
        "transition_timestep": made.timesteps[step].item() if step >= 0 else None,
        "noise_gap": made.noise_gap[i].tolist(),
    }
    line |= made.judged(i)
    if made.nsfw_content_detected is not None:
        line["nsfw_content_detected"] = bool(made.nsfw_content_detected[i])
    if made.truncated[i]:
        line["truncated"] = made.truncated[i]
    if made.finite[i]:
        return line, made.images[i]
    log.error("%s: the sample is not finite", job.id)
    return line | {"status": "failed: the sample is not finite"}, None


def _failed(job: Job, error: Exception, where: str = "") -> dict[str, Any]:
    log.error("%s: %s%s", job.id, where, _said(error))
    log.debug("%s", job.id, exc_info=error)
    return _asked(job) | {"status": f"failed: {where}{_said(error)}"}


def _said(error: Exception) -> str:
    """The error's text, with its kind where that is one nobody foresaw."""
    return str(error) if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: {error}"


def _asked(job: Job) -> dict[str, Any]:
    return {name: value for name, value in asdict(job).items() if value is not None}
