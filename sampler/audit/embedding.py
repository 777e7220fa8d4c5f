"""Images inside a page, which then is one file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

SIDE = 256  # pixels: larger images are embedded at this size


def embedded(path: Path, side: int | None = SIDE) -> str:
    """The image as a data URI, shrunk to fit `side` pixels (None: as it is); empty where it cannot be read."""
    try:
        with Image.open(path) as image:
            data, kind = path.read_bytes(), Image.MIME[image.format]
            if side is not None and max(image.size) > side:
                small = image.convert("RGB")
                small.thumbnail((side, side))
                small.save(file := io.BytesIO(), format="WEBP", quality=85)
                data, kind = file.getvalue(), "image/webp"
    except (OSError, SyntaxError):
        return ""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
