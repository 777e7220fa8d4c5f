"""The shards of a run made one, as if it had been made in one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from .folder import Journal, open_folder, read_lines, read_settings, whole

OWN = ("shard", "device")  # settings in which the shards of a run may differ


def merge(run: str | Path, out: str | Path) -> tuple[int, int]:
    """Make `out` of the folders shard-i-of-n in `run`; returns (images that are there, jobs of the run).

    A merge that was stopped goes on when it is started again. What is missing, `generate` makes in `out`, given the same
    settings without a shard.

    Raises ValueError where there are no shards, a shard is missing or of another run, or `out` holds something else.
    """
    run, out = Path(run), Path(out)
    parts = sorted(run.glob("shard-*-of-*"), key=lambda part: int(part.name.split("-")[1]))
    if not parts:
        raise ValueError(f"{str(run)!r} holds no folder shard-i-of-n: give the --out of a run made with --shard")
    shards = [read_settings(part) for part in parts]
    count = shards[0]["shard"][1]
    missing = sorted(set(range(count)) - {settings["shard"][0] for settings in shards})
    if missing or len(shards) != count:
        raise ValueError(f"{str(run)!r} has {len(shards)} of {count} shards; missing are {missing}")
    common = {name: value for name, value in shards[0].items() if name not in OWN}
    for part, settings in zip(parts, shards, strict=True):
        differs = [name for name in common if settings.get(name) != common[name]]
        if differs:
            raise ValueError(f"{part.name} is of another run than {parts[0].name} (its {', '.join(differs)} differ)")
    open_folder(out, {**shards[0], "shard": None})

    def there(line: dict[str, Any]) -> str | None:
        return line["id"] if line.get("status") == "ok" and (out / line["file"]).is_file() else None

    with Journal(out / "manifest.jsonl", there) as journal:
        for part in parts:
            for line in read_lines(part / "manifest.jsonl"):
                if line["id"] in journal:
                    continue
                if line["status"] == "ok" and not (out / line["file"]).exists():
                    _link(part / line["file"], out / line["file"])
                journal.append(line)
    images = sum(line["status"] == "ok" for line in read_lines(out / "manifest.jsonl"))
    return images, shards[0]["prompts"]


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    with whole(target) as part:
        part.unlink(missing_ok=True)
        try:
            os.link(source, part)
        except OSError:  # another file system
            shutil.copyfile(source, part)
