"""An audit: which captions of a training set does a model reproduce?

Every caption is scored by the noise gaps of its first steps under plain guidance, relative to what is ordinary on the model
(Wen et al., ICLR 2024, https://arxiv.org/abs/2407.21720), the largest of a few initial noises, because one that leads to a
training image is enough; and flagged above what a share `rate` of ordinary captions reach. The worst are then sampled to the
end, and each image's nearest training image is looked for in the whole set.

The folder gets `scores.jsonl` and `verified.jsonl` (a line when it is known: an audit that was stopped goes on, and one that is
done can verify more), `images/<id>-<seed>.png`, `audit.csv` and `audit.html`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from basinescape import Calibration, Output, Rung, Sampler, arguments
from basinescape.audit.index import Index
from basinescape.batches import parts
from basinescape.folder import Journal, open_folder, read_lines, save_image, settings_of
from basinescape.progress import FORMAT, moving
from tqdm import tqdm

from ..scenario import Prompt
from .audit_page import page
from .evaluate import write_csv

log = logging.getLogger(__name__)
NOISES = 2  # initial noises a caption: a basin need not hold every one. See bench/results/audit.csv, of 4 noises from seed 5000


@dataclass(frozen=True)
class Settings:
    """How an audit is done.

    first_steps: looked at; None: as many as the calibration's guard looks at. noises: initial noises a caption, of whose scores
    the largest counts. rate: of ordinary captions that are flagged; None: the calibration's. verify: how many of the worst
    captions are sampled, in `seeds` images each. seed: of the first image. similarity, threshold, on_error: as for `Index`.

    Raises ValueError for anything else.
    """

    first_steps: int | None = None
    noises: int = NOISES
    rate: float | None = None
    verify: int = 0
    seeds: int = 4
    seed: int = 0
    similarity: Sequence[str] | None = None
    threshold: float | None = None
    on_error: str = "stop"

    def __post_init__(self) -> None:
        for name, least in (("noises", 1), ("verify", 0), ("seeds", 1), ("seed", 0)):
            arguments.at_least(name, getattr(self, name), least)
        if self.first_steps is not None and not 1 <= arguments.at_least_one("first_steps", self.first_steps) <= 10:
            raise ValueError(f"first_steps must be 1 to 10, got {self.first_steps}")
        if self.rate is not None and not 0 < arguments.share("rate", self.rate) < 1:
            raise ValueError(f"rate must be between 0 and 1, got {self.rate!r}")


def audit(
    sampler: Sampler,
    model: str,
    captions: Sequence[Prompt],
    out: str | Path,
    calibration: Calibration,
    steps: int = 50,
    settings: Settings = Settings(),
    training: Sequence[Path] = (),
    batch_size: int = 16,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Audit `captions` into the folder `out`; returns the rows of `audit.csv`, the worst caption first.

    model: what run.json calls the sampler's model. training: images beside the captions' own. steps: of a whole run.

    Raises ValueError, before any work, for settings or a calibration that do not fit, and for a folder that holds something
    else.
    """
    out, fitted = Path(out), calibration.fitted(sampler, steps)
    look = _look(fitted, settings)
    images = list(dict.fromkeys([*(prompt.image for prompt in captions if prompt.image), *training]))
    nearest = Index(images, settings.similarity, settings.threshold, settings.on_error) if settings.verify else None
    open_folder(out, _run(sampler, model, captions, look, steps, settings))
    with Journal(out / "scores.jsonl", lambda line: line["id"] if line.get("status") == "ok" else None) as journal:
        scored = {line["id"]: line for line in read_lines(out / "scores.jsonl")}
        waiting = [(i, prompt) for i, prompt in enumerate(captions) if prompt.id not in scored]
        with _bar("scoring", len(captions), len(captions) - len(waiting), progress) as bar:
            for lines in _scored(sampler, waiting, len(captions), look, steps, settings, batch_size, bar):
                for line in lines:
                    journal.append(line)
                    scored[line["id"]] = line
                bar.update(len(lines))
    order = sorted(enumerate(captions), key=lambda one: -scored[one[1].id].get("score", 0.0))
    worst = [(i, prompt) for i, prompt in order if scored[prompt.id]["status"] == "ok"][: settings.verify]
    found = _verified(sampler, worst, len(captions), out, fitted, steps, settings, nearest, batch_size, progress)
    rows = [_row(prompt, scored[prompt.id], found.get(prompt.id, []), look.early) for _, prompt in order]
    write_csv(out / "audit.csv", rows)
    page(out, model, [prompt for _, prompt in order], rows, found, look, nearest.thresholds if nearest else {})
    return rows


def _look(calibration: Calibration, settings: Settings) -> Rung:
    """The plain rung with as many first steps as are looked at, and what flags a caption as its `early` threshold."""
    plain, ordinary = calibration.rungs[0], calibration.ordinary
    if ordinary is None:  # made by hand, or long ago
        if (settings.first_steps, settings.rate) != (None, None):
            raise ValueError("first_steps and rate need a calibration that looked at each of the first steps: calibrate again")
        return plain
    steps = settings.first_steps or min(plain.steps, len(ordinary.looks))
    if steps > len(ordinary.looks):
        raise ValueError(f"first_steps must be 1 to {len(ordinary.looks)} with this calibration, got {steps}")
    rate = calibration.rate if settings.rate is None else settings.rate
    each = 1 - (1 - rate) ** (1 / settings.noises)  # the largest of the noises is above it at `rate` (Sidak)
    return replace(plain, steps=steps, early=ordinary.threshold(steps, each))


