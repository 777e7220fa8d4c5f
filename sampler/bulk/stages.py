"""The stages of a run: prompts are encoded, samples denoised, latents decoded, none far ahead of the next.

Beside a GPU each has a thread of its own. On a CPU they take turns: threads that compute would each bring a pool of their own.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..data.prompts import Job
from ..models import Decoded, Encoded, Model
from ..sampling.ladder import Ladder
from ..sampling.samples import Result, Sample

log = logging.getLogger(__name__)
T = TypeVar("T")
TEXTS = 8  # prompts encoded together, always so many: a prompt's encoding has the same bits beside any others
CACHE = 128  # prompts whose encodings are kept
WAIT = 0.1  # seconds between looks at whether all is to stop


class Stopped(BaseException):
    """Raised in the threads of a run that is to stop now."""


class Stages:
    """The threads of a run. threads: False runs all in the caller's, each item when it is asked for."""

    def __init__(self, threads: bool = True):
        self._threads: list[Thread] | None = [] if threads else None
        self._halted = Event()

    def check(self) -> None:
        """Raises Stopped once all is to stop; for work that takes long."""
        if self._halted.is_set():
            raise Stopped

    def halt(self) -> None:
        """End all threads, each within what it does at the moment."""
        self._halted.set()
        for thread in self._threads or ():
            thread.join()

    def ahead(self, items: Iterable[T], depth: int) -> Iterator[T]:
        """The same items, made up to `depth` ahead in a thread of their own. What is raised there is raised here."""
        if self._threads is None:
            return _one_by_one(items)
        ready: Queue[tuple[Any, BaseException | None]] = Queue(depth)
        thread = Thread(target=self._make, args=(items, ready), daemon=True)
        self._threads.append(thread)
        thread.start()
        return self._taken(ready)

    def _taken(self, ready: Queue) -> Iterator[Any]:
        while True:
            item, end = self._patiently(ready.get, Empty)
            if end is None:
                yield item
            elif isinstance(end, StopIteration):
                return
            elif isinstance(end, Exception):
                raise end
            else:
                raise RuntimeError(f"a thread died of {type(end).__name__}: {end}") from end

    @torch.inference_mode()
    def _make(self, items: Iterable[Any], ready: Queue) -> None:
        end: BaseException = StopIteration()
        try:
            try:
                for item in items:
                    self._patiently(partial(ready.put, (item, None)), Full)
            except Stopped:
                raise
            except BaseException as error:
                end = error
            self._patiently(partial(ready.put, (None, end)), Full)
        except Stopped:
            pass

    def _patiently(self, call: Callable[..., T], busy: type[Exception]) -> T:
        while True:
            self.check()
            try:
                return call(timeout=WAIT)
            except busy:
                continue


