"""A run's folder: `run.json` (its settings), a journal (a line an image), and files that are there whole or not at all.

One process at a time is at work in a folder.

A run that was stopped goes on where it was when it is started again with the same settings.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import nn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from .environment import environment

if TYPE_CHECKING:
    from .sampler import Sampler

LEFTOVERS = (".DS_Store", "Thumbs.db", "desktop.ini", "*.part")  # of desktops, and of a run killed while it wrote a file
# What names an image's file, and every file of that name with a suffix. Windows keeps some names for devices: con.png is one.
SAFE_ID = re.compile(r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$))[a-z0-9_][a-z0-9._-]{0,127}", re.IGNORECASE | re.ASCII)
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk that has no room


def settings_of(sampler: Sampler) -> dict[str, Any]:
    """What a run's images owe to the sampler and to the versions of what it is built on."""
    return {
        "scheduler": {"class": type(sampler.scheduler).__name__, **_public(sampler.scheduler.config)},
        "dtype": str(sampler.model.dtype).removeprefix("torch."),
        **environment(sampler.model.device),
    }


def weights_sha256(sampler: Sampler) -> str:
    """Of the pipeline as it is: every tensor of its modules, by name, what they are made of, and its vocabularies."""
    digest = hashlib.sha256()
    for name, part in sorted(sampler.pipe.components.items()):
        if isinstance(part, nn.Module):
            digest.update(f"{name} {json.dumps(_public(getattr(part, 'config', {})), sort_keys=True)}".encode())
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                if tensor.device.type != "meta":  # weights that come and go have no contents here
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif hasattr(part, "get_vocab"):
            digest.update(f"{name} {sorted(part.get_vocab().items())}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def files_sha256(files: Iterable[Path]) -> str:
    """Of files' names, not where they lie, and contents, in the order of their paths. Raises OSError for one that is gone."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(repr((path.name, sha256(path))).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _public(config: Any) -> dict[str, Any]:
    """A scheduler's settings as json reads them back, without diffusers' own notes, whose order differs from run to run."""
    config = config.to_dict() if hasattr(config, "to_dict") else config
    return json.loads(json.dumps({name: value for name, value in config.items() if name[0] != "_"}, default=str))


def open_folder(out: str | Path, run: dict[str, Any]) -> None:
    """Make `out` ready for `run`, new or to be gone on with.

    Raises ValueError where `out` holds anything but this same run or another process is at work there, before anything is
    written.
    """
    out, run = Path(out), json.loads(json.dumps(run))  # as it will be read back
    if out.exists() and not out.is_dir():
        raise ValueError(f"output folder {str(out)!r} is a file: choose another")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):  # of two new runs at a time, one finds the other's settings
        _admit(out, run)
        (out / "images").mkdir(exist_ok=True)
        if not (out / "run.json").exists():
            with whole(out / "run.json") as part:
                part.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


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
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
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
        text = memoryview("".join(map(_text, lines)).encode())
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
        sound = sound and name is not None and text == _text(line).encode()
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
            if number == following:
                file.write(_text(line).encode())
                following = next(wanted, None)
    return keys


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


def _text(line: dict[str, Any]) -> str:
    return json.dumps(finite(line), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
