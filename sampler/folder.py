"""A run's folder: `run.json` (its settings), a journal (a line an image), and files that are there whole or not at all.

A run that was stopped goes on where it was when it is started again with the same settings.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from PIL import Image

from .environment import environment

if TYPE_CHECKING:
    from .sampler import Sampler

LEFTOVERS = (".DS_Store", "Thumbs.db", "desktop.ini", "*.part")  # of desktops, and of a run killed while it wrote a file


def settings_of(sampler: Sampler) -> dict[str, Any]:
    """What a run's images owe to the sampler and to the versions of what it is built on."""
    return {
        "scheduler": {"class": type(sampler.scheduler).__name__, **_public(sampler.scheduler.config)},
        "dtype": str(sampler.model.dtype).removeprefix("torch."),
        **environment(sampler.model.device),
    }


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's settings as json reads them back, without diffusers' own notes, whose order differs from run to run."""
    return json.loads(json.dumps({name: value for name, value in config.items() if name[0] != "_"}, default=str))


def open_folder(out: str | Path, run: dict[str, Any]) -> None:
    """Make `out` ready for `run`, new or to be gone on with.

    Raises ValueError where `out` holds anything but this same run, before anything is written.
    """
    out, run = Path(out), json.loads(json.dumps(run))  # as it will be read back
    if (out / "run.json").exists():
        earlier = read_settings(out)
        differs = [name for name in run if earlier.get(name) != run[name]]
        if differs:
            raise ValueError(f"output folder {str(out)!r} holds another run (its {', '.join(differs)} differ): choose another")
    elif out.exists() and not out.is_dir():
        raise ValueError(f"output folder {str(out)!r} is a file: choose another")
    elif any(not path.is_dir() and not any(map(path.match, LEFTOVERS)) for path in out.rglob("*")):
        raise ValueError(f"output folder {str(out)!r} is not empty and holds no run of this program: choose another")
    (out / "images").mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").exists():
        with whole(out / "run.json") as part:
            part.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of a folder's run.json. Raises ValueError, saying what to do, where that is not whole."""
    try:
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not even text
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"run folder {str(folder)!r} has a run.json that is empty or cut off, so how its images were made is not known: "
            "delete the folder or choose another"
        )
    return settings


class Journal:
    """A JSON Lines file of what is done, to which a line is added for each image once that is there.

    Opening it repairs it: what is no JSON object (the line that a killed run left half written, blank lines) goes, and so does
    every line that does not count, an older one about the same image among them. So each line is an object, and each image has
    at most one.

    key: what a line is about, or None where the line does not count because its image is to be made again.
    lines: those that were there, by their keys.
    """

    def __init__(self, path: Path, key: Callable[[dict[str, Any]], Hashable | None]):
        self.lines = {name: line for line in read_lines(path) if (name := key(line)) is not None}
        text = "".join(map(_text, self.lines.values())).encode()
        if not path.exists() or path.read_bytes() != text:
            with whole(path) as part:
                part.write_bytes(text)
        self._file = path.open("ab")

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns."""
        self._file.write(_text(line).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _text(line: dict[str, Any]) -> str:
    return json.dumps(_finite(line), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, none where there is no file; what is no object is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # cut off by a kill, blank, or not ours
                continue
            if isinstance(line, dict):
                yield line


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that appears at `path` whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # before its name is: after a power cut there would be an empty file else
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


FRAMES_A_SECOND = 16  # of a video, which Wan was trained for


def save_image(image: Image.Image | Sequence[Image.Image], path: Path) -> None:
    """The image, or the frames of a video, as a PNG, or an animated one, that is there whole or not at all."""
    first, *others = image if isinstance(image, Sequence) else [image]
    moving = {"save_all": True, "append_images": others, "duration": 1000 / FRAMES_A_SECOND, "loop": 0} if others else {}
    with whole(path) as part:
        first.save(part, format="PNG", **moving)


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def intact(path: Path, digest: str | None) -> bool:
    """Whether the file is there with this SHA-256."""
    return path.is_file() and sha256(path) == digest