def _one_by_one(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made when it is asked for; in inference mode, which is a thread's own."""
    items, nothing = iter(items), object()
    while True:
        with torch.inference_mode():
            item = next(items, nothing)
        if item is nothing:
            return
        yield item


@dataclass(frozen=True)
class Request:
    """A job on its way, and what its prompt loses at the text encoder's limit."""

    position: int
    job: Job
    truncated: str = ""

    def asked(self) -> dict[str, Any]:
        return self.job.asked()


def encoded(
    model: Model, jobs: Iterable[tuple[int, Job]], ladder: Callable[[Job], Ladder], height: int, width: int, **options: Any
) -> Iterator[Sample | Result]:
    """The samples of jobs, TEXTS prompts at a time; one that cannot be encoded is a result that failed."""
    jobs, shape = iter(jobs), model.shape(height, width, **options)
    initial = partial(model.noise, height=height, width=width, **options)
    cache: OrderedDict[tuple[str, str | None], Encoded] = OrderedDict()

    def encode(texts: Sequence[tuple[str, str | None]]) -> None:
        """Put the encodings of up to TEXTS prompts into the cache."""
        padded = [*texts, *[("", None)] * (TEXTS - len(texts))]
        prompts, negative = map(list, zip(*padded, strict=True))
        found = model.encode(prompts, height, width, negative_prompt=negative, **options)
        cache.update({text: found.select([i]) for i, text in enumerate(texts)})

    while some := list(islice(jobs, TEXTS)):
        texts = {(job.prompt, job.negative_prompt): None for _, job in some}
        missing, errors = [text for text in texts if text not in cache], {}
        try:
            if missing:
                encode(missing)
        except Exception:  # what a prompt does to a tokenizer: nobody can list it
            for text in missing:
                try:
                    encode([text])
                except Exception as error:
                    errors[text] = error
        good = [(position, job) for position, job in some if (job.prompt, job.negative_prompt) not in errors]
        rows = [cache[job.prompt, job.negative_prompt] for _, job in good]
        if rows:
            network = model.network(Encoded.joined(rows + rows[:1] * (TEXTS - len(rows))))
        fine = iter(range(len(rows)))
        for position, job in some:
            text = job.prompt, job.negative_prompt
            if text in errors:
                yield Result(Sample(Request(position, job), ladder(job), shape, None, 0), error=errors[text])
            else:
                row = next(fine)
                request = Request(position, job, rows[row].truncated[0])
                yield Sample(request, ladder(job), shape, network, row, job.seed, initial)
                cache.move_to_end(text)
        while len(cache) > CACHE:
            cache.popitem(last=False)


@dataclass(frozen=True)
class Picture:
    """What came of a job: its line of the manifest, without the status where there is an image; whether that was finite."""

    position: int
    job: Job
    line: dict[str, Any]
    image: Image.Image | Tensor | None = None
    finite: bool = True


def decoded(
    model: Model, results: Iterable[Result], latents: bool, height: int, width: int, **options: Any
) -> Iterator[Picture]:
    """The pictures of results, one at a time: a fault costs one, and its bits are those of its latents alone.

    latents: undecoded.
    """
    for result in results:
        error = result.error
        for _ in range(2 if error is None else 0):  # whatever ends a decoding, even the thread's end, is tried again once
            try:
                picture = _picture(partial(model.decode, height=height, width=width, **options), result, latents)
                break
            except (Exception, SystemExit) as raised:
                error = raised
        else:
            picture = _failed(result, error)
        yield picture


def _picture(decode: Callable[..., Decoded], result: Result, latents: bool) -> Picture:
    request, solver = result.sample.key, result.sample.ladder.solver
    found, line = int(result.transition.item()), request.asked()
    call = int(solver.first_calls[found])
    line |= {
        "transition_step": found,
        "transition_timestep": solver.timesteps[call].item() if found >= 0 else None,
        "transition_log_snr": None if found < 0 or solver.log_snr is None else round(solver.log_snr[call].item(), 4),
        "noise_gap": result.gaps.tolist(),
    }
    if result.attempts is not None:
        line |= {name: getattr(result, name) for name in ("attempts", "score", "suspect")}
    image, finite = result.latents, bool(result.latents.isfinite().all())
    if not latents:
        made = decode(image[None], "pil", [result.sample.generator])
        image, finite = made.images[0], finite and bool(made.finite[0])
        if made.flagged is not None:
            line["nsfw_content_detected"] = made.flagged[0]
    if request.truncated:
        line["truncated"] = request.truncated
    if finite:
        return Picture(request.position, request.job, line, image)
    log.info("%s: the sample is not finite", request.job.id)
    return Picture(request.position, request.job, line | {"status": "failed: the sample is not finite"}, finite=False)


def _failed(result: Result, error: BaseException) -> Picture:
    request = result.sample.key
    log.error("%s: %s", request.job.id, said(error))
    log.debug("%s", request.job.id, exc_info=error)
    return Picture(request.position, request.job, request.asked() | {"status": f"failed: {said(error)}"})


def said(error: BaseException) -> str:
    """The error's text, with its kind where that is one nobody foresaw."""
    return str(error) if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: {error}"
