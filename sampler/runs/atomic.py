"""Files that are there whole or not at all, and their digests."""

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
    """Of files' names, not where they lie, and contents, in the order of their paths. Raises OSError for one that is gone."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(repr((path.name, sha256(path))).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextmanager
def room(path: Path) -> Iterator[None]:
    """Writing to `path`. Raises OSError, saying that the same command goes on, where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        said = f"{os.strerror(error.errno)}: make room, then the same command goes on where it was"
        raise OSError(error.errno, said, str(path)) from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that appears at `path` whole or not at all.

    Raises OSError, saying that the same command goes on, where the disk is full.
    """
    part = path.with_name(path.name + ".part")
    try:
        with room(path):
            _create(part)
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # before its name is: after a power cut there would be an empty file else
            os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def _create(path: Path) -> None:
    """A new, empty file in the place of what a killed run left there, or of a link, which is not followed."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))


def save_image(image: Image.Image, path: Path) -> None:
    """The image as a PNG that is there whole or not at all."""
    with whole(path) as part:
        image.save(part, format="PNG")


def save_bytes(data: bytes, path: Path) -> None:
    """The bytes as a file that is there whole or not at all."""
    with whole(path) as part:
        part.write_bytes(data)


def link(source: Path, target: Path) -> None:
    """The file `source` at `target` as well, or a copy of it where they lie in different file systems."""
    target.parent.mkdir(exist_ok=True)
    with whole(target) as part:
        os.unlink(part)
        try:
            os.link(os.path.realpath(source), part)
        except OSError:
            shutil.copyfile(source, part)


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
