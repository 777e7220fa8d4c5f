"""A run: prompts in, a folder of images out, with a manifest that grows as images are finished.

The folder gets the images (see `writers`), `manifest.jsonl` (a line an image), `jobs.jsonl` (the ids of all that are to be
made) and `run.json` (all that is needed to make it again). A run that was stopped goes on where it was when it is started again
with the same settings; images that are missing or changed since, and those that failed, are made again: each that is there is
read and compared with its SHA-256. Nothing holds all of the prompts, lines or images.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, Self

from PIL import Image
from torch import nn

from .. import checks
from ..data.prompts import OWN, Job, Prompts
from ..data.encoding import Encoder, Made
from ..data.writers import writer
from ..guidance.guard import Guard
from ..guidance.guidance import Guidance
from ..models import memory
from ..models.network import hooked
from ..runs.environment import own_numbers
from ..runs.folder import open_folder, read_settings
from ..runs.journal import Journal
from ..runs.manifest import MANIFEST
from ..runs.progress import Progress, Summary
from ..runs.provenance import weights_sha256
from ..sampler import Sampler
from ..sampling.engine import Engine
from ..sampling.ladder import Ladder
from .part import Part
from .stages import TEXTS, Picture, Request, Stages, decoded, encoded, said

log = logging.getLogger(__name__)
PRESSES = 2  # threads that turn pictures into files


class Copies(Protocol):
    """What a run's images are compared with: `settings`, for run.json, and what a manifest line says of an image."""

    settings: Mapping[str, Any]

    def __call__(self, image: Image.Image) -> dict[str, Any]: ...


@own_numbers()
def generate(
    sampler: Sampler,
    prompts: Prompts | Sequence[Job],
    out: str | Path,
    guidance: Guidance | Guard,
    model: str,
    steps: int = 50,
    batch_size: int | None = 8,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    clip_skip: int | None = None,
    progress: bool | Progress = True,
    format: str = "png",
    shard: tuple[int, int] | None = None,
    load: Callable[[], Sampler] | None = None,
    workers: int | None = None,
    copies: Copies | None = None,
) -> Summary:
    """Make every job's image in the folder `out`; returns what came out.

    model: what run.json calls the sampler's model.
    batch_size: the slots of the engine, fewer where that spares padding; None: as many as the folder's run has, else as the
        device holds. The last bits of a picture may depend on it, so it is a setting of the run, in run.json as `slots`; where
        memory runs short there are fewer, and a grey level may differ.
    negative_prompt: of the jobs that have none of their own.
    height, width: pixels; default the model's own size.
    clip_skip: how many of the text encoder's last layers are left out, as in diffusers.
    format: "png", "jpg" or "webp" pictures, "latents" in safetensors, or shards of many, "parquet" or "webdataset".
    load, workers: have the work done on a Ray cluster, by so many workers (default: one a GPU), each of which calls `load` for
        its sampler; `sampler` is looked at alone. See `ray`.
    copies: what else a manifest line says of its image, as how near it is to which training image; not on a cluster.
    shard: (i, n): every n-th job from the i-th on, in the folder `out`/shard-i-of-n; the other parts of the run may be made
        elsewhere, see `merge`.

    A manifest line says what was asked (id, prompt, seed, negative_prompt where there is one, and what else the file of prompts
    says of it), `transition_step`, `transition_timestep`, `transition_log_snr`, `noise_gap`, and `status`: "ok" where the image
    is there and its pixels were finite, with its `file` and `sha256`, else "failed: " and why. Under a guard it has `attempts`,
    `score` and `suspect`. `nsfw_content_detected` is there where the pipeline has a safety checker, `truncated` where a prompt
    was cut at the text encoder's limit (the text that was left out), `retried` where the sample was not finite and was made
    again in float32.

    A fault of one sample costs that one: it is marked, and made again when the run is started again. Where the prompts cannot
    be read to their end, the images of those before are finished, and the error is raised then. After SIGINT or SIGTERM what is
    in flight is finished and no more begun; a second one ends the run at once.

    Raises ValueError, before any sampling, for bad settings and for a folder that holds something else; ImportError for a
    format whose library is missing; OSError where the disk is full, and the run goes on when it is started again.
    """
    prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts)
    if batch_size is not None:
        checks.at_least_one("batch_size", batch_size)
    if copies is not None and (load is not None or format == "latents"):
        raise ValueError("copies are looked for among pictures that this process makes: neither on a cluster nor in latents")
    options = dict(sampler.options)
    sampler = sampler.using(height, width, clip_skip=clip_skip)  # raises for what the model cannot do
    height, width = sampler.size()
    ladders = Ladders(sampler, steps, guidance)
    ladders.check(prompts)
    out = Path(out) / f"shard-{shard[0]}-of-{shard[1]}" if shard else Path(out)
    writes = writer(out, format)
    slots = balanced(_slots(sampler, out) if batch_size is None else batch_size, len(prompts))
    settings = {
        "slots": slots,
        "steps": steps,
        "guidance": guidance.to_dict(),
        "height": height,
        "width": width,
        "clip_skip": clip_skip,
    }
    settings |= {"negative_prompt": negative_prompt, "format": format, "shard": shard and list(shard)}
    settings |= {} if copies is None else {"training_images": dict(copies.settings)}
    settings |= {"options": options} if options else {}
    open_folder(
        out, {"model": model, **settings, **prompts.settings, "weights": weights_sha256(sampler.pipe), **sampler.provenance}
    )
    if load is None:
        run = Run(sampler, ladders, slots, format, copies)
    else:
        pixels = {"height": height, "width": width, **sampler.options}
        run = _ray().RayRun(load, workers, pixels, steps, guidance, slots, format)
    shown = progress if isinstance(progress, Progress) else Progress("auto" if progress else "none")

    def finished(line: dict[str, Any]) -> str | None:
        return line["id"] if writes.holds(line) else None

    with Journal(out / MANIFEST, finished) as journal, shown, Stop() as stop:
        mine = Part(prompts, shard)
        mine.record(out)

        def waiting() -> Iterator[tuple[int, Job]]:
            for position, job in mine:
                if job.id not in journal:
                    negative = negative_prompt if job.negative_prompt is None else job.negative_prompt
                    yield position, replace(job, negative_prompt=negative)

        def take(made: Iterable[Made]) -> None:
            for one in made:
                keep(writes.add(one))
            keep(writes.flush())

        def keep(lines: Sequence[dict[str, Any]]) -> None:
            journal.append(*lines)
            for line in lines:
                shown.update(line, run.calls)

        shown.begin(len(mine), len(journal), prompts.skipped)
        run.moved = shown.moved
        again: list[tuple[int, Job]] = []
        take(run.made(waiting(), stop, again.append if sampler.model.half else None))
        take(run.in_float32(again, stop))
        shown.summary.signal = stop.signal
        run.close()
        writes.finish()
    if mine.fault is not None:
        raise mine.fault
    return shown.summary


