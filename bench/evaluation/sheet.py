"""A contact sheet of a run of generate: its images beside their scores, the most suspect first, as one page without network."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from basinescape.data.writers import FORMATS, writer
from basinescape.runs.atomic import whole
from basinescape.runs.folder import read_settings
from basinescape.runs.manifest import MANIFEST, sound
from PIL import Image

SIDE = 160  # pixels of an image on the page
MOST = 500  # images on the page; the manifest has them all
STYLE = """body { font: 14px system-ui, sans-serif; margin: 2em; color-scheme: light dark; }
main { display: flex; flex-wrap: wrap; gap: 12px; } figure { width: 170px; margin: 0; } img { max-width: 160px; }
figcaption { font-size: 12px; overflow-wrap: anywhere; } .suspect img, .failed { outline: 3px solid #c00; }"""


def is_run(folder: Path) -> bool:
    """Whether a folder is one of generate's."""
    return (folder / MANIFEST).is_file() and (folder / "run.json").is_file()


def sheet(folder: str | Path, out: str | Path) -> int:
    """Write the page `out` about a folder that generate wrote; returns the number of images on it.

    Failed and suspect ones come first, then the rest by falling score; latents are shown by what is written of them alone.

    Raises ValueError where the folder holds no run of generate, or no image yet.
    """
    folder, out = Path(folder), Path(out)
    settings = read_settings(folder) if is_run(folder) else {}
    if settings.get("format") not in FORMATS:
        raise ValueError(f"{str(folder)!r} holds no run of generate")
    lines = sorted(sound(folder), key=_rank)
    if not lines:
        raise ValueError(f"{str(folder)!r} holds no image yet: its manifest.jsonl is empty")
    kinds = {"suspect": lambda line: line.get("suspect"), "failed": lambda line: line["status"] != "ok"}
    counts = ", ".join(f"{sum(map(bool, map(true, lines)))} {kind}" for kind, true in kinds.items())
    title = f"{folder.resolve().name}: {len(lines)} images, {counts}"
    figures = "\n".join(_figure(line, data) for line, data in _images(folder, settings["format"], lines[:MOST]))
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    page += f"<h1>{html.escape(title)}</h1>\n<main>\n{figures}\n</main>\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as part:
        part.write_text(page, encoding="utf-8")
    return min(MOST, len(lines))


def _rank(line: dict[str, Any]) -> tuple:
    return line["status"] == "ok", not line.get("suspect"), -(line.get("score") or 0.0), line["id"]


def _images(folder: Path, format: str, lines: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bytes | None]]:
    """Each line with its image's bytes, None where there are none to show. A shard is read once."""
    shown, writes = {}, writer(folder, format)
    ok = [line for line in lines if line["status"] == "ok" and format != "latents" and writes.owns(line["file"], line["id"])]
    for file, some in itertools.groupby(sorted(ok, key=lambda line: line["file"]), key=lambda line: line["file"]):
        wanted = {line["id"] for line in some}
        if (folder / file).is_file():
            shown.update((id, _small(data)) for id, data in writes.contents(folder / file) if id in wanted)
    return ((line, shown.get(line["id"])) for line in lines)


def _small(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    small.save(file := io.BytesIO(), format="WEBP", quality=85)
    return file.getvalue()


def _figure(line: dict[str, Any], data: bytes | None) -> str:
    facts = [line["prompt"], f"{line['id']}, seed {line['seed']}"]
    if line.get("score") is not None:
        facts.append(f"score {line['score']:.2f}, {line['attempts']} attempt{'s' if line['attempts'] > 1 else ''}")
    kind = "failed" if line["status"] != "ok" else "suspect" if line.get("suspect") else ""
    facts += [line["status"] if kind == "failed" else kind] if kind else []
    image = f'<img src="data:image/webp;base64,{base64.b64encode(data).decode()}" alt="">' if data else ""
    return f'<figure class="{kind}">{image}<figcaption>{"<br>".join(map(html.escape, facts))}</figcaption></figure>'
