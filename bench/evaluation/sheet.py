"""A contact sheet of a run of generate: one page with its images and their scores, copies and suspect images first."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from basinescape.auditing.html_images import inside, rendered
from basinescape.data.writers import FORMATS, writer_of
from basinescape.runs.atomic import atomic_write
from basinescape.runs.manifest import MANIFEST, sound
from basinescape.runs.run_folder import read_settings
from PIL import Image

SIDE = 160  # pixels of an image on the page
MOST = 500  # images on the page; the manifest has them all
KINDS = {"copy": "copies", "suspect": "suspect", "failed": "failed"}  # in the order of the page; other images come last
Line = dict[str, Any]


def is_run(folder: Path) -> bool:
    """Whether `generate` wrote a folder."""
    return (folder / MANIFEST).is_file() and (folder / "run.json").is_file()


def sheet(folder: str | Path, out: str | Path) -> int:
    """Write the page `out` about a folder that generate wrote. Returns the number of images on the page.

    Copies come first, then suspect images, failed ones and the rest, each by falling score. Latents have captions only.

    Raises ValueError if the folder holds no run of generate, or no image yet.
    """
    folder, out = Path(folder), Path(out)
    settings = read_settings(folder) if is_run(folder) else {}
    if settings.get("format") not in FORMATS:
        raise ValueError(f"{str(folder)!r} holds no run of generate")
    lines = sorted(sound(folder), key=_rank)
    if not lines:
        raise ValueError(f"{str(folder)!r} holds no image yet: its manifest.jsonl is empty")
    counts = Counter(map(_kind, lines))
    compared = any("copy" in line for line in lines)
    said = (f"{counts[kind]} {word}" for kind, word in KINDS.items() if compared or kind != "copy")
    shown = _images(folder, settings["format"], lines[:MOST])
    entries = [_entry(line, shown.get(line["id"], "")) for line in lines[:MOST]]
    text = rendered(
        Path(__file__).with_name("sheet.html.jinja"),
        title=f"{folder.resolve().name}: {len(lines)} images, {', '.join(said)}",
        count=len(lines),
        entries=entries,
        compared=compared,
        scored=any(entry["score"] is not None for entry in entries),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as part:
        part.write_text(text, encoding="utf-8")
    return len(entries)


def _kind(line: Line) -> str:
    if line["status"] != "ok":
        return "failed"
    return "copy" if line.get("copy") else "suspect" if line.get("suspect") else ""


def _rank(line: Line) -> tuple[int, float, str]:
    return [*KINDS, ""].index(_kind(line)), -(line.get("score") or 0.0), line["id"]


def _entry(line: Line, uri: str) -> Line:
    """The values that the template shows of a line of the manifest."""
    optional = {"score": None, "attempts": 1, "nearest": "", "similarity": 0.0, "measure": ""}
    return {**optional, **line, "kind": _kind(line), "uri": uri}


def _images(folder: Path, format: str, lines: Sequence[Line]) -> dict[str, str]:
    """{id: data URI} of the images of `lines` that can be read. Each shard is read once."""
    writes, found = writer_of(folder, {"format": format}), {}
    wanted: dict[Path, set[str]] = {}
    for line in lines:
        if line["status"] == "ok" and format != "latents" and writes.owns(line["file"], line["id"]):
            wanted.setdefault(folder / line["file"], set()).add(line["id"])
    for file, ids in wanted.items():
        for id, data in writes.contents(file) if file.is_file() else ():
            if id in ids:
                with Image.open(io.BytesIO(data)) as image:
                    found[id] = inside(image.convert("RGB"), SIDE)
    return found
