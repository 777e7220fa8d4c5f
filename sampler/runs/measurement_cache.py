"""A cache of measurements: each is written to a file when it is made, so that a run that was stopped makes none twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .batch_retry import parts
from .jsonl_journal import Journal, read_lines

log = logging.getLogger(__name__)


class MeasurementCache:
    """Measurements by name and sample index, in the JSON Lines file `path`; None: they are not stored.

    run: the settings that decide them. Measurements of other settings in the same file are removed.
    """

    def __init__(self, path: str | Path | None, run: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self._run = hashlib.sha256(json.dumps(run, sort_keys=True, default=str).encode()).hexdigest()
        if self.path is not None and any("run" in line and line["run"] != self._run for line in read_lines(self.path)):
            log.warning("%s holds measurements of other settings or prompts: they are removed", self.path)
        self._journal = None if self.path is None else Journal(self.path, self._key)
        self._lines = {} if self.path is None else {self._key(line): line for line in read_lines(self.path)}

    def _key(self, line: dict[str, Any]) -> tuple[str, int] | None:
        return (line["what"], line["index"]) if line["run"] == self._run and "values" in line else None

    def __len__(self) -> int:
        """The number of this run's measurements that the file had when it was opened."""
        return len(self._lines)

    def __call__(self, what: str, count: int, size: int, make: Callable[[Sequence[int]], Tensor], bar: tqdm) -> Tensor:
        """The measurements `what` of `count` samples, (count, ...) float32.

        make: measures the samples of some indices, at most `size` at a time. bar: advances by the samples of each batch.
        """
        found = []
        for part in parts(count, size):  # always the same batches: rounding depends on them
            if all((what, i) in self._lines for i in part):
                found.append(_tensor([self._lines[what, i]["values"] for i in part]))
            else:
                found.append(values := make(part).float().cpu())
                for i, row in zip(part, values, strict=True):
                    if self._journal is not None:
                        self._journal.append({"run": self._run, "what": what, "index": i, "values": row.tolist()})
            bar.update(len(part))
        return torch.cat(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal is not None:
            self._journal.__exit__()


def _tensor(values: list) -> Tensor:
    """Values that JSON has read, (n, ...) float32; None stands for NaN, which JSON lacks."""
    return torch.from_numpy(np.array(values, np.float32))
