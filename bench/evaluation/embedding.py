"""Images inside a page, which then is one file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from basinescape.data.pictures import opened
from PIL import Image

SIDE = 256  # pixels: larger images are embedded at this size
SHOWN = ("image/png", "image/apng", "image/jpeg", "image/webp", "image/gif")  # by every browser; others are made one of them


def embedded(path: Path, side: int | None = SIDE) -> str:
    """The image as a data URI, shrunk to fit `side` pixels (None: as it is); empty where it cannot be read."""
    try:
        with Image.open(path) as image:
            data, kind = path.read_bytes(), Image.MIME.get(image.format)
            fits = side is None or max(image.size) <= side
        if not (fits and kind in SHOWN):
            small = opened(path, str(path))
            small.thumbnail((side, side) if side else small.size)
            small.save(file := io.BytesIO(), format="WEBP", quality=85)
            data, kind = file.getvalue(), "image/webp"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
