"""Atomic writes: a file is there as a whole or not at all. And the digests of files."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk that has no room


def files_sha256(files: Iterable[Path]) -> str:
    """The SHA-256 of files' names and contents, in the order of their paths. Raises OSError for a missing file."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(repr((path.name, sha256(path))).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextmanager
def explaining_a_full_disk(path: Path) -> Iterator[None]:
    """A context for writing `path`. If the disk is full, its OSError says that the same command can continue later."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        said = f"{os.strerror(error.errno)}: make room, then the same command goes on where it was"
        raise OSError(error.errno, said, str(path)) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A context that yields the path of a temporary file, which is renamed to `path` on exit, or removed after an error.

    Raises OSError, saying that the same command can continue later, if the disk is full.
    """
    part = path.with_name(path.name + ".part")
    try:
        with explaining_a_full_disk(path):
            _create(part)
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # first the contents, then the name: a power cut between them leaves no empty file
            os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def _create(path: Path) -> None:
    """Create a new, empty file. It replaces a file that a killed run left there. A link is replaced too, not followed."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image as a PNG, atomically."""
    with atomic_write(path) as part:
        image.save(part, format="PNG")


def save_bytes(data: bytes, path: Path) -> None:
    """Write bytes as a file, atomically."""
    with atomic_write(path) as part:
        part.write_bytes(data)


def link(source: Path, target: Path) -> None:
    """Make `target` a hard link to the file `source`, or a copy where a link is not possible."""
    target.parent.mkdir(exist_ok=True)
    with atomic_write(target) as part:
        os.unlink(part)
        try:
            os.link(os.path.realpath(source), part)
        except OSError:
            shutil.copyfile(source, part)


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
