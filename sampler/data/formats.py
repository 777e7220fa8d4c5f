"""Input formats, of prompts and captions; `encoding` and `shards` have the output formats.

Each is a function that yields the rows of a file, one after another, with their places.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .names import COLUMN, KNOWN, TEXT, Ids, columns

HUB = "hf:"
NUMBERS = ("seed", "steps", "scale", "height", "width", "count")  # columns of a CSV file
PLAIN = ("Value", "ClassLabel", "List", "LargeList", "Sequence")  # kinds of columns of the library `datasets`
ENCODING, ERRORS = "utf-8-sig", "surrogateescape"  # a byte order mark is no text; other bytes are told by line


class Row(NamedTuple):
    """A row: its place, such as "line 3", and its values by the names of `names.columns`, or text that says what is wrong."""

    where: str
    said: Any


Rows = Iterator[Row]


class NoText(ValueError):
    """Raised for a table none of whose columns holds prompts."""


def fault_of(text: str) -> str | None:
    """What is wrong with text that was read with ENCODING: bytes that are no UTF-8. None where nothing is."""
    if "\0" in text or (not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)):
        return "not UTF-8 text: save it in that encoding"
    return None


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file open for reading. Raises ValueError where it is compressed and broken."""
    try:
        if path.suffix.casefold() == ".gz":
            with gzip.open(path, "rt", encoding=ENCODING, errors=ERRORS, newline=newline) as file:
                yield file
        else:
            with path.open(encoding=ENCODING, errors=ERRORS, newline=newline) as file:
                yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"which is no whole .gz file: {error}") from error


def lines(path: Path) -> Rows:
    """A prompt a line."""
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            text = line.strip().lstrip("\ufeff")
            if text:
                yield Row(f"line {number}", _line(text))


def _line(text: str) -> dict[str, Any] | str:
    if text.startswith("{") and isinstance(parsed(text), dict):
        return "is a JSON object, and a .txt file has a prompt a line: let its name end in .jsonl"
    return fault_of(text) or {"prompt": text}


def json_lines(path: Path) -> Rows:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row(f"line {number}", row_of(line))


