"""A run's folder and its `run.json`, the settings. One process at a time works in a folder.

A run that was stopped goes on when it is started again with the same settings.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module that is not there

from .atomic import atomic_write
from .jsontext import finite, json_bytes

LEFTOVERS = (".DS_Store", "Thumbs.db", "desktop.ini", "*.part")  # left by desktops, and by a run that was killed
DIGEST = re.compile("[0-9a-f]{64}")
SHORT = 60  # the most characters of a value in a message
SAID = 6  # the most differences in a message
# An id names its image's file. Windows keeps some names for devices, with any suffix: con.png is one.
SAFE_ID = re.compile(r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[a-z0-9_][a-z0-9._-]{0,127}", re.IGNORECASE | re.ASCII)


def open_folder(
    out: str | Path,
    run: Mapping[str, Any],
    growing: Collection[str] = (),
    grown: Callable[[dict[str, Any]], None] = lambda known: None,
) -> None:
    """Prepare the folder `out` for a new run with the settings `run`, or to continue that run.

    growing: the settings that may differ from those in the folder. `grown` is called with the folder's settings if any differ,
             and raises ValueError if the run cannot continue with the new ones.

    Raises ValueError, before it writes a file, if `out` holds anything except this run, or if another process works there.
    """
    out, run = Path(out), json.loads(json_bytes(run))  # as it will be read back
    if out.exists() and not out.is_dir():
        raise ValueError(f"output folder {str(out)!r} is a file: choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output folder {str(out)!r} cannot be made: {error.strerror}") from error
    with locked(out):  # of two new runs at a time, one finds the other's settings
        known = _admit(out, run, growing)
        if known and known != run:
            grown(known)
        (out / "images").mkdir(exist_ok=True)
        if known != run:
            with atomic_write(out / "run.json") as part:
                part.write_bytes(json_bytes(run, indent=2) + b"\n")


def _admit(out: Path, run: Mapping[str, Any], growing: Collection[str]) -> dict[str, Any]:
    """Return the settings of the run in `out`, which `run` may continue; {} if `out` is empty. Raises as `open_folder`."""
    if (out / "run.json").exists():
        known = read_settings(out)
        if said := differences(known, run, growing):
            raise ValueError(f"output folder {str(out)!r} holds another run ({said}): choose another")
        return known
    if any((part / "run.json").exists() for part in out.glob("shard-*-of-*")):
        raise ValueError(
            f"output folder {str(out)!r} holds shards of a run: `basinescape merge {out} --out FOLDER` makes them one run; or "
            "choose another"
        )
    if any(not path.is_dir() and not leftover(path) for path in out.rglob("*")):
        raise ValueError(f"output folder {str(out)!r} is not empty and holds no run of this program: choose another")
    return {}


def differences(known: Mapping[str, Any], run: Mapping[str, Any], but: Collection[str] = ()) -> str:
    """Describe the settings that differ, except those in `but`: "its steps, scale differ", and both values of each.

    Models with the same weights count as the same, wherever they were loaded from.
    """
    names = [name for name in {**known, **run} if name not in but and known.get(name) != run.get(name)]
    if "model" in names and known.get("weights") is not None and known.get("weights") == run.get("weights"):
        names.remove("model")
    if not names:
        return ""
    texts = [text for name in names for text in _both(name, known.get(name), run.get(name))]
    both = "; ".join(texts[:SAID]) + (f"; and {len(texts) - SAID} more" if len(texts) > SAID else "")
    return f"its {', '.join(names)} differ" + (f": {both}" if both else "")


def _both(name: str, there: Any, now: Any) -> Iterator[str]:
    """Yield a text with the two values of a setting, or one for each inner difference of two dicts. Digests are left out."""
    if isinstance(there, dict) and isinstance(now, dict):
        for inner in {**there, **now}:
            if there.get(inner) != now.get(inner):
                yield from _both(f"{name}.{inner}", there.get(inner), now.get(inner))
    elif not all(isinstance(value, str) and DIGEST.fullmatch(value) for value in (there, now)):
        texts = [json.dumps(value, ensure_ascii=False) for value in (there, now)]
        cut = max(map(len, texts)) > SHORT
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))) if cut else 0
        first, second = (_short(text, max(0, same - SHORT // 4)) for text in texts)  # shows where they differ
        yield f"{name} {first} there, {second} now"


def _short(text: str, start: int) -> str:
    """A part of a text from `start` on, of SHORT letters at most."""
    part = text[start : start + SHORT]
    return ("..." if start else "") + part + ("..." if start + SHORT < len(text) else "")


def leftover(path: Path) -> bool:
    """Whether a file is one of LEFTOVERS, which nobody misses."""
    return any(map(path.match, LEFTOVERS))


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of a folder's run.json. Raises ValueError, saying what to do, where it is missing or damaged."""
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
    """A context in which no other process can lock the folder, if the system has locks. The lock ends with the process.

    Raises ValueError where another process holds the lock.
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
