"""The stages before and after sampling: prompts are encoded, latents are decoded."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby, islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.prompts import Job
from ..models import Decoded, Encoded, Model
from ..sampling.cuda_graphs import no_capture
from ..sampling.samples import Result, Sample
from .job_plans import Plans, Size

log = logging.getLogger(__name__)
TEXTS = 8  # prompts encoded together; always this many, so that an encoding has the same bits beside any other prompts
CACHE = 128  # prompts whose encodings are kept


@dataclass(frozen=True)
class JobUnderWay:
    """A job in the making. position: in the run. size: of its picture. truncated: the text cut off at the encoder's limit."""

    position: int
    job: Job
    size: Size
    truncated: str = ""


class Texts:
    """Encodes prompts, for one size per call, and caches the last CACHE encodings."""

    def __init__(self, model: Model, **options: Any):
        self.model, self.options = model, options
        self._cache: OrderedDict[tuple, Encoded] = OrderedDict()

    def __call__(self, jobs: Sequence[Job], size: Size) -> list[Encoded | Exception]:
        """Return each job's encoding, or the exception that its prompt raised."""
        keys = [(job.prompt, job.negative_prompt, size) for job in jobs]
        errors: dict[tuple, Exception] = {}
        missing = [key for key in dict.fromkeys(keys) if key not in self._cache]
        try:
            self._encode(missing)
        except Exception:  # a prompt may make a tokenizer raise anything
            for key in missing:
                try:
                    self._encode([key])
                except Exception as error:
                    errors[key] = error
        found = [errors[key] if key in errors else self._cache[key] for key in keys]
        for key in keys:
            if key in self._cache:
                self._cache.move_to_end(key)
        while len(self._cache) > CACHE:
            self._cache.popitem(last=False)
        return found

    def _encode(self, keys: Sequence[tuple]) -> None:
        """Put the encodings of up to TEXTS prompts for one size into the cache."""
        if not keys:
            return
        padded = [*keys, *[("", None, None)] * (TEXTS - len(keys))]
        prompts, negative = ([key[i] for key in padded] for i in range(2))
        height, width = keys[0][2]
        found = self.model.encode_each(prompts, height=height, width=width, negative_prompt=negative, **self.options)
        self._cache.update({key: found.select([i]) for i, key in enumerate(keys)})


def encoded(model: Model, jobs: Iterable[tuple[int, Job]], plans: Plans, **options: Any) -> Iterator[Sample | Result]:
    """Yield the samples of jobs, up to TEXTS of one size at a time; a job that cannot be encoded becomes a failed Result."""
    texts = Texts(model, **options)
    for size, group in groupby(jobs, key=lambda placed: plans.size(placed[1].kind)):
        shape = model.shape(*size, **options)
        initial = partial(model.noise, height=size[0], width=size[1], **options)
        while some := list(islice(group, TEXTS)):
            with no_capture():
                rows = texts([job for _, job in some], size)
                good = [row for row in rows if isinstance(row, Encoded)]
                network: Any = model.network(Encoded.joined(good + good[:1] * (TEXTS - len(good)))) if good else None
            numbers = count()
            for (position, job), row in zip(some, rows, strict=True):
                attempt_table = plans.of(job.kind)
                if isinstance(row, Exception):
                    yield Result(Sample(JobUnderWay(position, job, size), attempt_table, shape, network, 0), error=row)
                else:
                    request = JobUnderWay(position, job, size, row.truncated[0])
                    yield Sample(request, attempt_table, shape, network, next(numbers), job.seed, initial)


@dataclass(frozen=True)
class Picture:
    """What came of a job: its manifest line (with a status only if it failed), its image, and whether its sample was finite."""

    position: int
    job: Job
    line: dict[str, Any]
    image: Image.Image | Tensor | None = None
    finite: bool = True


def decoded(model: Model, results: Iterable[Result], latents: bool, **options: Any) -> Iterator[Picture]:
    """Yield the pictures of results. Each is decoded alone: a fault costs one picture, and its bits depend on no other.

    latents: whether pictures stay latents, undecoded.
    """
    decode = partial(model.decode, **options)
    for result in results:
        if result.error is None:
            with no_capture():
                picture = _tried(partial(_picture, decode, result, latents), result)
        else:
            picture = _failed(result, result.error)
        yield picture


def _tried(make: Callable[[], Picture], result: Result) -> Picture:
    """Return what `make` returns. After any exception, SystemExit included, try once more; a second one fails the picture.

    Raises torch.AcceleratorError, after which nothing works on the GPU.
    """
    again = True
    while True:
        try:
            return make()
        except torch.AcceleratorError:
            raise
        except (Exception, SystemExit) as error:
            if not again:
                return _failed(result, error)
            log.debug("%s is decoded once more", result.sample.key.job.id, exc_info=True)
            again = False


def _picture(decode: Callable[..., Decoded], result: Result, latents: bool) -> Picture:
    request, solver = result.sample.key, result.sample.attempt_table.solver
    found, line = int(result.transition.item()), request.job.asked()
    call = int(solver.first_calls[found])
    line |= {
        "transition_step": found,
        "transition_timestep": solver.timesteps[call].item() if found >= 0 else None,
        "transition_log_snr": None if found < 0 or solver.log_snr is None else round(solver.log_snr[call].item(), 4),
        "noise_gap": [float(str(gap)) for gap in result.gaps.cpu().numpy()],  # the fewest digits that identify a float32
    }
    if result.attempts is not None:
        line |= {name: getattr(result, name) for name in ("attempts", "score", "suspect")}
    image, finite = result.latents, bool(result.latents.isfinite().all())
    if latents:
        image = image.cpu()
    else:
        height, width = request.size
        made = decode(image[None], "pil", [result.sample.generator], height=height, width=width)
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
    return Picture(request.position, request.job, failed(request.job, error))


def failed(job: Job, error: BaseException) -> dict[str, Any]:
    """Log the error that left a job without an image, and return the job's manifest line."""
    log.error("%s: %s", job.id, said(error))
    log.debug("%s", job.id, exc_info=error)
    return job.asked() | {"status": f"failed: {said(error)}"}


def said(error: BaseException) -> str:
    """Return the error's text; its type comes first unless it is a RuntimeError or a ValueError."""
    return str(error) if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: {error}"