def parsed(text: str) -> Any:
    """The value of JSON text. A ValueError is returned, not raised, for what is no JSON or has a key twice."""
    try:
        return _JSON.decode(text.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def row_of(text: str) -> dict[str, Any] | str:
    """The row that a JSON object is, or what is wrong with it."""
    if fault := fault_of(text):
        return fault
    found = parsed(text)
    return str(found) if isinstance(found, ValueError) else _named(found, text.strip())


def _named(found: Any, text: str) -> dict[str, Any] | str:
    """The row with the names of `names.columns`, or what is wrong with it."""
    if not isinstance(found, Mapping):
        return f'must be an object such as {{"prompt": "a cat"}}, got {text[:60]}'
    try:
        names = columns(tuple(found))
    except ValueError as error:
        return str(error)
    if "\\u" in text and any("\ud800" <= letter <= "\udfff" for letter in json.dumps(found, ensure_ascii=False)):
        return "holds half a surrogate pair, which is no character"
    return {names[name]: value for name, value in found.items() if name in names}


def json_file(path: Path) -> Rows:
    """A list of objects; captions by image path, as {"images/1.jpg": ["a caption"]}; COCO's; or JSON Lines of this name."""
    with _text(path) as file:
        text = file.read()
    if fault := fault_of(text):
        raise ValueError(fault)
    found = parsed(text)
    if isinstance(found, ValueError):
        if not isinstance(parsed(text.strip().partition("\n")[0]), dict):
            raise found
        yield from json_lines(path)
    elif isinstance(found, dict) and {"images", "annotations"} <= found.keys():
        yield from _coco(found)
    elif isinstance(found, dict) and isinstance(named := _named(found, text), dict) and named.keys() & set(TEXT):
        yield Row("entry 1", named)
    elif isinstance(found, dict):
        ids = Ids()
        for number, (image, caption) in enumerate(found.items(), 1):
            row = {"id": ids(str(Path(image).with_suffix(""))) if image else None, "image": image, "caption": caption}
            yield Row(f"entry {number}", _named(row, text))
    elif isinstance(found, list):
        for number, row in enumerate(found, 1):
            yield Row(f"entry {number}", _named(row, json.dumps(row)))
    else:
        raise ValueError(f"must be an object of captions by image path, or a list of objects, got a {type(found).__name__}")


def _coco(found: dict[str, Any]) -> Rows:
    """The captions of COCO's annotations. Raises ValueError where they are not laid out as those."""
    try:
        names = {image["id"]: image["file_name"] for image in found["images"]}
        notes = [{"image": names[note["image_id"]], "caption": note.get("caption")} for note in found["annotations"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"must be laid out as COCO's captions are: {type(error).__name__} {error}") from error
    for number, note in enumerate(notes, 1):
        yield Row(f"annotation {number}", _named(note, json.dumps(note)))


def csv_file(path: Path, delimiters: str = ",;\t") -> Rows:
    with _text(path, newline="") as file:
        delimiter = _delimiter(file.readline(), delimiters)
    with _text(path, newline="") as file:
        records = _records(file, delimiter)
        _, given = next(records, ("line 1", []))
        if isinstance(given, str):
            raise ValueError(f"line 1: {given}")
        try:
            names = columns(tuple(given))
        except ValueError as error:
            raise ValueError(f"line 1: {error}") from error
        if given and not set(TEXT) & set(names.values()):
            raise NoText(f"line 1: must name {COLUMN}, and each column once; got {', '.join(given)}")
        behind = _behind_text(given, names) if delimiter == "," else None
        for where, cells in records:
            yield Row(where, cells if isinstance(cells, str) else _cells(given, cells, names, behind))


def _records(file: TextIO, delimiter: str) -> Iterator[tuple[str, list[str] | str]]:
    """Where each record of a CSV file ends, and its cells; or what is wrong with it.

    A line that is wrong costs itself alone: the reader goes on behind it, also where an open quote has swallowed all others.
    """
    taken: deque[str] = deque()  # the lines of the record that is read
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


def _delimiter(header: str, delimiters: str) -> str:
    """The delimiter by which a header names prompts; the first one where none does."""
    for delimiter in delimiters:
        try:
            if set(TEXT) & set(columns(tuple(next(csv.reader([header], delimiter=delimiter), ()))).values()):
                return delimiter
        except (ValueError, csv.Error):
            continue
    return delimiters[0]


def _behind_text(given: Sequence[str], names: dict[str, str]) -> str | None:
    """The column behind that of the prompts, into which half a prompt falls that holds a comma and is not quoted."""
    place = next((i for i, name in enumerate(given) if names.get(name) in TEXT), len(given))
    return given[place + 1] if place + 1 < len(given) and given[place + 1][:1] != " " else None


def _cells(given: Sequence[str], cells: Sequence[str], names: dict[str, str], behind: str | None) -> dict[str, Any] | str:
    if len(cells) > len(given):
        return "more cells than columns; quote a cell that holds a comma"
    row: dict[str, str | None] = {**dict.fromkeys(given), **dict(zip(given, cells, strict=False))}
    if behind is not None and (row[behind] or "")[:1] == " ":
        return f"{behind} starts with a space, as if a prompt went on behind its comma; quote a cell that holds a comma"
    if fault := next((fault for cell in cells if cell and (fault := fault_of(cell))), None):
        return fault
    said: dict[str, Any] = {names[name]: cell or None for name, cell in row.items() if name in names}
    return said | {name: _number(said[name]) for name in NUMBERS if said.get(name)}


def _number(cell: str) -> int | float | str:
    """What a cell says, if that is a number."""
    if cell.isascii() and cell.isdigit():
        return int(cell)
    try:
        return float(cell)
    except ValueError:
        return cell


def parquet(path: Path) -> Rows:
    """The rows of a file, of which columns of bytes, as those of pictures, are left alone."""
    return parquet_rows(path, lambda name, type: "binary" not in str(type))


def parquet_rows(path: Path, wanted: Callable[[str, Any], bool], batch_size: int = 64) -> Rows:
    """The rows of a Parquet file. wanted: which columns, of their names and pyarrow's types.

    Raises ImportError without pyarrow, ValueError for columns that `names.columns` refuses and for a file that is broken.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("a .parquet file needs the package pyarrow: pip install pyarrow") from error
    number = 0
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's own are kinds of these
        raise ValueError(f"which is no Parquet file: {error}") from error
    with file:
        names = columns(tuple(file.schema_arrow.names))
        chosen = [field.name for field in file.schema_arrow if wanted(names.get(field.name, ""), field.type)]
        batches = file.iter_batches(batch_size=batch_size, columns=chosen)
        while (batch := _next(batches)) is not None:
            for row in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", {names[name]: value for name, value in row.items() if name in names})


def _next(batches: Iterator[Any]) -> Any:
    try:
        return next(batches, None)
    except (ValueError, OSError) as error:
        raise ValueError(f"which is no whole Parquet file: {error}") from error


def dataset(source: str) -> Rows:
    """The rows of a dataset, of which pictures, sounds and the like are left alone."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source!r} is a dataset, which needs the package datasets: pip install datasets") from error
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
