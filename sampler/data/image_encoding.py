"""Encodes what was made as the bytes of a file: a picture marked as made by a machine (see `xmp`), a video, or latents."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..runs.jsontext import json_bytes
from . import xmp

FRAMES_A_SECOND = 16  # of a video: the rate that Wan was trained for
Frames = Image.Image | Sequence[Image.Image]  # a picture, or the frames of a video
PICTURES: dict[str, dict[str, Any]] = {  # Pillow's options, with which a picture has the same bytes each time
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95, "method": 4},
}


@dataclass(frozen=True)
class Made:
    """What came of the job at a position: its line of the manifest, and the bytes of its image, None where it failed."""

    position: int
    line: dict[str, Any]
    data: bytes | None = None


@dataclass(frozen=True)
class Encoder:
    """Images as the bytes of files.

    format: the run's. In formats with many pictures per file, each picture is PNG.
    prompt_metadata: whether a picture's XMP records its prompt, seed and settings.
    """

    format: str = "png"
    prompt_metadata: bool = True

    def __call__(self, position: int, line: dict[str, Any], image: Frames | Tensor) -> Made:
        """Return the encoded image, and its manifest `line` with status, sha256 and bytes added."""
        data = latents(image, line) if isinstance(image, Tensor) else self.picture(image, line)
        return Made(position, line | {"status": "ok", "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}, data)

    def picture(self, image: Frames, line: dict[str, Any]) -> bytes:
        """Return the bytes of a picture's file, which is animated for the frames of a video."""
        first, *others = [image] if isinstance(image, Image.Image) else image
        mark = xmp.packet(line, self.prompt_metadata)
        options = _saving(self.format)
        if options["format"] == "PNG":
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", mark.decode())
        else:
            options["xmp"] = mark
        if others:
            options |= {"save_all": True, "append_images": others, "duration": 1000 / FRAMES_A_SECOND, "loop": 0}
        first.save(file := io.BytesIO(), **options)
        return file.getvalue()


def media_type(format: str) -> str:
    """Return the media type of the pictures of a run, such as image/png."""
    Image.init()
    return Image.MIME[_saving(format)["format"]]


def _saving(format: str) -> dict[str, Any]:
    """Return Pillow's options for the pictures of a run: for its own format, or for PNG if a file holds many."""
    return dict(PICTURES.get(format, PICTURES["png"]))


def latents(image: Tensor, line: dict[str, Any]) -> bytes:
    """Latents on the CPU as safetensors, with the line of the manifest as their metadata."""
    text = {"line": json_bytes(line).decode()}  # one entry, because several would be written in any order
    return safetensors.torch.save({"latents": image.contiguous()}, text)
