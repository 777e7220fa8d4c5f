"""Makes files of jobs in this process: encodes prompts, denoises samples, decodes latents and compresses pictures."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ..data.image_encoding import Encoder, Made
from ..models.network import hooked
from ..sampler import Sampler
from ..sampling.engine import Engine
from .encode_decode import TEXTS, Picture, decoded, encoded, failed, said
from .job_order import Placed, longest_first
from .job_plans import Plans
from .settings import Files
from .stop import Stop
from .threads import Stages

PRESSES = 2  # threads that turn pictures into files
Stepped = Callable[[float], object]  # called after every step with the progress of unfinished samples, in samples


def unwatched(under_way: float) -> None:
    """Ignore the steps."""


class Executor(Protocol):
    """Makes a run's pictures, in this process or on the workers of a cluster.

    calls: the network's calls so far, see `Engine`.
    """

    @property
    def calls(self) -> Counter[str]: ...

    def made(self, jobs: Iterable[Placed], stop: Stop, stepped: Stepped = unwatched) -> Iterator[Made]:
        """Yield what came of each job, about in the order of the jobs; what was not finite at first may come later."""

    def close(self) -> None:
        """Release what the run holds, such as workers."""


class LocalExecutor:
    """An `Executor` in this process."""

    def __init__(self, plans: Plans, slots: int, files: Files):
        self.sampler, self.plans, self.slots, self.files = plans.sampler, plans, slots, files
        self.engine = Engine(self.sampler.runner.open_batch, slots, fixed=True, local=True)

    @property
    def calls(self) -> Counter[str]:
        return self.engine.calls

    def close(self) -> None:
        pass

    def made(self, jobs: Iterable[Placed], stop: Stop, stepped: Stepped = unwatched) -> Iterator[Made]:
        """Yield what came of the jobs. Samples that are not finite in half precision are made again in float32, at the end."""
        again: list[Placed] = []
        yield from self._made(jobs, stop, stepped, again.append if self.sampler.model.half else None)
        yield from self._in_float32(again, stop, stepped)

    def _made(
        self, jobs: Iterable[Placed], stop: Stop, stepped: Stepped, again: Callable[[Placed], None] | None
    ) -> Iterator[Made]:
        """Yield what came of the jobs, in the order they began. Those not finite go to `again` instead; None: they fail."""
        model, options, order = self.sampler.model, self.sampler.options, deque[int]()

        def noted() -> Iterator[Placed]:
            for position, job in stop.until(longest_first(jobs, self.slots, self.plans.size, self.plans.calls)):
                order.append(position)
                yield position, job

        threads = threaded(self.sampler)
        stages = Stages(threads)

        def tick() -> None:
            stages.check()
            stepped(self.engine.under_way)

        try:
            with ThreadPoolExecutor(PRESSES) if threads else nullcontext() as pool:
                samples = stages.ahead(encoded(model, noted(), self.plans, **options), TEXTS)
                results = stages.ahead(self.engine.run(stop.until(samples), tick), self.slots)
                pictures = decoded(model, results, self.files.format == "latents", **options)
                press = partial(self._press, retried=again is not None)
                if pool is None:
                    yield from _in_order(stages.ahead(map(press, pictures), self.slots), order, again)
                else:  # most of this is compression, which runs without Python's lock
                    pressed = stages.ahead(map(partial(pool.submit, press), pictures), self.slots)
                    yield from _in_order(map(Future.result, pressed), order, again)
        finally:
            stages.halt()

    def _press(self, picture: Picture, retried: bool) -> Made | Picture:
        if retried and not picture.finite:
            return picture
        if picture.image is None:
            return Made(picture.position, picture.line)
        line = picture.line | self.plans.facts(picture.job)
        try:
            line |= self.files.copies(picture.image) if self.files.copies else {}
            return Encoder(self.files.format, self.files.prompt_metadata)(picture.position, line, picture.image)
        except torch.AcceleratorError:  # a GPU is lost, see `Engine`
            raise
        except Exception as error:  # of a library, about this picture
            return Made(picture.position, failed(picture.job, error))

    def _in_float32(self, jobs: Sequence[Placed], stop: Stop, stepped: Stepped) -> Iterator[Made]:
        """Make samples that were not finite again in float32, one at a time, and yield what came of each."""
        retried, engine = {"retried": "float32"}, self.engine
        if not jobs or stop.signal is not None:
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(self.sampler.in_float32())
            except Exception as error:
                for position, job in jobs:
                    status = {"status": f"failed: the sample is not finite, and in float32: {said(error)}"}
                    yield Made(position, job.asked() | status | retried)
                return
            self.engine = Engine(self.sampler.runner.open_batch, 1, fixed=True, local=True)
            self.engine.calls = engine.calls
            for one in self._made(jobs, stop, stepped, None):
                yield replace(one, line=one.line | retried)
            self.engine = engine


def _in_order(pressed: Iterable[Made | Picture], order: deque[int], again: Callable[[Placed], None] | None) -> Iterator[Made]:
    """Yield what was made, sorted as the positions in `order`; jobs whose picture is not finite go to `again` instead."""
    kept: dict[int, Made | Picture] = {}
    for one in pressed:
        kept[one.position] = one
        while order and order[0] in kept:
            first = kept.pop(order.popleft())
            if isinstance(first, Made):
                yield first
            elif again is not None:
                again((first.position, first.job))


def threaded(sampler: Sampler) -> bool:
    """Whether a run's stages may overlap in threads: on a GPU, unless hooks move the weights of some part of the pipeline."""
    components: dict[str, Any] = sampler.pipe.components  # type: ignore[attr-defined]  # diffusers does not say its type
    parts = (part for part in components.values() if isinstance(part, nn.Module))
    return sampler.model.device.type == "cuda" and not any(map(hooked, parts))
