"""Reads captions together with their training images, from every layout of a training set."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from ..runs.run_folder import SAFE_ID
from .input_formats import HUB
from .layout import METADATA, Layout, file_in
from .names import COLUMN, IDS, IMAGE, TEXT, Ids, first
from .rows import SAVED, Faults, open_rows

Find = Callable[[str], Path]  # from the name in a row to the picture
log = logging.getLogger(__name__)
# Folders of these names do not say what the pictures in them show.
NO_CAPTION = {"train", "test", "val", "valid", "validation", "images", "image", "img", "imgs", "data", "pictures", "photos"}


@dataclass(frozen=True)
class Prompt:
    """A prompt with its training image and with the concept that its picture must show, where these are known."""

    id: str
    text: str
    image: Path | None = None
    concept: str | None = None


def read_captions(
    source: str | Path, where: str = "", images: str | Path | None = None, every: bool = False, on_error: str = "stop"
) -> list[Prompt]:
    """Return captions with their training images.

    source: a table, as for `rows.open_rows`, with the column prompt (caption, text) and perhaps image (file_name, path, file),
            id and concept; or a folder, which is searched for images. The captions of a folder's images are taken from the
            first of these places that has some:
            metadata.jsonl, .csv or .parquet in the folder or below it, as the library `datasets` has them;
            .txt, .caption or .json files beside the images, with the images' names;
            other tables of captions in the folder or below it, as captions.jsonl;
            the names of the folders that the images lie in, without kohya's repeats, such as "20_". A warning says so.
    where:  for the message about a missing source: where its authors publish it.
    images: the folder that paths of images start from; None: the table's own folder. If it is given, a prompt without a path
            gets the image in it whose name is the prompt's id, if there is one.
    every:  return all captions of an image, not only the first.
    on_error: what happens at a caption or an image that is wrong or missing; see `Faults`.

    Raises FileNotFoundError for a missing `source` or `images`, and ValueError, with file and place, for the rest.
    """
    path, faults, name = Path(source), Faults(on_error), f"captions {str(source)!r}"
    if not str(source).startswith(HUB) and not path.exists():
        published = f"; their authors publish them: {where}" if where else ""
        raise FileNotFoundError(f"{name} do not exist{published}")
    if path.is_dir() and not any((path / saved).is_file() for saved in SAVED):
        found = _folder(Layout(path), every, faults)
    elif images is None:
        found = _table(path, partial(file_in, home=path.parent), every, faults, count())
    else:
        layout = Layout(Path(images))
        found = _table(path, partial(layout.find, home=layout.folder), every, faults, count(), layout.images)
    return checked(found, name, faults)


def checked(found: Iterable[Prompt], name: str, faults: Faults) -> list[Prompt]:
    """Return the prompts that have text, and an id that can name a file and that no earlier prompt has.

    name: of their source, for messages. Raises ValueError if there are none, and as `Faults` does.
    """
    known: dict[str, Prompt] = {}
    for prompt in found:
        if not prompt.text.strip():
            faults(f"{name}: {prompt.id} has an empty caption")
        elif not SAFE_ID.fullmatch(prompt.id):
            faults(f"{name}: id must be {IDS}; got {prompt.id!r}")
        elif prompt.id.casefold() in known:
            faults(f"{name}: id {prompt.id!r} comes twice")
        else:
            known[prompt.id.casefold()] = prompt
    if not known:
        raise ValueError(f"{name} hold no prompts")
    return list(known.values())


def _folder(layout: Layout, every: bool, faults: Faults) -> Iterator[Prompt]:
    if layout.tables:
        return _tables(layout, every, faults)
    if any(map(layout.has_text, layout.images)) or not _are_named(layout):
        return _beside(layout, every, faults)
    return _by_folder(layout)


def _tables(layout: Layout, every: bool, faults: Faults) -> Iterator[Prompt]:
    seen, numbers = set(), count()
    for table in layout.tables:
        find = partial(layout.find, home=table.parent)
        for prompt in _table(table, find, every, faults, numbers, layout.images):
            seen.add(prompt.image)
            yield prompt
    left = [image for image in layout.images if image not in seen]
    if left:
        names = ", ".join(table.name for table in layout.tables)
        log.warning("%s: %d images are not in %s, first %r", layout.folder, len(left), names, left[0].name)


def _table(
    path: Path, find: Find, every: bool, faults: Faults, numbers: Iterator[int], images: Sequence[Path] = ()
) -> Iterator[Prompt]:
    """Yield a file's captions. numbers: ids for rows without one. images: for rows without one, found by the id."""
    name, read = open_rows(str(path), "captions")
    named = {image.stem: image for image in images}
    for (where, said), number in zip(read(), numbers, strict=False):
        with faults.at(f"{name}, {where}: "):
            for prompt in _prompts(said, number, find, every):
                yield prompt if prompt.image else replace(prompt, image=named.get(prompt.id))