class Ladders:
    """The guidance over the sampler's steps, for jobs of every kind, some of which have steps or a scale of their own.

    A guard's early look is calibrated for the run's steps and scale: jobs that have others go without it.
    """

    def __init__(self, sampler: Sampler, steps: int, guidance: Guidance | Guard):
        self.sampler, self.steps, self.guidance = sampler, steps, guidance
        self._made: dict[tuple[int | None, float | None], Ladder] = {}

    def of(self, job: Job) -> Ladder:
        """Raises ValueError for steps or a scale that the guidance does not fit."""
        if job.kind not in self._made:
            self._made[job.kind] = self._of(*job.kind)
        return self._made[job.kind]

    def _of(self, steps: int | None, scale: float | None) -> Ladder:
        guidance = self.guidance if scale is None else self.guidance.scaled(scale)
        if isinstance(guidance, Guard) and steps is not None:
            guidance = replace(guidance, early=None)
        solver, model = self.sampler.solver(steps or self.steps), self.sampler.model
        return Ladder.make(solver, guidance, model.device, model.settle)

    def check(self, prompts: Prompts) -> None:
        """Raises ValueError, naming the first of the prompts that the guidance does not fit."""
        for kind, where in prompts.kinds.items():
            try:
                self._made[kind] = self._of(*kind)
            except ValueError as error:
                raise ValueError(str(error) if kind == OWN else f"{prompts.name}, {where}: {error}") from error


def _ray() -> ModuleType:
    from . import ray  # which imports this

    return ray


def _slots(sampler: Sampler, out: Path) -> int:
    """Those of the run that a folder holds, else as many as the device holds of the sampler's pictures."""
    known = read_settings(out).get("slots") if (out / "run.json").is_file() else None
    return known or memory.size(sampler.model, *sampler.size())


