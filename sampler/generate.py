"""A job: a file of prompts in, a folder of images out, with a manifest that grows as images are finished.

The folder gets `images/<id>.png`, `manifest.jsonl` (a line an image) and `run.json` (all that is needed to make it again).
A job that was stopped goes on where it was when it is started again with the same settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from .guidance import Guidance
from .loop import Plan
from .sampler import Output, Sampler

log = logging.getLogger(__name__)
SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Job:
    """One image to make."""

    id: str
    prompt: str
    seed: int


def read_prompts(path: str | Path, seed: int = 0) -> list[Job]:
    """Read JSON Lines, `{"prompt": "...", "id": "optional", "seed": optional}`.

    A prompt without an id gets its position, zero-padded; one without a seed gets `seed` plus its position.

    Raises ValueError naming the line for malformed, duplicate or unsafe entries; FileNotFoundError for a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompts file {str(path)!r} does not exist")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {str(path)!r} is not UTF-8 text: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"prompts file {str(path)!r} holds no prompts")
    digits = max(4, len(str(len(numbered) - 1)))
    jobs, lines_of = [], {}
    for position, (number, line) in enumerate(numbered):
        where = f"{path}, line {number}"
        job = _job(line, where, f"{position:0{digits}d}", seed + position)
        first = lines_of.setdefault(job.id.casefold(), number)  # some file systems do not tell A.png from a.png
        if first != number:
            raise ValueError(f"{where}: id {job.id!r} is already used in line {first}")
        jobs.append(job)
    return jobs


def _job(line: str, where: str, default_id: str, default_seed: int) -> Job:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f'{where}: must be an object such as {{"prompt": "a cat"}}, got {line.strip()[:60]}')
    unknown = entry.keys() - {"prompt", "id", "seed"}
    if unknown:
        raise ValueError(f"{where}: unknown key {sorted(unknown)[0]!r}; allowed are prompt, id, seed")
    prompt, id, seed = entry.get("prompt"), entry.get("id", default_id), entry.get("seed", default_seed)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: prompt must be a non-empty string, got {prompt!r}")
    if not isinstance(id, str) or not SAFE_ID.fullmatch(id):
        raise ValueError(
            f"{where}: id must be 1 to 128 letters, digits, '.', '_' or '-', not starting with '.' or '-'; got {id!r}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"{where}: seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
    return Job(id, prompt, seed)


def describe(
    sampler: Sampler, model: str, jobs: Sequence[Job], guidance: Guidance, steps: int, negative_prompt: str | None
) -> dict[str, Any]:
    """Every setting and version that is needed to make a run again: the contents of run.json."""
    prompts = json.dumps([asdict(job) for job in jobs]).encode()
    return {
        "model": model,
        "guidance": guidance.to_dict(),
        "steps": steps,
        "negative_prompt": negative_prompt,
        "prompts": len(jobs),
        "prompts_sha256": hashlib.sha256(prompts).hexdigest(),
        **settings_of(sampler),
    }


def settings_of(sampler: Sampler) -> dict[str, Any]:
    """What a run's images owe to the sampler and to the versions of what it is built on."""
    packages = ("basinescape", "torch", "triton", "diffusers", "transformers", "xformers")
    return {
        "scheduler": {"class": type(sampler.scheduler).__name__, **_public(sampler.scheduler.config)},
        "dtype": str(sampler.pipe.unet.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if sampler.pipe.device.type == "cuda" else sampler.pipe.device.type,
        "versions": {"python": platform.python_version()} | {name: found for name in packages if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's settings as json reads them back, without diffusers' own notes, whose order differs from run to run."""
    return json.loads(json.dumps({name: value for name, value in config.items() if name[0] != "_"}, default=str))


def open_folder(out: str | Path, run: dict[str, Any]) -> None:
    """Make `out` ready for `run`, new or to be gone on with.

    Raises ValueError where `out` holds anything but this same run, before anything is written.
    """
    out = Path(out)
    record = out / "run.json"
    if record.is_file():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        differs = [name for name in run if earlier.get(name) != run[name]]
        if differs:
            raise ValueError(f"output folder {str(out)!r} holds another run (its {', '.join(differs)} differ): choose another")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"output folder {str(out)!r} is not empty and holds no run of this program: choose another")
    (out / "images").mkdir(parents=True)
    with whole(record) as part:
        part.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file, none where there is no file; one that was cut off by a kill is passed over."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [entry for entry in map(_entry, lines) if entry]


def _entry(line: str) -> dict[str, Any] | None:
    """A manifest line; None for one that was cut off when its run was killed."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that appears at `path` whole or not at all."""
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


def generate(
    sampler: Sampler,
    jobs: Sequence[Job],
    out: str | Path,
    guidance: Guidance,
    model: str,
    steps: int = 50,
    batch_size: int = 8,
    negative_prompt: str | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Make every job's image in the folder `out`; returns the manifest lines this call wrote.

    A batch that fails is tried again sample by sample; what still fails gets a manifest line that says why, and no image.

    Raises ValueError, before any sampling, for bad settings and for a folder that holds something else.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    Plan.make(sampler.solver(steps), guidance, torch.device("cpu"))  # raises for a table of another length
    open_folder(out, describe(sampler, model, jobs, guidance, steps, negative_prompt))
    finished = {entry["id"] for entry in read_entries(Path(out) / "manifest.jsonl") if entry["status"] == "ok"}
    waiting = [job for job in jobs if job.id not in finished]
    settings = {"steps": steps, "guidance": guidance, "negative_prompt": negative_prompt, "progress": False}
    written = []
    with (
        (Path(out) / "manifest.jsonl").open("a", encoding="utf-8") as manifest,
        tqdm(total=len(jobs), initial=len(finished), desc="images", unit="image", disable=not progress) as bar,
    ):
        if manifest.tell():
            manifest.write("\n")  # a killed run may have left half a line; blank lines are passed over
        for start in range(0, len(waiting), batch_size):
            for entry in _make(sampler, waiting[start : start + batch_size], Path(out), settings):
                manifest.write(json.dumps(entry) + "\n")
                manifest.flush()
                os.fsync(manifest.fileno())
                written.append(entry)
                bar.update()
    return written


def _make(sampler: Sampler, batch: Sequence[Job], out: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Sample a batch, save its images, yield a manifest entry for each; a failing batch is halved down to its fault."""
    try:
        made = sampler([job.prompt for job in batch], [job.seed for job in batch], **settings)
    except (RuntimeError, ValueError) as error:  # among them torch.OutOfMemoryError
        if len(batch) == 1:
            log.error("%s: %s", batch[0].id, error)
            yield asdict(batch[0]) | {"status": f"failed: {error}"}
            return
        log.warning("a batch of %d failed (%s); trying its halves", len(batch), error)
    else:
        for i, job in enumerate(batch):
            yield _save(job, made, i, out)
        return
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        yield from _make(sampler, half, out, settings)


def _save(job: Job, made: Output, i: int, out: Path) -> dict[str, Any]:
    step = made.transition_step[i].item()
    entry = asdict(job) | {
        "transition_step": step,
        "transition_timestep": made.timesteps[step].item() if step >= 0 else None,
        "noise_gap": [gap if gap == gap else None for gap in made.noise_gap[i].tolist()],
    }
    if not made.latents[i].isfinite().all():
        return entry | {"status": "failed: the latents are not finite"}
    image: Image.Image = made.images[i]
    path = out / "images" / f"{job.id}.png"
    with whole(path) as part:
        image.save(part, format="PNG")
    return entry | {"status": "ok"}
