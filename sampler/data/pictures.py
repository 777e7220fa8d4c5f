"""Finds the pictures of a folder, and reads each as trainers do: in RGB of 8 bits."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

log = logging.getLogger(__name__)
Source = Path | bytes | Image.Image  # a file, its contents, or a picture that Pillow has opened
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # Pillow knows their names, but cannot read them alone
SNIFFED = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # formats that are known by a file's first bytes
TEXTS = (".txt", ".caption", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")  # expected beside pictures
MOST = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535}  # the white of a mode of more than 8 bits
ALPHA = ("RGBA", "LA", "PA", "RGBa")


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of pictures that the installed Pillow reads, such as ".png"."""
    return frozenset(end for end, format in Image.registered_extensions().items() if format in {*Image.OPEN} - NO_PICTURES)


def files_in(folder: Path) -> list[Path]:
    """The files of a folder and of the folders below it, in the order of their paths. Links are followed, hidden files not.

    A warning names what is neither file nor folder, such as a pipe. Raises FileNotFoundError for a missing folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"images folder {str(folder)!r} does not exist")
    found, seen = [], set()
    for home, folders, names in os.walk(folder, onerror=_unlisted, followlinks=True):
        seen.add(os.path.realpath(home))
        folders[:] = [name for name in folders if name[0] != "." and os.path.realpath(os.path.join(home, name)) not in seen]
        for path in (Path(home, name) for name in names if name[0] != "."):
            if path.is_file():
                found.append(path)
            else:
                log.warning("%s is no regular file: passed over", path)
    return sorted(found)


def _unlisted(error: OSError) -> None:
    log.warning("%s cannot be listed: passed over", error.filename)


def pictures_among(files: Sequence[Path], folder: Path) -> list[Path]:
    """The pictures among a folder's files, by suffix or, where that says nothing, by their first bytes.

    A warning counts the other files, except text files, and names the first.
    """
    found = [path for path in files if path.suffix.casefold() in suffixes() or _is_picture(path)]
    chosen = set(found)
    others = [path for path in files if path not in chosen and path.suffix.casefold() not in TEXTS]
    if others:
        kinds = ", ".join(f"{count} {kind or 'without a suffix'}" for kind, count in Counter(p.suffix for p in others).items())
        log.warning("%s: passed over %d files that are no pictures (%s), first %r", folder, len(others), kinds, others[0].name)
    return found


def _is_picture(path: Path) -> bool:
    if path.suffix.casefold() in TEXTS:
        return False
    try:
        with Image.open(path, formats=SNIFFED):
            return True
    except Exception:  # a library may raise anything for a file that is no picture
        return False


def images_in(folder: str | Path) -> list[Path]:
    """The pictures of a folder and of the folders below it; see `files_in` and `pictures_among`, which warn."""
    return pictures_among(files_in(Path(folder)), Path(folder))


def opened(source: Source, name: str) -> Image.Image:
    """Return a picture, upright and in RGB; of an animation, the first frame. name: what messages call it.

    Raises ValueError if it cannot be read: no picture, a broken one, or one so large that it may be meant as an attack.
    """
    return next(readings(source, name))


def readings(source: Source, name: str) -> Iterator[Image.Image]:
    """Return the different RGB pictures that trainers make of one file.

    Most files have one. A file with an EXIF orientation has two: upright, and as stored. A file with transparency has two: its
    colours without it, and its colours over white. Raises as `opened` does.
    """
    try:
        with _open(source) as image:
            image.load()
            noted = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            found = [rgb for one in ([ImageOps.exif_transpose(image), image] if noted else [image]) for rgb in _in_rgb(one)]
    except Exception as error:  # Pillow may raise anything for a broken file; a bomb is no OSError
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        reason = "it is no picture of a known format" if isinstance(error, UnidentifiedImageError) else f"{kind}{error}"
        raise ValueError(f"{name} cannot be read: {reason}") from error
    return iter(found)


def _open(source: Source) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)  # its owner closes it
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _in_rgb(image: Image.Image) -> list[Image.Image]:
    """The picture in RGB: its colours alone and, where it has transparency, these over white."""
    if image.mode in MOST or image.mode in ("I", "F"):
        return [_in_8_bits(image).convert("RGB")]
    if image.mode not in ALPHA and "transparency" not in image.info:
        return [image.convert("RGB")]
    whole = image.convert("RGBA")
    if whole.getchannel("A").getextrema()[0] == 255:
        return [image.convert("RGB")]
    return [whole.convert("RGB"), Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")]


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Convert a grey picture to 8 bits. White is its mode's or, without one, the least of 1, 255, 65535 that fits."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    most = MOST.get(image.mode) or next((white for white in (1, 255, 65535) if values.max() <= white), values.max())
    if image.mode == "I" and most == 1:  # whole numbers: black, or nearly
        most = 255
    return Image.fromarray(np.rint(np.clip(values / most, 0, 1) * 255).astype(np.uint8))


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Return images of one size as (N, 3, H, W) float32 in -1..1."""
    return torch.stack(
        [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(127.5).sub(1) for image in images]
    )