def balanced(most: int, jobs: int) -> int:
    """So many slots, at most `most`, that the jobs fill them evenly: 9 jobs take 5 slots twice, not 8 twice."""
    return math.ceil(jobs / math.ceil(jobs / most)) if jobs else most


class Stop:
    """Whether no more is to be begun: set by SIGINT and SIGTERM, the second of which raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # nobody else is told of signals
            self._before = {number: signal.signal(number, self._told) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _told(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        log.warning("what is in flight is finished, then the run stops; once more to stop at once")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def until(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if self.signal is not None:
                return
            yield item


class Run:
    """How jobs become files: prompts encoded, samples denoised, latents decoded and pictures compressed; see `stages`."""

    def __init__(self, sampler: Sampler, ladders: Ladders, slots: int, format: str, copies: Copies | None = None):
        self.sampler, self.ladders, self.format, self.slots, self.copies = sampler, ladders, format, slots, copies
        self.engine = Engine(sampler.runner.lane, slots, fixed=True, local=True)
        self.moved: Callable[[float], None] = lambda under_way: None  # is told of every step

    @property
    def calls(self) -> Counter[str]:
        """The network's calls so far, see `Engine`."""
        return self.engine.calls

    def close(self) -> None:
        """What a run elsewhere has to give back."""

    def made(
        self, jobs: Iterable[tuple[int, Job]], stop: Stop, again: Callable[[tuple[int, Job]], None] | None = None
    ) -> Iterator[Made]:
        """What comes of the jobs, in their order; `again` is told of those that are not finite, which are left out then."""
        model, size, options, order = self.sampler.model, self.sampler.size(), self.sampler.options, deque()

        def noted() -> Iterator[tuple[int, Job]]:
            for position, job in stop.until(jobs):
                order.append(position)
                yield position, job

        threads = threaded(self.sampler)
        stages = Stages(threads)

        def tick() -> None:
            stages.check()
            self.moved(self.engine.under_way)

        try:
            with ThreadPoolExecutor(PRESSES) if threads else nullcontext() as pool:
                samples = stages.ahead(encoded(model, noted(), self.ladders.of, *size, **options), TEXTS)
                results = stages.ahead(self.engine.run(stop.until(samples), tick), self.slots)
                pictures = decoded(model, results, self.format == "latents", *size, **options)
                press = partial(self._press, retried=again is not None)
                if threads:  # most of this is compression, which runs beside Python
                    press = partial(pool.submit, press)
                pressed = stages.ahead(map(press, pictures), self.slots)
                yield from self._in_order(map(Future.result, pressed) if threads else pressed, order, again)
        finally:
            stages.halt()

    def _in_order(
        self, pressed: Iterable[Made | Picture], order: deque[int], again: Callable[[tuple[int, Job]], None] | None
    ) -> Iterator[Made]:
        kept: dict[int, Made | Picture] = {}
        for one in pressed:
            kept[one.position] = one
            while order and order[0] in kept:
                one = kept.pop(order.popleft())
                if isinstance(one, Made):
                    yield one
                else:
                    again((one.position, one.job))

    def _press(self, picture: Picture, retried: bool) -> Made | Picture:
        if retried and not picture.finite:
            return picture
        if picture.image is None:
            return Made(picture.position, picture.line)
        near = self.copies(picture.image) if self.copies else {}
        return Encoder(self.format)(picture.position, picture.line | near, picture.image)

    def in_float32(self, jobs: Sequence[tuple[int, Job]], stop: Stop) -> Iterator[Made]:
        """What float32 makes of samples that were not finite, one at a time."""
        retried, engine = {"retried": "float32"}, self.engine
        if not jobs or stop.signal is not None:
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(self.sampler.in_float32())
            except Exception as error:
                for position, job in jobs:
                    status = {"status": f"failed: the sample is not finite, and in float32: {said(error)}"}
                    yield Made(position, Request(position, job).asked() | status | retried)
                return
            self.engine = Engine(self.sampler.runner.lane, 1, fixed=True, local=True)
            self.engine.calls = engine.calls
            for one in self.made(jobs, stop):
                yield replace(one, line=one.line | retried)
            self.engine = engine


def threaded(sampler: Sampler) -> bool:
    """Whether its stages may run beside each other: beside a GPU, unless parts of the pipeline come and go between devices."""
    parts = (part for part in sampler.pipe.components.values() if isinstance(part, nn.Module))
    return sampler.model.device.type == "cuda" and not any(map(hooked, parts))
