"""Writes and checks images/metadata.jsonl, which makes a folder of pictures an imagefolder of the library `datasets`.

`datasets.load_dataset("imagefolder", data_dir=...)` gives each picture with its text.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from ..runs.atomic import atomic_write
from ..runs.jsonl_journal import Keys, texts
from ..runs.jsontext import json_bytes
from ..runs.manifest import MANIFEST, lacks, read_jobs

METADATA = "images/metadata.jsonl"
# Fields of the manifest by which people choose pictures. A field that one picture has is in the row of every picture.
CHOSEN = ("id", "seed", "score", "suspect", "similarity", "copy", "nearest_in_set", "similarity_in_set", "duplicate_of")


def write(out: Path) -> None:
    """Write the metadata of a run's folder: a row for each picture of its manifest, in the order of the jobs."""
    if fault(out) is None:
        return
    with atomic_write(out / METADATA) as part, part.open("wb") as file:
        file.writelines(_rows(out))


def fault(out: Path) -> str | None:
    """Return what is wrong with the metadata of a run's folder; None if they agree with its manifest."""
    if not (out / METADATA).is_file():
        return "is missing" if next(_rows(out), None) else None  # without pictures there is no file
    with (out / METADATA).open("rb") as file:
        same = all(one == other for one, other in zip_longest(file, _rows(out)))
    return None if same else f"does not say what {MANIFEST} says"


def _rows(out: Path) -> Iterator[bytes]:
    """Yield the rows in the order of the jobs. Each line of the manifest is looked up alone, so that memory never holds all."""
    digests, places, place = array("Q"), array("Q"), 0
    names: set[str] = set()
    for text, line in texts(out / MANIFEST):
        if line is not None and not lacks(line) and line["status"] == "ok":
            digests.append(Keys.digest(line["id"]))
            places.append(place)
            names |= line.keys()
        place += len(text)
    if not places:
        return
    keys, columns = Keys(digests), [name for name in CHOSEN if name in names]
    with (out / MANIFEST).open("rb") as file:
        for _, id in read_jobs(out):
            if (found := keys.find(id)) is not None:
                file.seek(places[found])
                line = json.loads(file.readline())
                row = {"file_name": PurePosixPath(line["file"]).name, "text": line["prompt"]}
                yield json_bytes(row | {name: line.get(name) for name in columns}) + b"\n"
