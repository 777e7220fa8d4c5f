"""Input formats of prompts and captions. `image_encoding` and `shards` have the output formats.

Each format is a function that yields the rows of a file, with their places. `rows.FORMATS` maps suffixes to these functions.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..runs.environment import library
from .names import COLUMN, KNOWN, TEXT, Ids, columns

HUB = "hf:"
DELIMITERS = ",;\t"
NUMBERS = ("seed", "steps", "scale", "height", "width", "count")  # columns of a CSV file
PLAIN = ("Value", "ClassLabel", "List", "LargeList", "Sequence")  # types of columns in `datasets` that are read
ENCODING, ERRORS = "utf-8-sig", "surrogateescape"  # drop a byte order mark; report other bytes by line
BOM = "\ufeff"  # it is inside a file, too, if files were joined


class Row(NamedTuple):
    """A row: its place, such as "line 3", and its values by the names of `names.columns`, or text that says what is wrong."""

    where: str
    said: Any


Rows = Iterator[Row]


class NoText(ValueError):
    """Raised for a table without a column of prompts."""


def in_utf8(text: str) -> str:
    """Return a text that was read with ENCODING and ERRORS. Raises ValueError if it holds NUL or bytes that are no UTF-8."""
    if "\0" in text or (not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)):
        raise ValueError("not UTF-8 text: save it in that encoding")
    return text


def _row(where: str, make: Callable[..., dict[str, Any]], *given: Any) -> Row:
    """Return the row at the place `where`: the result of `make(*given)`, or the message of its ValueError."""
    try:
        return Row(where, make(*given))
    except ValueError as error:
        return Row(where, str(error))


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file for reading, decompressed if its name ends in .gz. Raises ValueError if a compressed file is broken."""
    open_text: Callable[..., Any] = gzip.open if path.suffix.casefold() == ".gz" else open
    try:
        with open_text(path, "rt", encoding=ENCODING, errors=ERRORS, newline=newline) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"which is no whole .gz file: {error}") from error


def lines(path: Path) -> Rows:
    """Yield one prompt per line that is not blank."""
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if text := line.strip().lstrip(BOM):
                yield _row(f"line {number}", _prompt_of, text, number == 1)


def _prompt_of(text: str, first: bool) -> dict[str, str]:
    """Return the row of a line of text. Raises ValueError if the line is JSON or names the columns of a CSV file."""
    if text.startswith("{") and isinstance(_json_or_none(text), dict):
        raise ValueError("is a JSON object, and a .txt file has a prompt a line: let its name end in .jsonl")
    headers = (_header(text, delimiter) for delimiter in DELIMITERS) if first else ()
    if any(names and set(names) <= set(KNOWN) for names in headers):
        raise ValueError(f"names columns ({text}), and a .txt file has a prompt a line: let its name end in .csv or .tsv")
    return {"prompt": in_utf8(text)}


def json_lines(path: Path) -> Rows:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _row(f"line {number}", row_of, line)


