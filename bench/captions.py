"""Captions with their training images, in the layouts that people keep them in."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .scenario import IMAGES, Prompt

CAPTION, IMAGE = ("text", "caption", "prompt"), ("file_name", "image", "path")  # names of the columns, the first found counts
METADATA = ("metadata.jsonl", "metadata.csv")  # of a folder of images on the Hugging Face hub
Row = tuple[str, Mapping[str, Any]]  # where it stands, as "line 3", and what it says


def read_captions(source: str | Path) -> list[Prompt]:
    """Captions and, where they have one, their images.

    source: a folder of images, each with its caption in a .txt file of its name, or with a `metadata.jsonl` or `metadata.csv`;
            JSON Lines, CSV, or JSON (a list of objects) with `text`, `caption` or `prompt`, and perhaps `file_name` or `image`,
            `id` and `concept`; or JSON of captions by image, `{"a.jpg": "..."}` or `{"a.jpg": ["...", "..."]}`. Images lie
            beside the file or, relative to it, where it says. Ids are made fit for file names, and are made to differ.

    Raises FileNotFoundError for what is missing, ValueError for anything else, each naming the file and the line.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"captions {str(path)!r} do not exist")
    listed = next((path / name for name in METADATA if (path / name).is_file()), None)
    if path.is_dir() and listed is None:
        found = list(_folder(path))
    else:
        path = listed or path
        if path.suffix.lower() not in READERS:
            raise ValueError(f"captions {str(path)!r} must be a folder of images, or one of {', '.join(READERS)}")
        try:
            rows = READERS[path.suffix.lower()](path.read_text(encoding="utf-8-sig"))
            found = [_prompt(path, i, *row) for i, row in enumerate(rows)]
        except ValueError as error:
            raise ValueError(f"captions {str(path)!r}, {error}") from error
    if not found:
        raise ValueError(f"captions {str(source)!r} hold none")
    return _apart(found)


def images_in(folder: str | Path) -> list[Path]:
    """The images anywhere in a folder. Raises FileNotFoundError where there is no such folder, ValueError for one without."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"folder {str(folder)!r} does not exist")
    found = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in IMAGES]
    if not found:
        raise ValueError(f"folder {str(folder)!r} holds no image ({', '.join(IMAGES)})")
    return found


def _folder(folder: Path) -> Iterator[Prompt]:
    for image in images_in(folder):
        text = image.with_suffix(".txt")
        if not text.is_file():
            raise FileNotFoundError(
                f"captions {str(folder)!r}: {image.name} has no caption, as {text.name} or in {METADATA[0]}"
            )
        yield Prompt(str(image.relative_to(folder).with_suffix("")), text.read_text(encoding="utf-8").strip(), image)


def _prompt(path: Path, number: int, where: str, row: Mapping[str, Any]) -> Prompt:
    text, image = (next((row[name] for name in names if row.get(name)), None) for names in (CAPTION, IMAGE))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: has no {', '.join(CAPTION[:-1])} or {CAPTION[-1]}")
    if image is not None and not (path.parent / str(image)).is_file():
        raise FileNotFoundError(
            f"captions {str(path)!r}, {where}: its image {str(image)!r} is not at {path.parent / str(image)}"
        )
    id = row.get("id") or (Path(str(image)).with_suffix("") if image else f"{number:04d}")
    return Prompt(str(id), text.strip(), path.parent / str(image) if image else None, row.get("concept"))


def _apart(found: list[Prompt]) -> list[Prompt]:
    """The same with ids that can name files and differ."""
    taken: dict[str, int] = {}
    apart = []
    for prompt in found:
        id = re.sub(r"[^A-Za-z0-9._-]+", "-", prompt.id).strip("-.")[-100:] or "caption"
        again = taken[id.casefold()] = taken.get(id.casefold(), 0) + 1
        apart.append(Prompt(f"{id}-{again}" if again > 1 else id, prompt.text, prompt.image, prompt.concept))
    if len({prompt.id.casefold() for prompt in apart}) < len(apart):
        raise ValueError("captions have ids that cannot be told apart: give each one an id of its own")
    return apart


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: not JSON: {error}") from error
            yield _object(f"line {number}", row)


def _json(text: str) -> Iterator[Row]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"which is not JSON: {error}") from error
    if isinstance(data, dict):
        data = [
            {"image": image, "text": caption}
            for image, captions in data.items()
            for caption in ([captions] if isinstance(captions, str) else captions)
        ]
    if not isinstance(data, list):
        raise ValueError(f"which must be captions by image or a list of objects, and is a {type(data).__name__}")
    for number, row in enumerate(data, 1):
        yield _object(f"entry {number}", row)


def _object(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: must be an object such as {{"file_name": "a.jpg", "text": "a cat"}}, got {str(row)[:60]}')
    return where, row


def _csv(text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield f"line {reader.line_num}", row


READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
