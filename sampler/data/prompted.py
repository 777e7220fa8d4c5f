"""Reads pictures together with the prompts that they were made from, one after another, from every layout of a set."""

from __future__ import annotations

import logging
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from PIL import Image

from .input_formats import ENCODING, ERRORS, Rows, parquet_rows, row_of
from .layout import BESIDE, Layout, caption_in, file_in
from .names import COLUMN, IMAGE, TEXT, Ids, first
from .pictures import files_in, opened, suffixes
from .prompt_in_file import prompt_in
from .rows import Faults, open_rows
from .shards import contents

log = logging.getLogger(__name__)
SOURCES = "a folder, a file that names pictures and prompts, as manifest.jsonl, a .tar, a .parquet, or a picture"
MANIFEST = "manifest.jsonl"
BATCH = 16  # rows of a Parquet file in memory at a time: each holds a picture


@dataclass(frozen=True)
class Prompted:
    """A picture and the prompt that it was made from.

    id:     differs from that of every other picture, and can name a file.
    file:   its path. For a member or a row of a file: that file's path, "/", and the member's name or the row's number.
    where:  its place, as messages name it.
    open:   reads the picture, upright and in RGB. Raises ValueError, naming its place, where it cannot be read.
    prompt: None where it is not known; `reason` then says why.
    """

    id: str
    file: str
    where: str
    open: Callable[[], Image.Image]
    prompt: str | None
    reason: str = ""


def prompted(source: str | Path, on_error: str = "stop") -> Iterator[Prompted]:
    """Return the pictures of a source. Each is read when it is opened, and few are in memory at a time.

    source: one of these, or a pattern of their names:
            a folder of pictures with their prompts in manifest.jsonl, as `generate` writes it, or in a layout of
            `captions.read_captions`, other than in the names of folders;
            a table, as for `rows.open_rows`, with the columns image (file_name, path, file) and prompt (caption, text);
            a .tar of a WebDataset with .txt, .caption or .json beside each picture;
            a .parquet with a column of pictures' bytes, as `datasets` writes it;
            a picture.
            If none of these has a picture's prompt, it is looked for in the picture's own file; see `prompt_in_file`.
    on_error: what happens at a row, a member or a file that is wrong; see `Faults`.

    Raises FileNotFoundError if there is no such source, ValueError for another kind of file and as `Faults` does.
    """
    faults, ids, paths = Faults(on_error), Ids(), _paths(source)
    readers = [_reader(one) for one in paths]  # raises before any is read
    return (one for path, read in zip(paths, readers, strict=True) for one in read(path, ids, faults))


def about(source: str | Path) -> int | None:
    """About how many pictures a source has, for a progress bar. None where only reading it would tell: .tar, .parquet, .csv."""
    counts = [_about(path) for path in _paths(source)]
    return None if None in counts else sum(filter(None, counts))


def _about(path: Path) -> int | None:
    if path.is_dir() and not (path / MANIFEST).is_file():
        return sum(file.suffix.casefold() in suffixes() for file in files_in(path))
    if path.suffix.casefold() in suffixes():
        return 1
    table = path / MANIFEST if path.is_dir() else path
    if table.suffix.casefold() not in (".jsonl", ".ndjson"):
        return None
    with table.open("rb") as lines:
        return sum(not line.isspace() for line in lines)


def _paths(source: str | Path) -> list[Path]:
    path = Path(source)
    paths = [path] if path.exists() else [Path(name) for name in sorted(glob(str(source), recursive=True))]
    if not paths:
        raise FileNotFoundError(f"images {str(source)!r} do not exist; give {SOURCES}")
    return paths


def _reader(path: Path) -> Callable[[Path, Ids, Faults], Iterator[Prompted]]:
    if path.is_dir():
        return _folder
    name = path.name.casefold()
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return _tar
    if name.endswith(".parquet"):
        return _parquet
    if path.suffix.casefold() in suffixes():
        return lambda path, ids, faults: iter([_of_file(path, ids(path.stem))])
    return _table


def _prompted(source: Path | bytes, file: str, where: str, id: str, prompt: Any, reason: str) -> Prompted:
    """Return a picture in a file, or in bytes, which stay in memory as long as the caller keeps the picture.

    prompt: if it is no text, the prompt is looked for in the picture's own file. reason: why it is no text.
    """
    found = (prompt, "") if isinstance(prompt, str) and prompt.strip() else prompt_in(source, reason)
    return Prompted(id, file, where, partial(opened, source, where), *found)


def _of_file(path: Path, id: str, prompt: Any = None, reason: str = "no text beside it") -> Prompted:
    return _prompted(path, str(path), f"image {str(path)!r}", id, prompt, reason)


def _folder(folder: Path, ids: Ids, faults: Faults) -> Iterator[Prompted]:
    """Yield first the pictures that tables name, then the others, whose prompts are in texts beside them or in their files."""
    if (folder / MANIFEST).is_file():  # the folder of a run, whose pictures may be in shards
        shards = sorted(path for path in (folder / "shards").glob("*") if path.suffix in (".tar", ".parquet"))
        for file in shards or [folder / MANIFEST]:
            yield from _reader(file)(file, ids, faults)
        return
    layout = Layout(folder)
    seen: set[Path] = set()
    for table in layout.tables:
        yield from _rows(table, partial(layout.find, home=table.parent), ids, faults, seen)
    for image in layout.images:
        if image not in seen:
            texts, reason = layout.texts(image)
            yield _of_file(image, ids(layout.name(image)), texts[0] if texts else None, reason)


