"""A JSON Lines file that gets a line for each finished piece of work, and is repaired after a kill."""

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

from .atomic import atomic_write, explaining_a_full_disk
from .jsontext import json_bytes
from .run_folder import locked


class Keys:
    """A set of keys, stored as digests of 8 bytes: a million keys take 8 MB, and their positions another 8 MB.

    digests: the digests of the keys, see `digest`. Among a million keys, two share a digest with a probability of 3e-8.
    last: for each distinct digest, in ascending order, its last position in `digests`, from 0.
    """

    def __init__(self, digests: Iterable[int]):
        given = np.fromiter(digests, np.uint64)
        self._sorted, place = np.unique(given[::-1], return_index=True)
        self.last = len(given) - 1 - place

    @staticmethod
    def digest(key: Hashable) -> int:
        return int.from_bytes(hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest())

    def find(self, key: Hashable) -> int | None:
        """Return the last position of the key's digest in `digests`; None if it is not there."""
        digest = np.uint64(self.digest(key))
        place = np.searchsorted(self._sorted, digest)
        return int(self.last[place]) if place < len(self) and self._sorted[place] == digest else None

    def __contains__(self, key: Hashable) -> bool:
        return self.find(key) is not None

    def __len__(self) -> int:
        return len(self._sorted)


class Journal:
    """A JSON Lines file of finished work: a line is added for each image after its file is written.

    Opening the journal repairs the file. It removes lines that are not JSON objects, such as one that a killed run left half
    written, and lines that do not count. Of several lines with one key it keeps the last. Lines are read one by one, and only
    digests of their keys stay in memory: `key in journal` tells whether a line has this key.

    key: returns the key of a line, or None for a line that does not count, because its image must be made again. A line without
        the fields that `key` reads does not count.

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
        """Append lines, and wait until they are on the disk. Raises FileNotFoundError if the file was removed or replaced."""
        text = memoryview(b"".join(map(_text, lines)))
        with explaining_a_full_disk(self.path):
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
    """Remove from the file all lines that a `Journal` does not keep. Returns the keys of the others."""
    digests, numbers, sound = array("Q"), array("Q"), path.exists()  # the keys' digests and the numbers of the lines that count
    for number, (text, line) in enumerate(texts(path)):
        try:
            name = None if line is None else key(line)
        except (LookupError, TypeError):  # the line lacks a field, or has one of another type
            name = None
        sound = sound and line is not None and name is not None and text == _text(line)
        if name is not None:
            digests.append(Keys.digest(name))
            numbers.append(number)
    keys = Keys(digests)
    if sound and len(keys) == len(numbers):  # nothing to repair
        return keys
    wanted = iter(sorted(numbers[i] for i in keys.last))
    following = next(wanted, None)
    with atomic_write(path) as part, part.open("wb") as file:
        for number, (_, line) in enumerate(texts(path)):
            if number == following and line is not None:
                file.write(_text(line))
                following = next(wanted, None)
    return keys


def _text(line: dict[str, Any]) -> bytes:
    return json_bytes(line) + b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file. Lines that are no objects are passed over; a missing file has none."""
    return (line for _, line in texts(path) if line is not None)


def texts(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a JSON Lines file as (bytes, object); None for a line that is no object."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # cut off by a kill, blank, or not ours
                line = None
            yield text, line if isinstance(line, dict) else None
