"""Finds what a folder of pictures holds: the pictures, the text files beside them, and the tables of their captions."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from .formats import ENCODING, ERRORS, NoText, fault_of, row_of
from .names import IMAGE, TEXT, first
from .pictures import files_in, pictures_among, suffixes
from .rows import format_of, open_rows

METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))  # as the library `datasets` has them
BESIDE = (".txt", ".caption", ".json")  # suffixes of text files beside a picture; the first that is there counts
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


class Layout:
    """A folder of pictures, with all folders below it.

    images: the pictures, in the order of their paths.
    metadata: the files named as in METADATA.

    Raises FileNotFoundError for a missing folder.
    """

    def __init__(self, folder: Path):
        self.folder, files = folder, files_in(folder)
        self.images = pictures_among(files, folder)
        chosen = set(self.images)
        self._by_name: dict[str, list[Path]] = {}
        for path in self.images:
            self._by_name.setdefault(path.name, []).append(path)
        self._texts: dict[tuple[Path, str], dict[str, Path]] = {}
        for path in files:
            if path not in chosen and path.suffix.casefold() in BESIDE:
                self._texts.setdefault((path.parent, path.stem), {})[path.suffix.casefold()] = path
        self.metadata = [path for path in files if path.name.casefold() in METADATA]
        own = {(path.parent, path.stem) for path in self.images}
        rest = (path for path in files if path not in chosen and (path.parent, path.stem) not in own)
        self._others = [path for path in rest if format_of(path) in TABLES]

    @cached_property
    def tables(self) -> list[Path]:
        """The tables of captions: `metadata` or, where there is none, other tables that have captions.

        Raises ValueError for a folder with two files of METADATA.
        """
        homes = [path.parent for path in self.metadata]
        twice = next((home for home in homes if homes.count(home) > 1), None)
        if twice:
            names = " and ".join(path.name for path in self.metadata if path.parent == twice)
            raise ValueError(f"folder {str(twice)!r} has {names}: give the one that counts, or take the other away")
        return self.metadata or [path for path in self._others if _has_captions(path)]

    def beside(self, image: Path) -> list[Path]:
        """The text files beside a picture that have its name. The first one counts."""
        texts = self._texts.get((image.parent, image.stem), {})
        return [texts[suffix] for suffix in BESIDE if suffix in texts]

    @property
    def elsewhere(self) -> Path | None:
        """A text file that has a picture's name but lies in another folder, if there is one."""
        stems = {path.stem for path in self.images}
        own = {(path.parent, path.stem) for path in self.images}
        texts = (found for key, found in self._texts.items() if key[1] in stems and key not in own)
        return next((path for found in texts for path in found.values()), None)

    def find(self, name: str, home: Path) -> Path:
        """The picture that a table in the folder `home` names: in `home`, or else the only picture whose path ends in `name`.

        Raises ValueError where no picture or several fit.
        """
        parts = Path(name).parts
        found = [path for path in self._by_name.get(Path(name).name, ()) if path.parts[-len(parts) :] == parts]
        if (home / name).is_file() or not found:
            return file_in(name, home)
        if len(found) > 1:
            raise ValueError(f"its image {name[:80]!r} may be {str(found[0])!r} or {str(found[1])!r}: name its folder, too")
        return found[0]


def file_in(name: str, home: Path) -> Path:
    """The file `name` in the folder `home`. Raises ValueError where it is missing."""
    if not (home / name).is_file():
        raise ValueError(f"its image {name[:80]!r} is not in {str(home)!r}")
    return home / name


def _has_captions(path: Path) -> bool:
    """Whether a table may hold captions, by its first row: a text and, if it names a file, a picture. An unreadable row may."""
    try:
        row = next(open_rows(str(path))[1](), None)
    except NoText:
        return False
    except ValueError:
        return True
    if row is None or isinstance(row.said, str):
        return row is not None
    text, image = first(row.said, TEXT), first(row.said, IMAGE)
    named = image is None or (isinstance(image, str) and Path(image).suffix.casefold() in suffixes())
    return named and isinstance(text, str | list)


def caption_of(path: Path) -> str:
    """The caption in a text file beside a picture. Raises ValueError, naming the file, where it holds none."""
    return caption_in(path.read_bytes(), path.suffix.casefold(), f"caption file {str(path)!r}")


def caption_in(data: bytes, suffix: str, name: str) -> str:
    """The caption in the bytes of a text file. suffix: one of BESIDE. Raises ValueError where they hold none."""
    text = data.decode(ENCODING, ERRORS).strip()
    fault, caption = fault_of(text), text
    if fault is None and suffix == ".json":
        row = row_of(text)
        fault, caption = (row, "") if isinstance(row, str) else (None, first(row, TEXT))
    if fault is not None or not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"{name}: {fault or 'holds no caption'}")
    return caption.strip()
