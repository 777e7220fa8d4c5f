"""A run's folder and its `run.json`, the settings. One process at a time is at work in a folder.

A run that was stopped goes on where it was when it is started again with the same settings.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from .atomic import whole
from .jsontext import finite, json_bytes

LEFTOVERS = (".DS_Store", "Thumbs.db", "desktop.ini", "*.part")  # of desktops, and of a run killed while it wrote a file
# What names an image's file, and every file of that name with a suffix. Windows keeps some names for devices: con.png is one.
SAFE_ID = re.compile(r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[a-z0-9_][a-z0-9._-]{0,127}", re.IGNORECASE | re.ASCII)


def open_folder(out: str | Path, run: dict[str, Any]) -> None:
    """Make `out` ready for `run`, new or to be gone on with.

    Raises ValueError where `out` holds anything but this same run or another process is at work there, before anything is
    written.
    """
    out, run = Path(out), json.loads(json_bytes(run))  # as it will be read back
    if out.exists() and not out.is_dir():
        raise ValueError(f"output folder {str(out)!r} is a file: choose another")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):  # of two new runs at a time, one finds the other's settings
        _admit(out, run)
        (out / "images").mkdir(exist_ok=True)
        if not (out / "run.json").exists():
            with whole(out / "run.json") as part:
                part.write_bytes(json_bytes(run, indent=2) + b"\n")


def _admit(out: Path, run: dict[str, Any]) -> None:
    if (out / "run.json").exists():
        earlier = read_settings(out)
        differs = [name for name in run if earlier.get(name) != run[name]]
        if differs:
            raise ValueError(f"output folder {str(out)!r} holds another run (its {', '.join(differs)} differ): choose another")
    elif any(not path.is_dir() and not leftover(path) for path in out.rglob("*")):
        raise ValueError(f"output folder {str(out)!r} is not empty and holds no run of this program: choose another")


def leftover(path: Path) -> bool:
    """Whether a file is nothing of anybody's: see LEFTOVERS."""
    return any(map(path.match, LEFTOVERS))


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of a folder's run.json. Raises ValueError, saying what to do, where that is missing or not whole."""
    try:
        settings = finite(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ValueError(f"run folder {str(folder)!r} has no run.json, so it holds no run: choose another") from error
    except ValueError:  # not JSON, or not even text
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"run folder {str(folder)!r} has a run.json that is empty or cut off, so how its images were made is not known: "
            "delete the folder or choose another"
        )
    return settings


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, where the file system can; a process that dies lets go of it.

    Raises ValueError where another one has it.
    """
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                busy = f"another process is at work in {str(folder)!r}: wait for it, or choose another folder"
                raise ValueError(busy) from error
        yield
    finally:
        os.close(lock)
