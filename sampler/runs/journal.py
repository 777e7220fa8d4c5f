"""A JSON Lines file that grows by a line for each thing done, and is repaired after a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from .atomic import room, whole
from .folder import locked
from .jsontext import json_bytes


class Keys:
    """A set of keys that takes 8 bytes a key: a digest of each, so that a million cost no memory worth speaking of.

    digests: of the keys, each by `digest`. Two keys are taken for one with a probability of 3e-8 among a million.
    """

    def __init__(self, digests: Iterable[int]):
        self._sorted = np.unique(np.fromiter(digests, np.uint64))

    @staticmethod
    def digest(key: Hashable) -> int:
        return int.from_bytes(hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest())

    def __contains__(self, key: Hashable) -> bool:
        digest = np.uint64(self.digest(key))
        place = np.searchsorted(self._sorted, digest)
        return bool(place < len(self) and self._sorted[place] == digest)

    def __len__(self) -> int:
        return len(self._sorted)


class Journal:
    """A JSON Lines file of what is done, to which a line is added for each image once that is there.

    Opening it repairs it: what is no JSON object (the line that a killed run left half written, blank lines) goes, and so does
    every line that does not count, an older one about the same image among them. So each line is an object, and each image has
    at most one. Lines are read one by one and not kept: `key in journal` says whether there was one.

    key: what a line is about, or None where the line does not count because its image is to be made again. A line that lacks
        what `key` looks for does not count.

    Raises ValueError where another process is at work in the file's folder.
    """

    def __init__(self, path: Path, key: Callable[[dict[str, Any]], Hashable | None]):
        self.path = path
        with ExitStack() as held:
            held.enter_context(locked(path.parent))
            self._keys = _repair(path, key)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            held.callback(os.close, self._file)
            self._held = held.pop_all()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def append(self, *lines: dict[str, Any]) -> None:
        """Add lines; they are on the disk when this returns. Raises FileNotFoundError where the file was removed meanwhile."""
        text = memoryview(b"".join(map(_text, lines)))
        with room(self.path):
            while text:
                text = text[os.write(self._file, text) :]
            os.fsync(self._file)
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._file)):
            raise FileNotFoundError(
                errno.ENOENT,
                "was removed or replaced while the run went on; the same command makes again what it no longer tells of",
                str(self.path),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


def _repair(path: Path, key: Callable[[dict[str, Any]], Hashable | None]) -> Keys:
    """The keys of the lines that count, which are all that is left in the file. Nothing holds all lines at a time."""
    digests, numbers, sound = array("Q"), array("Q"), path.exists()  # of lines that count: what about, and where they stand
    for number, (text, line) in enumerate(texts(path)):
        try:
            name = None if line is None else key(line)
        except (LookupError, TypeError):  # it lacks what is looked for, or has another kind of thing there
            name = None
        sound = sound and line is not None and name is not None and text == _text(line)
        if name is not None:
            digests.append(Keys.digest(name))
            numbers.append(number)
    keys = Keys(digests)
    if sound and len(keys) == len(numbers):  # one that is sound is not written again
        return keys
    _, last = np.unique(np.frombuffer(digests, np.uint64)[::-1], return_index=True)
    wanted = iter(np.sort(np.frombuffer(numbers, np.uint64)[::-1][last]).tolist())
    following = next(wanted, None)
    with whole(path) as part, part.open("wb") as file:
        for number, (_, line) in enumerate(texts(path)):
            if number == following and line is not None:
                file.write(_text(line))
                following = next(wanted, None)
    return keys


def _text(line: dict[str, Any]) -> bytes:
    return json_bytes(line) + b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, none where there is no file; what is no object is passed over."""
    return (line for _, line in texts(path) if line is not None)


def texts(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a JSON Lines file, each with the object that it is; None for what is none."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # cut off by a kill, blank, or not ours
                line = None
            yield text, line if isinstance(line, dict) else None
