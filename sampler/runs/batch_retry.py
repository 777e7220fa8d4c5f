"""Splits work into batches, and tries a batch that fails again in two halves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from .. import checks

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Made = TypeVar("Made")


def parts(total: int, size: int) -> list[range]:
    """The indices of `total` samples in batches of at most `size`."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def halving(make: Callable[[Sequence[Item]], Made], batch: Sequence[Item]) -> Iterator[tuple[Sequence[Item], Made | Exception]]:
    """Call `make` with a batch, and yield the batch and the result.

    A batch that fails is halved and tried again. A single item that fails is yielded with its exception.
    """
    try:
        made = make(batch)
    except Exception as error:  # any: out of memory, a tokenizer that fails on a caption, ...
        if len(batch) == 1:
            log.error("%s", checks.line(error))
            yield batch, error
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            yield from halving(make, half)
        return
    yield batch, made
