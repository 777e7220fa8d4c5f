"""Stops a run on a signal: the samples that were begun are finished, and no more are begun."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


class Stop:
    """A context in which SIGINT or SIGTERM sets `signal`, after which nothing new begins; a second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._before = {number: signal.signal(number, self._told) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _told(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        log.warning("the pictures that are begun are finished, then the run stops; once more to stop at once")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def until(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            if self.signal is not None:
                return
            yield item
