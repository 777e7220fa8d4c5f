"""Names of columns in any spelling, and ids that can name files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

from ..runs.run_folder import SAFE_ID

IDS = "1 to 128 letters, digits, '.', '_' or '-', not starting with '.' or '-' and no device of Windows, as con or nul"
# Of the columns TEXT, and of IMAGE, the first that is not empty counts. "file" is the manifest's name of an image's path.
TEXT, IMAGE = ("prompt", "caption", "text"), ("image", "file", "file_name", "path")
COLUMN = "prompt, caption or text"
KNOWN = (*TEXT, *IMAGE, "id", "seed", "negative_prompt", "steps", "scale", "concept", "height", "width", "count", "guidance")
MEANT = {"negative": "negative_prompt", "guidance_scale": "scale", "cfg_scale": "scale", "num_inference_steps": "steps"}


def _letters(name: str) -> str:
    """Return a column's name in a uniform spelling: "File name", "file-name" and "fileName" become "filename"."""
    return re.sub(r"[\s\ufeff_-]", "", name).casefold()


_KNOWN = {_letters(name): name for name in KNOWN}
_MEANT = {_letters(name): meant for name, meant in MEANT.items()}


@lru_cache(maxsize=256)
def columns(names: tuple[str, ...]) -> dict[str, str]:
    """Return the name in KNOWN of each column, by its name in the file. Unknown columns keep theirs; blank ones are left out.

    Raises ValueError for a column that comes twice, and for an unknown one that looks like a misspelled known one.
    """
    found: dict[str, str] = {}
    for name in names:
        if not name.strip():
            continue
        known = _KNOWN.get(_letters(name), name)
        if known in found.values():
            raise ValueError(f"must name each column once; {known!r} comes twice among {', '.join(names)}")
        if known not in KNOWN and (meant := _nearly(name)):
            raise ValueError(f"unknown column {name!r}: call it {meant!r} if that is meant, else leave it out or rename it")
        found[name] = known
    return found


def _nearly(name: str) -> str | None:
    """Return the known column of which an unknown name may be a misspelling, or None."""
    letters = _letters(name)
    return _MEANT.get(letters) or next((known for given, known in _KNOWN.items() if _slip(letters, given)), None)


def _slip(name: str, known: str) -> bool:
    """Whether `name` is `known` with a letter too many or too few, another letter, or two exchanged.

    Short words are close to other words: "idx" is no slip of "id", nor "test" of "text".
    """
    if len(known) < 4 or len(name) < 3 or name[0] != known[0]:
        return False
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name, known, strict=False)))
    one, other = name[same:], known[same:]
    if one[:1].isdigit():  # "prompt2" is no slip
        return False
    exchanged = one[:2] == other[1::-1] and one[2:] == other[2:]
    return one[1:] == other or one == other[1:] or exchanged or (len(known) > 4 and one[1:] == other[1:])


def first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the value of the first of these columns that is not empty; None if all are."""
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


class Ids:
    """Makes ids of names: readable, fit to name files, and different each time.

    If a name is not fit as it is, or its id is taken, the name's digest is appended.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, name: str) -> str:
        """name: a path inside the set, with "/" between its parts."""
        plain = name.replace("/", "-")
        found = re.sub(r"[^A-Za-z0-9._-]", "_", plain).lstrip(".-")[:100]
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
        # Some file systems do not tell A.png from a.png.
        if found != plain or not SAFE_ID.fullmatch(found) or found.casefold() in self._taken:
            found = f"{found or '_'}-{digest[:8]}"
        if found.casefold() in self._taken:
            found = digest
        self._taken.add(found.casefold())
        return found