def _table(path: Path, ids: Ids, faults: Faults) -> Iterator[Prompted]:
    return _rows(path, partial(file_in, home=path.parent), ids, faults, set())


def _rows(path: Path, find: Callable[[str], Path], ids: Ids, faults: Faults, seen: set[Path]) -> Iterator[Prompted]:
    """Yield the pictures that a table's rows name, and add their paths to `seen`. Rows about failed pictures are left out."""
    name, read = open_rows(str(path), "images")
    for where, said in _while_whole(read(), "", faults):
        with faults.at(f"{name}, {where}: "):
            if isinstance(said, str):
                raise ValueError(said)
            if str(said.get("status")).startswith("failed"):
                continue
            image, prompt = first(said, IMAGE), first(said, TEXT)
            if not isinstance(image, str):
                raise ValueError(f"needs {', '.join(IMAGE)}, the name of a picture; it has {', '.join(said) or 'nothing'}")
            seen.add(found := find(image))
            prompt = prompt[0] if isinstance(prompt, list) and prompt else prompt
            yield _of_file(found, ids(str(said.get("id") or Path(image).with_suffix(""))), prompt, f"{where} needs {COLUMN}")


def _while_whole(rows: Rows, name: str, faults: Faults) -> Rows:
    """Yield the rows of a file, as far as it can be read. name: put before the message of the fault that ends them."""
    with faults.at(name):
        yield from rows


def _tar(path: Path, ids: Ids, faults: Faults) -> Iterator[Prompted]:
    """Yield the pictures of a WebDataset. Its samples are consecutive members with the same name up to the first dot."""
    held: dict[str, tuple[str, bytes]] = {}
    last = None
    try:
        for name, data in _members(path):
            home, _, file = name.rpartition("/")
            stem, _, kind = file.partition(".")
            if (home, stem) != last:
                yield from _sample(path, held, ids)
                last, held = (home, stem), {}
            held[name] = (f".{kind.casefold()}", data)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        faults(f"images file {str(path)!r} is no whole .tar file: {error}")
    yield from _sample(path, held, ids)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files in a .tar, with their contents."""
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                yield member.name, contents(tar, member)
        file = tar.fileobj
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes such bytes for the end
            raise tarfile.ReadError("it is cut off or broken behind its last member that can be read")


def _sample(path: Path, members: Mapping[str, tuple[str, bytes]], ids: Ids) -> Iterator[Prompted]:
    """Yield the pictures of a sample, each with the sample's first text. members: (suffix, bytes), by name."""
    prompt, reason, own = None, "no text beside it", None
    for name, (kind, data) in sorted(members.items(), key=lambda one: BESIDE.index(one[1][0]) if one[1][0] in BESIDE else -1):
        if kind == ".json":
            own = _id_in(data)
        if kind in BESIDE and prompt is None:
            try:
                prompt = caption_in(data, kind, f"member {name!r} of {str(path)!r}")
            except ValueError as error:
                reason = str(error)
    for name, (kind, data) in members.items():
        if kind in suffixes():
            id = ids(own or f"{path.stem}/{Path(name).stem}")
            yield _prompted(data, f"{path}/{name}", f"member {name!r} of {str(path)!r}", id, prompt, reason)
        elif Path(kind).suffix in suffixes():  # a mask beside its picture, or a name with a dot in it
            log.warning("member %r of %r is passed over: in a WebDataset, a name ends at its first dot", name, str(path))


def _id_in(data: bytes) -> str | None:
    """The id in a JSON object, as `generate` writes them into its shards."""
    with suppress(ValueError):
        id = row_of(data.decode(ENCODING, ERRORS)).get("id")
        return None if id is None else str(id)
    return None


def _parquet(path: Path, ids: Ids, faults: Faults) -> Iterator[Prompted]:
    """Yield the pictures of a Parquet file, whose rows hold the pictures' bytes or file names."""

    def wanted(name: str, kind: Any) -> bool:
        return name in (*TEXT, *IMAGE, "id") or "binary" in str(kind)

    for where, row in _while_whole(parquet_rows(path, wanted, BATCH), f"images file {str(path)!r}, ", faults):
        place = f"{where} of {str(path)!r}"
        with faults.at(f"{place}: "):
            data, id = _bytes_in(row, path.parent), str(row.get("id") or f"{path.stem}/{where}")
            yield _prompted(data, f"{path}/{where}", place, ids(id), first(row, TEXT), f"it needs {COLUMN}")


def _bytes_in(row: Mapping[str, Any], home: Path) -> bytes:
    """Return the bytes of a row's picture, from the row itself, from its {bytes, path}, or from the file that it names.

    Raises ValueError if there is none.
    """
    for value in row.values():
        held = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(held, bytes):
            return held
    named = first(row, IMAGE)
    named = named.get("path") if isinstance(named, Mapping) else named
    if not isinstance(named, str):
        raise ValueError(f"needs a column of pictures' bytes, or {', '.join(IMAGE)}; it has {', '.join(row) or 'nothing'}")
    try:
        return file_in(named, home).read_bytes()
    except OSError as error:
        raise ValueError(f"its image {named[:80]!r} cannot be read: {error}") from error
