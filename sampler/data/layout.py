"""Finds what a folder of pictures holds: the pictures, the text files beside them, and the tables of their captions."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from pathlib import Path

from .input_formats import ENCODING, ERRORS, NoText, in_utf8, row_of
from .names import IMAGE, TEXT, first
from .pictures import files_in, pictures_among, suffixes
from .rows import format_of, open_rows

METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))  # as the library `datasets` has them
BESIDE = (".txt", ".caption", ".json")  # suffixes of text files beside a picture; the first that has a caption counts
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


class Layout:
    """A folder of pictures, with all folders below it. images: the pictures, in the order of their paths.

    Raises FileNotFoundError for a missing folder.
    """

    def __init__(self, folder: Path):
        self.folder, files = folder, files_in(folder)
        self.images = pictures_among(files, folder)
        chosen = set(self.images)
        self._stems = {(path.parent, path.stem) for path in self.images}
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            self._by_name[path.name].append(path)
        self._texts: dict[tuple[Path, str], dict[str, Path]] = defaultdict(dict)
        for path in files:
            if path not in chosen and path.suffix.casefold() in BESIDE:
                self._texts[path.parent, path.stem][path.suffix.casefold()] = path
        self._metadata = [path for path in files if path.name.casefold() in METADATA]
        rest = (path for path in files if path not in chosen and (path.parent, path.stem) not in self._stems)
        self._others = [path for path in rest if format_of(path) in TABLES]

    @cached_property
    def tables(self) -> list[Path]:
        """The tables of captions: METADATA files. Without any, and without texts beside pictures: other tables with captions.

        Raises ValueError for a folder with two METADATA files.
        """
        homes = [path.parent for path in self._metadata]
        twice = next((home for home in homes if homes.count(home) > 1), None)
        if twice:
            names = " and ".join(path.name for path in self._metadata if path.parent == twice)
            raise ValueError(f"folder {str(twice)!r} has {names}: give the one that counts, or take the other away")
        if self._metadata or any(map(self.has_text, self.images)):
            return self._metadata
        return [path for path in self._others if _has_captions(path)]

    def name(self, image: Path) -> str:
        """Return the path of a picture relative to the folder, without its suffix."""
        return image.relative_to(self.folder).with_suffix("").as_posix()

    def has_text(self, image: Path) -> bool:
        """Whether a text file with the picture's name lies beside it."""
        return (image.parent, image.stem) in self._texts

    def texts(self, image: Path) -> tuple[list[str], str]:
        """Return (the captions in the text files beside a picture, what is wrong if there are none)."""
        beside = self._texts.get((image.parent, image.stem), {})
        found: dict[str, None] = {}
        wrong: list[str] = []
        for path in (beside[suffix] for suffix in BESIDE if suffix in beside):
            try:
                found.setdefault(caption_in(path.read_bytes(), path.suffix.casefold(), f"caption file {str(path)!r}"))
            except ValueError as error:
                wrong.append(str(error))
        return list(found), "" if found else (wrong or ["no text beside it"])[0]

    @property
    def elsewhere(self) -> Path | None:
        """A text file that has a picture's name but lies in another folder, if there is one."""
        names = {stem for _, stem in self._stems}
        texts = (found for key, found in self._texts.items() if key[1] in names and key not in self._stems)
        return next((path for found in texts for path in found.values()), None)

    def find(self, name: str, home: Path) -> Path:
        """Return the picture that a table in the folder `home` names: in `home`, else the only one whose path ends in `name`.

        Raises ValueError where no picture or several fit.
        """
        parts = Path(_plain(name)).parts
        found = [path for path in self._by_name.get(parts[-1] if parts else "", ()) if path.parts[-len(parts) :] == parts]
        if (home / name).is_file() or not found:
            return file_in(name, home)
        if len(found) > 1:
            raise ValueError(f"its image {name[:80]!r} may be {str(found[0])!r} or {str(found[1])!r}: name its folder, too")
        return found[0]


def file_in(name: str, home: Path) -> Path:
    """The file `name` in the folder `home`. Raises ValueError where it is missing."""
    found = next((path for path in (home / name, home / _plain(name)) if path.is_file()), None)
    if found is None:
        raise ValueError(f"its image {name[:80]!r} is not in {str(home)!r}")
    return found


def _plain(name: str) -> str:
    """Return a path with "/" for the backslashes of Windows."""
    return name.replace("\\", "/")


def _has_captions(path: Path) -> bool:
    """Whether a table may hold captions: its first row cannot be read, or it has a text and any file it names is a picture."""
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


def caption_in(data: bytes, suffix: str, name: str) -> str:
    """Return the caption in a text file's bytes. suffix: one of BESIDE. Raises ValueError, naming `name`, if there is none."""
    try:
        text = in_utf8(data.decode(ENCODING, ERRORS).strip())
        caption = first(row_of(text), TEXT) if suffix == ".json" else text
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("holds no caption")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return caption.strip()
