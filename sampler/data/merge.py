"""Joins the shards of a run into one folder, as if the run had been made in one."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from ..runs.atomic import atomic_write
from ..runs.jsonl_journal import Journal
from ..runs.manifest import JOBS, MANIFEST, sound
from ..runs.run_folder import differences, open_folder, read_settings
from .writers import writer_of

log = logging.getLogger(__name__)
NAME = re.compile(r"shard-(\d+)-of-(\d+)", re.ASCII)
MAY_DIFFER = ("shard", "device")  # settings that shards of one run need not share


def merge(run: str | Path, out: str | Path) -> tuple[int, int]:
    """Join the folders shard-i-of-n in `run` into `out`; returns (the number of images in `out`, the number of the run's jobs).

    A stopped merge is resumed by starting it again. An image that is missing or changed is left out, with a warning.
    `generate` with the same settings, without a shard, makes the images that `out` lacks, and finds near-duplicates in the
    whole set. Until then the lines name only near-duplicates within one shard.

    Raises ValueError, before any work, if there are no shards, a shard is missing or of another run, or `out` holds something
    else.
    """
    parts, settings = _parts(Path(run))
    out = Path(out)
    open_folder(out, settings | {"shard": None})
    writes = writer_of(out, settings)
    with Journal(out / MANIFEST, writes.finished) as journal:
        if not (out / JOBS).is_file() and (parts[0] / JOBS).is_file():  # the same in all of them
            with atomic_write(out / JOBS) as part:
                shutil.copyfile(parts[0] / JOBS, part)
        writes.join(parts)
        for part in parts:
            own = writer_of(part, settings)
            for line in sound(part):
                if line["id"] in journal:
                    continue
                wrong = own.wrong(line) if line["status"] == "ok" else None
                if wrong is None:
                    journal.append(line)
                else:
                    log.warning("%s: %s %s: left out", part.name, *wrong)
        writes.finish()
    return sum(line["status"] == "ok" for line in sound(out)), settings["prompts"]


def _parts(run: Path) -> tuple[list[Path], dict[str, Any]]:
    """Return the folders of all shards of a run, in their order, and the run's settings."""
    found: dict[tuple[int, int], Path] = {}
    for part in sorted(run.glob("shard-*-of-*")):
        name = NAME.fullmatch(part.name)
        if name is None:
            raise ValueError(f"{str(part)!r} is no shard: its name must be shard-i-of-n, two numbers, as shard-0-of-8")
        found[int(name[1]), int(name[2])] = part
    if not found:
        raise ValueError(f"{str(run)!r} holds no folder shard-i-of-n: give the --out of a run made with --shard")
    count, *others = sorted({n for _, n in found})
    if others:
        raise ValueError(f"{str(run)!r} holds shards of {' and of '.join(map(str, [count, *others]))}: keep those of one run")
    missing = [i for i in range(count) if (i, count) not in found]
    if missing:
        raise ValueError(f"{str(run)!r} has {len(found)} of {count} shards; missing are {missing}")
    parts = [part for _, part in sorted(found.items())]
    settings = [read_settings(part) for part in parts]
    if "format" not in settings[0]:
        raise ValueError(f"{str(run)!r} holds no run of generate: judge, without --shard, puts its own shards together")
    for shard, part, own in zip(sorted(found), parts, settings, strict=True):
        if own.get("shard") != list(shard):
            raise ValueError(f"{part.name} holds shard {own.get('shard')}, by its run.json: give it its name back")
        if said := differences(settings[0], own, MAY_DIFFER):
            raise ValueError(f"{part.name} is of another run than {parts[0].name} ({said})")
    return parts, settings[0]
