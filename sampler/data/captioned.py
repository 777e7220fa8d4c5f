"""Pictures with the prompts that they were made from, one after another, from wherever people keep them."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from PIL import Image

from .formats import ENCODING, ERRORS, Rows, parquet_rows, row_of
from .layout import BESIDE, Layout, decoded, text_of, there
from .names import COLUMN, IMAGE, TEXT, Ids, first
from .pictures import opened, suffixes
from .prompt_in_file import prompt_in
from .rows import Faults
from .rows import opened as opened_rows
from .shards import contents

SOURCES = "a folder, a file that names pictures and prompts, as manifest.jsonl, a .tar, a .parquet, or a picture"
MANIFEST = "manifest.jsonl"
BATCH = 16  # rows of a Parquet file in memory at a time: each holds a picture


@dataclass(frozen=True)
class Captioned:
    """A picture and the prompt that it was made from.

    id:     names it among the others, and can name a file.
    file:   its path; of a member or a row of a file, that file's with "/" and the member's name, or the row, behind it.
    where:  it stands, as messages say it: a file, perhaps with the row or the member of it.
    open:   reads the picture upright in RGB. Raises ValueError, naming where it stands, for one that cannot be read.
    prompt: None where it is not known; `reason` then says why.
    """

    id: str
    file: str
    where: str
    open: Callable[[], Image.Image]
    prompt: str | None
    reason: str = ""


def captioned(source: str | Path, on_error: str = "stop") -> Iterator[Captioned]:
    """The pictures of a source, each read when it is opened; nothing holds more of them than a few.

    source: a folder of pictures, whose prompts are in its manifest.jsonl, as `generate` writes it, or in any layout of
            `captions.read_captions` but folders' names; a file, as for `rows.opened`, of image (file_name, path, file) and
            prompt (caption, text); a .tar, as WebDataset has them, with .txt, .caption or .json beside each picture; a .parquet
            with a column of pictures' bytes, as `datasets` writes them; a picture; or a pattern of such names.
            A picture without a prompt there may have it in itself, as PNG files of common programs do.
    on_error: of a row, a member or a file that is wrong; see `Faults`.

    Raises FileNotFoundError where there is nothing, ValueError for another kind of file and what `Faults` says.
    """
    faults, ids, path = Faults(on_error), Ids(), Path(source)
    paths = [path] if path.exists() else [Path(name) for name in sorted(glob(str(source), recursive=True))]
    if not paths:
        raise FileNotFoundError(f"images {str(source)!r} do not exist; give {SOURCES}")
    readers = [_reader(one) for one in paths]  # raises before any is read
    return (one for path, read in zip(paths, readers, strict=True) for one in read(path, ids, faults))


Reader = Callable[[Path, Ids, Faults], Iterator[Captioned]]


def _reader(path: Path) -> Reader:
    if path.is_dir():
        return _folder
    name = path.name.casefold()
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return _tar
    if name.endswith(".parquet"):
        return _parquet
    if path.suffix.casefold() in suffixes():
        return lambda path, ids, faults: iter([_of_file(path, ids(path.stem), None)])
    return _table


def _of_file(path: Path, id: str, prompt: str | None, reason: str = "no text beside it") -> Captioned:
    """A picture that is a file; its prompt, where it is not given, is what the file says of itself."""
    where = f"image {str(path)!r}"
    found = (prompt, "") if prompt else prompt_in(path, reason)
    return Captioned(id, str(path), where, partial(opened, path, where), *found)


def _of_data(data: bytes, file: str, where: str, id: str, prompt: Any, reason: str) -> Captioned:
    """A picture that is held in memory, as long as whoever reads it keeps it."""
    found = (prompt, "") if isinstance(prompt, str) and prompt.strip() else prompt_in(data, reason)
    return Captioned(id, file, where, partial(opened, data, where), *found)


def _folder(folder: Path, ids: Ids, faults: Faults) -> Iterator[Captioned]:
    """The pictures that tables name, then the others with the text beside them or in them."""
    if (folder / MANIFEST).is_file():  # a run's, which may hold its pictures in shards
        yield from _run(folder, ids, faults)
        return
    layout = Layout(folder)
    seen: set[Path] = set()
    if layout.metadata or not any(map(layout.beside, layout.images)):
        for table in layout.tables:
            yield from _rows(table, partial(layout.find, home=table.parent), ids, faults, seen)
    for image in layout.images:
        if image in seen:
            continue
        id, prompt, reason = ids(_stem(image, folder)), None, "no text beside it"
        for text in layout.beside(image):
            try:
                prompt = prompt or text_of(text)
            except ValueError as error:
                reason = str(error)
        yield _of_file(image, id, prompt, reason)


def _stem(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def _run(folder: Path, ids: Ids, faults: Faults) -> Iterator[Captioned]:
    """The pictures of a folder of `generate`, in files of their own or in shards."""
    shards = sorted(path for path in (folder / "shards").glob("*") if path.suffix in (".tar", ".parquet"))
    for shard in shards:
        yield from _reader(shard)(shard, ids, faults)
    if not shards:
        yield from _table(folder / MANIFEST, ids, faults)


def _table(path: Path, ids: Ids, faults: Faults) -> Iterator[Captioned]:
    return _rows(path, partial(there, home=path.parent), ids, faults, set())


def _rows(path: Path, find: Callable[[str], Path], ids: Ids, faults: Faults, seen: set[Path]) -> Iterator[Captioned]:
    """The pictures that a table's rows name, which are added to `seen`. Those that a run failed to make are left out."""
    name, read = opened_rows(str(path), "images")
    for where, said in _while_whole(read(), "", faults):
        try:
            if isinstance(said, str):
                raise ValueError(said)
            if str(said.get("status")).startswith("failed"):
                continue
            image, prompt = first(said, IMAGE), first(said, TEXT)
            if not isinstance(image, str):
                raise ValueError(f"needs {', '.join(IMAGE)}, the name of a picture; it has {', '.join(said) or 'nothing'}")
            found = find(image)
        except ValueError as error:
            faults(f"{name}, {where}: {error}")
            continue
        seen.add(found)
        prompt = prompt[0] if isinstance(prompt, list) and prompt else prompt
        text = prompt if isinstance(prompt, str) and prompt.strip() else None
        yield _of_file(found, ids(str(said.get("id") or Path(image).with_suffix(""))), text, f"{where} needs {COLUMN}")