def _prompts(said: Mapping[str, Any] | str, number: int, find: Find, every: bool) -> list[Prompt]:
    """The prompts of a row, one a caption. Raises ValueError for a row that is wrong."""
    if isinstance(said, str):
        raise ValueError(said)
    text, image, id, concept = first(said, TEXT), first(said, IMAGE), said.get("id"), said.get("concept")
    texts = text if isinstance(text, list) and text else [text]
    if not all(isinstance(one, str) for one in texts):
        raise ValueError(f"needs {COLUMN}; it has {', '.join(said) or 'nothing'}")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"its image must be a file's name, got {str(image)[:80]!r}")
    own = f"{number:04d}" if id is None else str(id)
    return list(_each(own, texts, find(image) if image else None, every, concept))


def _each(id: str, texts: Sequence[str], image: Path | None, every: bool, concept: str | None = None) -> Iterator[Prompt]:
    """Yield the captions of an image, or only the first; from the second on, the id of the k-th ends in -k."""
    for k, text in enumerate(texts if every else texts[:1], 1):
        yield Prompt(id if k == 1 else f"{id}-{k}", text, image, concept)


def _beside(layout: Layout, every: bool, faults: Faults) -> Iterator[Prompt]:
    """The captions in text files beside images."""
    without, ids = [image for image in layout.images if not layout.has_text(image)], Ids()
    if without:
        above = [layout.folder.parent / name for name in METADATA]
        other = layout.elsewhere or next((path for path in above if path.is_file()), None)
        hint = f"; is it in {str(other)!r}? Then give that, or the folder it is in" if other else ""
        faults(
            f"captions {str(layout.folder)!r}: {len(without)} of {len(layout.images)} images have no caption: put that of "
            f"{str(without[0].relative_to(layout.folder))!r} into {without[0].with_suffix('.txt').name!r}, "
            f"or all into metadata.jsonl (file_name, text){hint}"
        )
    for image in filter(layout.has_text, layout.images):
        texts, wrong = layout.texts(image)
        if texts:
            yield from _each(ids(layout.name(image)), texts, image, every)
        else:
            faults(wrong)


def _are_named(layout: Layout) -> bool:
    """Whether every image lies in a folder whose name may say what it shows, and no caption file lies in another folder."""
    homes = {image.parent for image in layout.images}
    named = all(home != layout.folder and home.name.casefold() not in NO_CAPTION for home in homes)
    return bool(homes) and named and layout.elsewhere is None


def _by_folder(layout: Layout) -> Iterator[Prompt]:
    """Return the images' folder names as captions, without the number of repeats that kohya's trainer expects before them."""
    ids = Ids()
    named = {
        image: re.sub(r"^\d+_", "", image.parent.name).replace("_", " ").strip() or image.parent.name for image in layout.images
    }
    names = list(dict.fromkeys(named.values()))
    said = ", ".join(map(repr, names[:3])) + (", ..." if names[3:] else "")
    log.warning("%s: no file has captions, so that the names of its folders are taken for them: %s", layout.folder, said)
    return (Prompt(ids(layout.name(image)), text, image) for image, text in named.items())
