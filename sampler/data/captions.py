"""Captions, and the training images that they belong to, in the layouts that people keep them in."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basinescape.prompts import COLUMN, IMAGE, SAFE_ID, TEXT

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")  # in a folder of images, as Hugging Face's datasets has it
LAYOUTS = "a .jsonl, .json, .csv or .parquet file, or a folder of images"


@dataclass(frozen=True)
class Prompt:
    """A prompt; `image` is the training image it belongs to, `concept` what its picture must show, where known."""

    id: str
    text: str
    image: Path | None = None
    concept: str | None = None


def read_prompts(source: str | Path, where: str = "", images: str | Path | None = None, every: bool = False) -> list[Prompt]:
    """Prompts and their training images.

    source: JSON Lines, CSV or Parquet of prompt (or caption, or text) and perhaps image (or file_name), id, concept; JSON, a
            list of such objects, or an object of captions by image path, `{"images/1.jpg": ["a caption"]}`; or a folder of
            images, each with its caption in metadata.jsonl, in a .txt file beside it or, where there are none and the images
            lie in folders of their own, in that folder's name.
    where:  where to get what is missing. images: the folder that image paths are in, by default that of `source`; a prompt
            without one belongs to the image there that has its id for a name, if any.
    every:  all captions of an image that has several, not the first one alone.

    Raises FileNotFoundError for what is missing, ValueError for another layout, naming the file and the entry.
    """
    path = Path(source)
    if not path.exists():
        published = f"; their authors publish them: {where}" if where else ""
        raise FileNotFoundError(f"prompts {str(path)!r} do not exist{published}")
    listed = next((path / name for name in METADATA if (path / name).is_file()), None) if path.is_dir() else path
    if listed is None:
        found = _pairs(path, images_in(path))
    else:
        folder = Path(images) if images is not None else listed.parent
        found = [_prompt(f"{listed}, {entry}", row, number, folder) for number, (entry, row) in enumerate(_rows(listed, every))]
        if images is not None:
            by_name = {file.stem: file for file in images_in(folder)}
            found = [Prompt(p.id, p.text, p.image or by_name.get(p.id), p.concept) for p in found]
    if not found:
        raise ValueError(f"prompts {str(path)!r} hold no prompts")
    known: set[str] = set()
    for prompt in found:
        if not prompt.text.strip():
            raise ValueError(f"prompts {str(path)!r}: {prompt.id} has an empty caption")
        if not SAFE_ID.fullmatch(prompt.id):
            raise ValueError(f"prompts {str(path)!r}: id must be 1 to 128 letters, digits, '.', '_' or '-', got {prompt.id!r}")
        if prompt.id.casefold() in known:  # it names a file
            raise ValueError(f"prompts {str(path)!r}: id {prompt.id!r} comes twice")
        known.add(prompt.id.casefold())
    return found


def images_in(folder: str | Path) -> list[Path]:
    """The images of a folder and of those in it. Raises FileNotFoundError where there is no such folder."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"images folder {str(folder)!r} does not exist")
    return [file for file in sorted(Path(folder).rglob("*")) if file.suffix.lower() in IMAGES]


def _pairs(folder: Path, images: Sequence[Path]) -> list[Prompt]:
    without = [image for image in images if not image.with_suffix(".txt").is_file()]
    named = len(without) == len(images) and all(image.parent != folder for image in images)
    if without and not named:
        first = without[0].with_suffix(".txt").name
        raise FileNotFoundError(
            f"prompts {str(folder)!r}: {len(without)} of {len(images)} images have no caption: put that of {without[0].name!r} "
            f"into {first!r}, or all into metadata.jsonl (file_name, text)"
        )
    return [_pair(folder, image, named) for image in images]


def _pair(folder: Path, image: Path, named: bool) -> Prompt:
    text = image.parent.name.replace("_", " ") if named else image.with_suffix(".txt").read_text(encoding="utf-8").strip()
    return Prompt(_id(str(image.relative_to(folder).with_suffix(""))), text, image)


def _rows(path: Path, every: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of a file, and where each stands."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            if line.strip():
                yield f"line {number}", _object(f"{path}, line {number}", line)
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            yield from ((f"line {rows.line_num}", {name: cell or None for name, cell in row.items()}) for row in rows)
    elif path.suffix == ".parquet":
        from pyarrow import parquet

        yield from ((f"row {number}", row) for number, row in enumerate(parquet.read_table(path).to_pylist(), 1))
    elif path.suffix == ".json":
        content = _object(str(path), path.read_text(encoding="utf-8-sig"), dict | list)
        if isinstance(content, dict):
            content = [
                {"id": _id(str(Path(image).with_suffix(""))) + (f"-{k}" if k > 1 else ""), "image": image, "caption": caption}
                for image, texts in content.items()
                for k, caption in enumerate(_captions(texts, every), 1)
            ]
        yield from ((f"entry {number}", row) for number, row in enumerate(content, 1))
    else:
        raise ValueError(f"prompts {str(path)!r} must be {LAYOUTS}")


def _captions(texts: Any, every: bool) -> list[Any]:
    """An image's captions, one or a list."""
    listed = texts if isinstance(texts, list) and texts else [texts]
    return listed if every else listed[:1]


def _object(where: str, text: str, kind: Any = dict) -> Any:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{where}: must be an object of captions by image path, or objects, got a {type(found).__name__}")
    return found


def _prompt(where: str, entry: Mapping[str, Any], number: int, folder: Path) -> Prompt:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: must be an object, got a {type(entry).__name__}")
    text = next((entry[name] for name in TEXT if entry.get(name) is not None), None)
    if not isinstance(text, str):
        raise ValueError(f"{where}: needs {COLUMN}; it has {', '.join(map(str, entry)) or 'nothing'}")
    image = next((entry[name] for name in IMAGE if entry.get(name)), None)
    if image is not None and not (isinstance(image, str) and (folder / image).is_file()):
        raise FileNotFoundError(f"{where}: its image {str(image)[:80]!r} is not in {str(folder)!r}")
    id = entry.get("id")
    return Prompt(f"{number:04d}" if id is None else str(id), text, folder / image if image else None, entry.get("concept"))


def _id(name: str) -> str:
    """A file's name as a prompt's id."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name.replace("/", "-")).lstrip(".-") or "_"