def _json(text: str) -> Any:
    """Return the value of JSON text. Raises ValueError if the text is not JSON, or an object in it has a key twice."""
    try:
        return json.loads(text.lstrip(BOM), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error


def _json_or_none(text: str) -> Any:
    try:
        return _json(text)
    except ValueError:
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := next((name for name, count in Counter(name for name, _ in pairs).items() if count > 1), None):
        raise ValueError(f"the key {twice!r} comes twice")
    return dict(pairs)


def row_of(text: str) -> dict[str, Any]:
    """Parse a JSON object as a row. Raises ValueError for other text."""
    return _named(_json(in_utf8(text)))


def _named(found: Any) -> dict[str, Any]:
    """Return an object as a row, with the names of `names.columns`. Raises ValueError for other values and for invalid text."""
    if not isinstance(found, Mapping):
        raise ValueError(f'must be an object such as {{"prompt": "a cat"}}, got {json.dumps(found, ensure_ascii=False)[:60]}')
    names = columns(tuple(found))
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair, which is no character") from error
    return {names[name]: value for name, value in found.items() if name in names}


def json_file(path: Path) -> Rows:
    """Yield the rows of a list of objects; captions by image path, {"1.jpg": ["a cat"]}; COCO's captions; or JSON Lines."""
    with _text(path) as file:
        text = in_utf8(file.read())
    try:
        found = _json(text)
    except ValueError:
        if not isinstance(_json_or_none(text.strip().partition("\n")[0]), dict):
            raise
        yield from json_lines(path)
        return
    if isinstance(found, list):
        yield from (_row(f"entry {number}", _named, row) for number, row in enumerate(found, 1))
    elif not isinstance(found, dict):
        raise ValueError(f"must be an object of captions by image path, or a list of objects, got a {type(found).__name__}")
    elif {"images", "annotations"} <= found.keys():
        yield from _coco(found)
    elif isinstance(one := _row("entry 1", _named, found).said, dict) and one.keys() & set(TEXT):
        yield Row("entry 1", one)
    else:
        ids = Ids()
        for number, (image, caption) in enumerate(found.items(), 1):
            id = ids(str(Path(image).with_suffix(""))) if image else None
            yield _row(f"entry {number}", _named, {"id": id, "image": image, "caption": caption})


def _coco(found: dict[str, Any]) -> Rows:
    """The captions of COCO's annotations. Raises ValueError where they are not laid out as those."""
    try:
        names = {image["id"]: image["file_name"] for image in found["images"]}
        notes = [{"image": names[note["image_id"]], "caption": note.get("caption")} for note in found["annotations"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"must be laid out as COCO's captions are: {type(error).__name__} {error}") from error
    yield from (_row(f"annotation {number}", _named, note) for number, note in enumerate(notes, 1))


def csv_file(path: Path, delimiters: str = DELIMITERS) -> Rows:
    with _text(path, newline="") as file:
        first = file.readline()
        delimiter = next((one for one in delimiters if _header(first, one)), delimiters[0])
        file.seek(0)
        records = _records(file, delimiter)
        _, given = next(records, ("line 1", []))
        try:
            if isinstance(given, str):
                raise ValueError(given)
            names = columns(tuple(map(in_utf8, given)))
        except ValueError as error:
            raise ValueError(f"line 1: {error}") from error
        if given and not set(TEXT) & set(names.values()):
            raise NoText(f"line 1: must name {COLUMN}, and each column once; got {', '.join(given)}")
        behind = _behind_text(given, names) if delimiter == "," else None
        for where, cells in records:
            yield Row(where, cells) if isinstance(cells, str) else _row(where, _of_cells, given, cells, names, behind)


def _header(line: str, delimiter: str) -> list[str]:
    """Return the columns that a line of CSV names, as `names.columns` spells them; empty if none of them holds prompts."""
    try:
        names = list(columns(tuple(next(csv.reader([line], delimiter=delimiter), ()))).values())
    except (ValueError, csv.Error):
        return []
    return names if set(TEXT) & set(names) else []


def _records(file: TextIO, delimiter: str) -> Iterator[tuple[str, list[str] | str]]:
    """Yield the line on which each record of a CSV file ends, and the record's cells, or else what is wrong with it.

    A wrong line costs only itself: reading goes on at the next line, even if an open quote has swallowed the rest of the file.
    """
    taken: deque[str] = deque()  # the lines of the current record
    ahead: deque[str] = deque()  # lines to be read again

    def lines() -> Iterator[str]:
        while line := ahead.popleft() if ahead else file.readline():
            taken.append(line)
            yield line

    before = 0
    while True:
        taken.clear()
        reader = csv.reader(lines(), strict=True, delimiter=delimiter)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            before += 1
            taken.popleft()
            ahead.extendleft(reversed(taken))
            yield f"line {before}", f"not CSV: {error}"
            continue
        if cells is None:
            return
        before += reader.line_num
        if cells:
            yield f"line {before}", cells


def _behind_text(given: Sequence[str], names: dict[str, str]) -> str | None:
    """Return the column after the prompts. If a prompt with a comma is not quoted, its second half lands in that column."""
    place = next((i for i, name in enumerate(given) if names.get(name) in TEXT), len(given))
    return given[place + 1] if place + 1 < len(given) and given[place + 1][:1] != " " else None


def _of_cells(given: Sequence[str], cells: Sequence[str], names: dict[str, str], behind: str | None) -> dict[str, Any]:
    """The row of a record. Raises ValueError for one that is wrong."""
    if len(cells) > len(given):
        raise ValueError("more cells than columns; quote a cell that holds a comma")
    row: dict[str, str | None] = {**dict.fromkeys(given), **dict(zip(given, cells, strict=False))}
    if behind is not None and (half := row[behind]) and (half[0] == " " or not behind.strip()):
        what = f"{behind} starts with a space" if behind.strip() else "text stands in a column without a name"
        raise ValueError(f"{what}, as if a prompt went on behind its comma; quote a cell that holds a comma")
    said: dict[str, Any] = {names[name]: in_utf8(cell) if cell else None for name, cell in row.items() if name in names}
    return said | {name: _number(said[name]) for name in NUMBERS if said.get(name)}


def _number(cell: str) -> int | float | str:
    """Return the number in a cell, or the cell's text if it holds none."""
    if cell.isascii() and cell.isdigit():
        return int(cell)
    try:
        return float(cell)
    except ValueError:
        return cell


def parquet(path: Path) -> Rows:
    """Yield the rows of a Parquet file, without its columns of bytes, such as pictures."""
    return parquet_rows(path, lambda name, type: "binary" not in str(type))


def parquet_rows(path: Path, wanted: Callable[[str, Any], bool], batch_size: int = 64) -> Rows:
    """Yield the rows of a Parquet file. wanted: whether to read a column, given its name and its type in pyarrow.

    Raises ImportError without pyarrow, ValueError for columns that `names.columns` refuses and for a broken file.
    """
    pyarrow, parquet = (library(name, "a .parquet file needs", "pyarrow") for name in ("pyarrow", "pyarrow.parquet"))
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = columns(tuple(file.schema_arrow.names))
            chosen = [field.name for field in file.schema_arrow if wanted(names.get(field.name, ""), field.type)]
            for batch in file.iter_batches(batch_size=batch_size, columns=chosen):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", {names[name]: value for name, value in row.items() if name in names})
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"which is no Parquet file, or no whole one: {error}") from error


def dataset(source: str) -> Rows:
    """Yield the rows of a dataset, without columns of pictures, sounds and the like."""
    datasets = library("datasets", f"{source!r} is a dataset, which needs")
    name, _, split = source.removeprefix(HUB).partition(":")
    if source.startswith(HUB):
        data = datasets.load_dataset(name, split=split or "train", streaming=True)
    else:
        data = datasets.load_from_disk(source)
        if isinstance(data, dict):
            raise ValueError(f"which holds the splits {', '.join(data)}: give the folder of one")
    given = tuple(data.column_names or [])
    names, kinds = columns(given), data.features or {}
    if not set(TEXT) & set(names.values()):
        raise NoText(f"must have {COLUMN}; got {', '.join(given)}")
    plain = [name for name in names if type(kinds.get(name)).__name__ in PLAIN or (not kinds and names[name] in KNOWN)]
    for number, row in enumerate(data.select_columns(plain), 1):
        yield Row(f"row {number}", {names[name]: value for name, value in row.items()})