def _while_whole(rows: Rows, name: str, faults: Faults) -> Rows:
    """The rows of a file as far as it can be read; name: what the fault that ends them does not say."""
    try:
        yield from rows
    except ValueError as error:
        faults(f"{name}{error}")


def _tar(path: Path, ids: Ids, faults: Faults) -> Iterator[Captioned]:
    """The samples of a WebDataset: members that follow one another and have one name but for what is behind its first dot."""
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
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # which tarfile takes for the end
            raise tarfile.ReadError("it is cut off or broken behind its last member that can be read")


def _sample(path: Path, members: Mapping[str, tuple[str, bytes]], ids: Ids) -> Iterator[Captioned]:
    """The pictures of a sample, with the first of its texts; members: (kind, contents) by names."""
    prompt, reason, own = None, "no text beside it", None
    for name, (kind, data) in sorted(members.items(), key=lambda one: BESIDE.index(one[1][0]) if one[1][0] in BESIDE else -1):
        if kind == ".json":
            own = _id_in(data)
        if kind in BESIDE and prompt is None:
            try:
                prompt = decoded(data, kind, f"member {name!r} of {str(path)!r}")
            except ValueError as error:
                reason = str(error)
    for name, (kind, data) in members.items():
        if kind in suffixes():
            id = ids(own or f"{path.stem}/{Path(name).stem}")
            yield _of_data(data, f"{path}/{name}", f"member {name!r} of {str(path)!r}", id, prompt, reason)


def _id_in(data: bytes) -> str | None:
    """The id in a JSON object, as `generate` writes them into its shards."""
    row = row_of(data.decode(ENCODING, ERRORS))
    return str(row["id"]) if isinstance(row, dict) and row.get("id") is not None else None


def _parquet(path: Path, ids: Ids, faults: Faults) -> Iterator[Captioned]:
    """The pictures of a file whose rows hold their bytes, or else their names."""

    def wanted(name: str, kind: Any) -> bool:
        return name in (*TEXT, *IMAGE, "id") or "binary" in str(kind)

    for where, row in _while_whole(parquet_rows(path, wanted, BATCH), f"images file {str(path)!r}, ", faults):
        place = f"{where} of {str(path)!r}"
        try:
            data, prompt = _bytes_in(row, path.parent), first(row, TEXT)
        except (ValueError, OSError) as error:
            faults(f"{place}: {error}")
            continue
        yield _of_data(
            data, f"{path}/{where}", place, ids(str(row.get("id") or f"{path.stem}/{where}")), prompt, f"it needs {COLUMN}"
        )


def _bytes_in(row: Mapping[str, Any], home: Path) -> bytes:
    """The bytes of the picture that a row holds, itself or in {bytes, path}, or names. Raises ValueError without one."""
    for value in row.values():
        held = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(held, bytes):
            return held
    named = first(row, IMAGE)
    named = named.get("path") if isinstance(named, Mapping) else named
    if not isinstance(named, str):
        raise ValueError(f"needs a column of pictures' bytes, or {', '.join(IMAGE)}; it has {', '.join(row) or 'nothing'}")
    return there(named, home).read_bytes()
