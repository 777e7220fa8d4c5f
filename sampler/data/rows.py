"""The one reader of tables of prompts and captions, with one rule for what is wrong in them."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from .input_formats import HUB, NoText, Rows, csv_file, dataset, json_file, json_lines, lines, parquet

log = logging.getLogger(__name__)
ON_ERROR = ("stop", "skip")
SAVED = ("state.json", "dataset_dict.json")  # one of them is in a folder that `datasets` saved


FORMATS: dict[str, Callable[[Path], Rows]] = {  # by suffix
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": csv_file,
    ".tsv": partial(csv_file, delimiters="\t"),
    ".txt": lines,
    ".parquet": parquet,
    "": json_lines,
}


class Faults:
    """What a fault in a source does: "stop" raises ValueError, "skip" leaves the row out with a warning.

    skipped: the number of faults that were skipped.
    """

    def __init__(self, on_error: str = "stop"):
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        self.on_error, self.skipped = on_error, 0

    def __call__(self, said: str) -> None:
        """Report a fault. said: the file, the place in it, what is wrong, and what is allowed."""
        if self.on_error == "stop":
            raise ValueError(said)
        self.skipped += 1
        log.warning("%s: skipped", said)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """In this context, a ValueError is a fault. place: put before its message."""
        try:
            yield
        except ValueError as error:
            self(f"{place}{error}")


def open_rows(source: str, what: str = "prompts") -> tuple[str, Callable[[], Rows]]:
    """Return (a source's name for messages, a function that reads its rows from the start).

    source: a file with a suffix of FORMATS, perhaps followed by .gz; "-", standard input, or a pipe, either JSON Lines or a
            prompt a line; a folder that the library `datasets` saved; or "hf:NAME" or "hf:NAME:SPLIT", a dataset of its hub.
            Standard input and pipes are first copied to a temporary file, as they can be read once only.
    what:   the kind of its rows, for messages.

    Raises FileNotFoundError for a missing file, ValueError for another format. The function raises ValueError for a file that
    cannot be read at all, ImportError for a format whose library is missing.
    """
    path = Path(source)
    if source.startswith(HUB):
        return _named(f"dataset {source!r}", partial(dataset, source))
    name = "standard input" if source == "-" else f"{what} file {source!r}"
    if source != "-" and not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if path.is_dir():
        if not any((path / name).is_file() for name in SAVED):
            raise ValueError(f"{name} is a folder that the package datasets did not save: give a file, as its metadata.jsonl")
        return _named(f"dataset {source!r}", partial(dataset, source))
    if source == "-" or not path.is_file():  # can be read once only: copied to where it can be read again
        kept = tempfile.NamedTemporaryFile(prefix="prompts-")  # noqa: SIM115 (gone with the last that refers to it)
        with nullcontext(sys.stdin.buffer) if source == "-" else path.open("rb") as stream:
            shutil.copyfileobj(stream, kept)
        kept.flush()
        return _named(name, lambda: _streamed(kept.name))
    if format_of(path) not in FORMATS:
        raise ValueError(f"{name} must end in {', '.join(filter(None, FORMATS))}, and perhaps .gz")
    return _named(name, partial(FORMATS[format_of(path)], path))


def _streamed(kept: str) -> Rows:
    """Yield the rows of a stream without a suffix: JSON Lines if its first line begins with a brace, else a prompt per line."""
    with Path(kept).open("rb") as stream:
        first = next((line for line in map(bytes.strip, stream) if line), b"")
    return (json_lines if first.removeprefix(BOM_UTF8).startswith(b"{") else lines)(Path(kept))


def _named(name: str, read: Callable[[], Rows]) -> tuple[str, Callable[[], Rows]]:
    """Return the name, and a function that reads the same rows and puts the name before every error."""

    def rows() -> Rows:
        try:
            yield from read()
        except NoText as error:
            raise NoText(f"{name}, {error}") from error
        except ValueError as error:
            raise ValueError(f"{name}, {error}") from error

    return name, rows


def format_of(path: Path) -> str:
    """Return the suffix that tells a file's format, in small letters; for a compressed file, the one before .gz."""
    return Path(path.name.casefold().removesuffix(".gz")).suffix
