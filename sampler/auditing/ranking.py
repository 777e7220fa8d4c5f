"""How far captions stand out: the noise gaps of their first steps, compared with those of ordinary captions.

The statistic of a caption is the mean of its first gaps under plain guidance, each divided by the usual gap of its step, over
one or a few initial noises (Wen et al., ICLR 2024, https://arxiv.org/abs/2407.21720). It needs the first steps of a run only,
and no training image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import checks
from ..calibration.cost_bar import PlainRuns
from ..guidance.guidance import Guidance
from ..runs.batch_retry import halving, parts
from ..runs.jsonl_journal import Journal, read_lines
from ..runs.progress import moving

log = logging.getLogger(__name__)
Task = tuple[str, str, list[int]]  # of a caption: its id, its text, the seeds of its initial noises


@dataclass(frozen=True)
class Reference:
    """What captions are compared with.

    gap: the usual noise gap of each first step. ordinary: the statistic of each ordinary caption. source: where both come from.
    """

    gap: tuple[float, ...]
    ordinary: tuple[float, ...]
    source: str


def first_gaps(runs: PlainRuns, first: int, tasks: Sequence[Task], path: Path, what: str) -> dict[str, dict[str, Any]]:
    """Return the noise gaps of each task's first steps, `first` of them, as a line by the task's id.

    The lines are kept in the file `path`, from which a stopped run is resumed. A line has id and status. If that is "ok", it
    has gaps (noises, steps), and truncated if the text encoder cut text off. what: names the tasks for the user.
    """
    with Journal(path, lambda line: line["id"] if line.get("status") == "ok" else None) as journal:
        lines = {line["id"]: line for line in read_lines(path)}
        waiting = [task for task in tasks if task[0] not in lines]
        samples = [text for _, text, seeds in waiting for _ in seeds]
        with runs.bar(what, "captions", len(tasks), len(tasks) - len(waiting), samples, first) as shown:
            for part in parts(len(waiting), max(1, runs.size // len(tasks[0][2]))):
                found: list[dict[str, Any]] = []
                for some, made in halving(lambda some: _measured(runs, first, some, shown), [waiting[i] for i in part]):
                    if isinstance(made, Exception):
                        made = [{"id": some[0][0], "status": f"failed: {checks.line(made)}"}]
                    found += made
                journal.append(*found)
                lines |= {line["id"]: line for line in found}
                shown.update(len(part))
    return lines


def _measured(runs: PlainRuns, first: int, tasks: Sequence[Task], shown: tqdm) -> list[dict[str, Any]]:
    texts = [text for _, text, seeds in tasks for _ in seeds]
    seeds = [seed for _, _, own in tasks for seed in own]
    how: dict[str, Any] = {"output": "latent", "batch_size": runs.size, "progress": moving(shown, len(tasks))}
    made = runs.sampler(texts, seeds, runs.steps, Guidance.cfg(runs.scale), stop_after=first, **how)
    gaps = made.noise_gap[:, :first].view(len(tasks), -1, first)
    lines = []
    for (id, _, own), found, cut in zip(tasks, gaps, made.truncated[:: len(tasks[0][2])], strict=True):
        if not found.isfinite().all():
            lines.append({"id": id, "status": f"failed: the noise gaps with seeds {own} are not finite"})
        else:
            lines.append({"id": id, "status": "ok", "gaps": found.tolist()} | ({"truncated": cut} if cut else {}))
    return lines


def statistic(gaps: Sequence[Sequence[float]], usual: Sequence[float]) -> float:
    """Return the mean of gaps (noises, steps), each divided by the usual gap of its step."""
    return float((np.asarray(gaps) / np.asarray(usual)).mean())