def _run(
    sampler: Sampler, model: str, captions: Sequence[Prompt], look: Rung, steps: int, settings: Settings
) -> dict[str, Any]:
    """The contents of run.json: what decides scores and images. How many are verified, and how, is free to change."""
    texts = json.dumps([(prompt.id, prompt.text) for prompt in captions]).encode()
    return {
        "model": model,
        "captions": len(captions),
        "captions_sha256": hashlib.sha256(texts).hexdigest(),
        "steps": steps,
        "first_steps": look.steps,
        "usual": look.gap[: look.steps],
        "scale": look.guidance.scale,
        "noises": settings.noises,
        "seed": settings.seed,
        **settings_of(sampler),
    }


def _bar(what: str, total: int, done: int, progress: bool) -> tqdm:
    return tqdm(total=total, initial=done, desc=what, bar_format=FORMAT, disable=not progress)


def _scored(
    sampler: Sampler,
    waiting: Sequence[tuple[int, Prompt]],
    count: int,
    look: Rung,
    steps: int,
    settings: Settings,
    size: int,
    bar: tqdm,
) -> Iterator[list[dict[str, Any]]]:
    """Lines of scores.jsonl, a batch at a time. The noise of a caption is its position's, whatever else is to be done."""

    def scores(batch: Sequence[tuple[int, Prompt]]) -> list[list[float]]:
        texts = [prompt.text for _, prompt in batch for _ in range(settings.noises)]
        seeds = [settings.seed + i + k * count for i, _ in batch for k in range(settings.noises)]
        options = {"output": "latent", "batch_size": size, "progress": moving(bar, len(batch))}
        made = sampler(texts, seeds, steps, look.guidance, stop_after=look.steps, **options)
        return look.look(made.noise_gap).view(len(batch), settings.noises).tolist()

    for part in parts(len(waiting), max(1, size // settings.noises)):
        batch = [waiting[i] for i in part]
        lines: list[dict[str, Any]] = []
        for some, found in _each(scores, batch):
            if isinstance(found, Exception):
                lines.append({"id": some[0][1].id, "status": f"failed: {arguments.line(found)}"})
            else:
                for (_, prompt), looks in zip(some, found, strict=True):
                    looks = [round(look, 5) for look in looks]
                    lines.append({"id": prompt.id, "status": "ok", "score": max(looks), "looks": looks})
        yield lines


def _each(make: Callable[[Sequence[Any]], Any], batch: Sequence[Any]) -> Iterator[tuple[Sequence[Any], Any]]:
    """What `make` makes of a batch; of the halves of one that fails, down to what is at fault, whose exception it then is."""
    try:
        made = make(batch)
    except Exception as error:  # out of memory, or what a caption does to a tokenizer
        if len(batch) == 1:
            log.error("%s", arguments.line(error))
            yield batch, error
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            yield from _each(make, half)
        return
    yield batch, made


def _verified(
    sampler: Sampler,
    worst: Sequence[tuple[int, Prompt]],
    count: int,
    out: Path,
    calibration: Calibration,
    steps: int,
    settings: Settings,
    nearest: Index | None,
    size: int,
    progress: bool,
) -> dict[str, list[dict[str, Any]]]:
    """The lines of verified.jsonl about the worst captions, by their ids, the most similar image first."""
    if nearest is None:
        return {}
    how = json.loads(json.dumps({"thresholds": nearest.thresholds, "images": len(nearest.images)}))

    def known(line: dict[str, Any]) -> tuple[str, int] | None:
        there = line.get("how") == how and (out / "images" / f"{line['id']}-{line['seed']}.png").is_file()
        return (line["id"], line["seed"]) if there else None

    tasks = [(prompt, settings.seed + i + k * count) for i, prompt in worst for k in range(settings.seeds)]

    def sampled(batch: Sequence[tuple[Prompt, int]]) -> Output:
        texts, seeds = [prompt.text for prompt, _ in batch], [seed for _, seed in batch]
        return sampler(texts, seeds, steps, calibration.rungs[0].guidance, batch_size=size, progress=moving(bar, len(batch)))

    with Journal(out / "verified.jsonl", known) as journal:
        lines = {(line["id"], line["seed"]): line for line in read_lines(out / "verified.jsonl")}
        waiting = [task for task in tasks if (task[0].id, task[1]) not in lines]
        with _bar("verifying", len(tasks), len(tasks) - len(waiting), progress) as bar:
            for part in parts(len(waiting), size):
                for some, made in _each(sampled, [waiting[i] for i in part]):
                    if not isinstance(made, Exception):
                        for (prompt, seed), image, found in zip(some, made.images, nearest(made.images), strict=True):
                            save_image(image, out / "images" / f"{prompt.id}-{seed}.png")
                            line = {"id": prompt.id, "seed": seed, **asdict(found), "image": str(found.image), "how": how}
                            journal.append(line)
                            lines[prompt.id, seed] = line
                    bar.update(len(some))
    by_id: dict[str, list[dict[str, Any]]] = {}
    for prompt, seed in tasks:
        if (prompt.id, seed) in lines:
            by_id.setdefault(prompt.id, []).append(lines[prompt.id, seed])
    return {id: sorted(found, key=lambda line: (-line["copy"], -line["similarity"])) for id, found in by_id.items()}


def _row(prompt: Prompt, line: dict[str, Any], found: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """A row of audit.csv; what was not looked at is empty."""
    score = line.get("score")
    row = {"id": prompt.id, "caption": prompt.text, "score": score, "flagged": score is not None and score > threshold}
    row |= {
        "image": str(prompt.image) if prompt.image else None,
        "copies": sum(one["copy"] for one in found) if found else None,
    }
    first = found[0] if found else {}
    row |= {"similarity": first.get("similarity"), "measure": first.get("measure"), "nearest": first.get("image")}
    return row | {"status": line["status"]}
