"""The threads of a run: each stage makes its items a little ahead of the next one.

With a GPU each stage has a thread of its own. On a CPU the stages take turns in the caller's thread, because each thread that
computes would bring its own thread pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

import torch

T = TypeVar("T")
WAIT = 0.1  # seconds between two checks for `halt`


class Stopped(BaseException):
    """Raised in a run's threads after `Stages.halt`."""


class Stages:
    """The threads of a run. threads: False: each item is made in the caller's thread, when it is requested."""

    def __init__(self, threads: bool = True):
        self._threads: list[Thread] | None = [] if threads else None
        self._halted = Event()

    def check(self) -> None:
        """Raises Stopped after `halt`. Long work calls this again and again."""
        if self._halted.is_set():
            raise Stopped

    def halt(self) -> None:
        """End all threads, each at its next check, and wait for them."""
        self._halted.set()
        for thread in self._threads or ():
            thread.join()

    def ahead(self, items: Iterable[T], depth: int) -> Iterator[T]:
        """Yield the items, made up to `depth` ahead in a thread of their own. An exception in that thread is raised here."""
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
    """Yield the items, each made when it is requested, in inference mode, as in `_make`."""
    items = iter(items)
    while True:
        with torch.inference_mode():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
