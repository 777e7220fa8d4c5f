"""How far captions stand out: the noise gaps of their first steps, compared with those of ordinary captions.

The statistic of a caption is the mean of its first gaps under plain guidance, each divided by the usual gap of its step, over
one or a few initial noises (Wen et al., ICLR 2024, https://arxiv.org/abs/2407.21720). It needs the first steps of a run only,
and no training image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import checks
from ..calibration import cost
from ..guidance.guidance import Guidance
from ..runs.journal import Journal, read_lines
from ..runs.progress import FORMAT, moving, parts
from ..sampler import Sampler

log = logging.getLogger(__name__)
Task = tuple[str, str, list[int]]  # of a caption: its id, its text, the seeds of its initial noises


@dataclass(frozen=True)
class Reference:
    """What captions are compared with.

    gap: the usual noise gap of each of the first steps. ordinary: the statistic of each ordinary caption. source: of both.
    """

    gap: tuple[float, ...]
    ordinary: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Gaps:
    """The first noise gaps of texts.

    steps: how many are taken, of a run of `of`. scale: of the guidance. size: samples a batch.
    """

    sampler: Sampler
    steps: int
    of: int
    scale: float
    size: int
    progress: bool

    def __call__(self, tasks: Sequence[Task], path: Path, what: str) -> dict[str, dict[str, Any]]:
        """The line of each task by its id, kept in the file `path`; a run that was stopped goes on from there.

        A line has id, status and, where that is "ok", gaps: (noises, steps); and truncated, what the text encoder cut off.
        """
        with Journal(path, lambda line: line["id"] if line.get("status") == "ok" else None) as journal:
            lines = {line["id"]: line for line in read_lines(path)}
            waiting = [task for task in tasks if task[0] not in lines]
            if waiting and self.progress:
                noises = [text for _, text, seeds in waiting for _ in seeds]
                cost.announce(what, self.sampler, noises, len(noises), self.steps, self.of, self.scale, self.size)
            with bar(what, len(tasks), len(tasks) - len(waiting), self.progress) as shown:
                for part in parts(len(waiting), max(1, self.size // len(tasks[0][2]))):
                    found = self._lines([waiting[i] for i in part], shown)
                    journal.append(*found)
                    lines |= {line["id"]: line for line in found}
                    shown.update(len(part))
        return lines

    def _lines(self, batch: Sequence[Task], shown: tqdm) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        for some, found in each(lambda tasks: self._measured(tasks, shown), batch):
            if isinstance(found, Exception):
                lines.append({"id": some[0][0], "status": f"failed: {checks.line(found)}"})
            else:
                lines += found
        return lines

    def _measured(self, tasks: Sequence[Task], shown: tqdm) -> list[dict[str, Any]]:
        texts = [text for _, text, seeds in tasks for _ in seeds]
        seeds = [seed for _, _, own in tasks for seed in own]
        options: dict[str, Any] = {"output": "latent", "batch_size": self.size, "progress": moving(shown, len(tasks))}
        made = self.sampler(texts, seeds, self.of, Guidance.cfg(self.scale), stop_after=self.steps, **options)
        gaps = made.noise_gap[:, : self.steps].view(len(tasks), -1, self.steps)
        lines = []
        for (id, _, own), found, cut in zip(tasks, gaps, made.truncated[:: len(tasks[0][2])], strict=True):
            if not found.isfinite().all():
                lines.append({"id": id, "status": f"failed: the noise gaps with seeds {own} are not finite"})
            else:
                lines.append({"id": id, "status": "ok", "gaps": found.tolist()} | ({"truncated": cut} if cut else {}))
        return lines


def statistic(gaps: Sequence[Sequence[float]], usual: Sequence[float]) -> float:
    """The mean of gaps (noises, steps), each divided by the usual gap of its step."""
    return float((np.asarray(gaps) / np.asarray(usual)).mean())


def each(make: Callable[[Sequence[Any]], Any], batch: Sequence[Any]) -> Iterator[tuple[Sequence[Any], Any]]:
    """Call `make` with a batch, and yield the batch and the result.

    A batch that fails is halved until what fails is one item, which is yielded with its exception.
    """
    try:
        made = make(batch)
    except Exception as error:  # out of memory, or what a caption does to a tokenizer
        if len(batch) == 1:
            log.error("%s", checks.line(error))
            yield batch, error
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            yield from each(make, half)
        return
    yield batch, made


def bar(what: str, total: int, done: int, progress: bool) -> AbstractContextManager[tqdm]:
    """A bar of progress over `total` items, of which so many are done."""
    return tqdm(total=total, initial=done, desc=what, bar_format=FORMAT, disable=not progress)
