"""Renders pages from templates and embeds their images, so that a page is a single file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from ..data.pictures import opened

SIDE = 256  # pixels: larger images are embedded at this size
SHOWN = ("image/png", "image/apng", "image/jpeg", "image/webp", "image/gif")  # by every browser; others become WebP


def embedded(path: Path, side: int | None = SIDE) -> str:
    """Return an image file as a data URI, shrunk to fit `side` pixels (None: as it is); empty if it cannot be read."""
    try:
        with Image.open(path) as image:
            data, kind = path.read_bytes(), Image.MIME.get(image.format or "")
            fits = side is None or max(image.size) <= side
        return _uri(data, kind) if fits and kind in SHOWN else inside(opened(path, str(path)), side)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""


def inside(image: Image.Image, side: int | None = SIDE) -> str:
    """Return an image as a data URI, in WebP, shrunk to fit `side` pixels (None: as it is)."""
    small = image.copy()
    small.thumbnail((side, side) if side else small.size)
    small.save(file := io.BytesIO(), format="WEBP", quality=85)
    return _uri(file.getvalue(), "image/webp")


def rendered(template: Path, **values: Any) -> str:
    """Return the page that a Jinja template makes of the values, which are escaped. The filter `ids` cuts a list short."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["ids"] = lambda ids: ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
