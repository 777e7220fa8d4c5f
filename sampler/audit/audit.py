"""An audit: which captions does a model reproduce? With what may be claimed of it, and what was not looked at.

Every caption is ranked by the noise gaps of its first steps (`ranking`) and gets a conformal p-value among ordinary captions,
whose gaps are a calibration's or are measured here. Those that Benjamini and Hochberg's rule discovers at the stated rate are
flagged. The worst are then sampled to the end, and each picture is judged by its basin score and, where there are training
images, by the nearest of the whole set.

The folder gets `gaps.jsonl`, `ordinary.jsonl` and `verified.jsonl` (a line when it is known: an audit that was stopped goes on,
and one that is done can verify more), `images/<id>-<seed>.png`, `heat/<id>-<seed>.png`, `predictions/<id>.png`, `audit.csv`,
`audit.json` (the record: what was done, and what it came to) and `audit.html`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from .. import checks
from ..calibration.calibration import EARLY, LOOKED, Calibration
from ..calibration.fingerprint import differing, fingerprint
from ..data.captions import Prompt
from ..data.tables import write_csv
from ..detection import basin
from ..guidance.guard import RATE, THRESHOLD
from ..runs.atomic import whole
from ..runs.folder import open_folder
from ..runs.provenance import weights_sha256
from ..sampler import Sampler
from . import page
from .index import Index
from .ranking import Gaps, Usual, statistic
from .record import ranked, ranked_record, verdict, verified_record
from .verification import Verification


@dataclass(frozen=True)
class Settings:
    """How an audit is done.

    rate:    of the flagged captions, the share that is expected to be ordinary, at most.
    noises:  initial noises a caption. first_steps: that are looked at; None: as many as a guard looks at early.
    verify:  how many of the worst captions are sampled, in `seeds` pictures each. seed: of the first picture.
    similarity, threshold, on_error: as for `Index`.

    Raises ValueError for anything else.
    """

    rate: float = 0.1
    noises: int = 1
    first_steps: int | None = None
    verify: int = 0
    seeds: int = 4
    seed: int = 0
    similarity: Sequence[str] | None = None
    threshold: float | None = None
    on_error: str = "stop"

    def __post_init__(self) -> None:
        for name, least in (("noises", 1), ("verify", 0), ("seeds", 1), ("seed", 0)):
            checks.at_least(name, getattr(self, name), least)
        if self.first_steps is not None and not 1 <= checks.at_least_one("first_steps", self.first_steps) <= LOOKED:
            raise ValueError(f"first_steps must be 1 to {LOOKED}, got {self.first_steps}")
        if not 0 < checks.share("rate", self.rate) < 1:
            raise ValueError(f"rate must be between 0 and 1, got {self.rate!r}")

    def looked(self, steps: int) -> int:
        """How many of so many steps are looked at."""
        return min(steps, self.first_steps or max(1, min(LOOKED, round(EARLY * steps))))


def audit(
    sampler: Sampler,
    model: str,
    captions: Sequence[Prompt],
    out: str | Path,
    ordinary: Sequence[str],
    calibration: Calibration | None = None,
    steps: int = 50,
    scale: float = 7.5,
    settings: Settings = Settings(),
    training: Sequence[Path] = (),
    batch_size: int = 16,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Audit `captions` into the folder `out`; returns the rows of `audit.csv`, the worst caption first.

    model: what run.json calls the sampler's model. training: images beside the captions' own. steps, scale: of a whole run.
    ordinary: prompts that the model has not memorized, whose gaps are measured unless the calibration has them: made with these
              steps and this scale on this model, and `settings.noises` is 1, as of its pictures.

    Raises ValueError, before any work, for what does not fit, and for a folder that holds something else.
    """
    out, first = Path(out), settings.looked(steps)
    if scale in (0, 1):
        raise ValueError(f"scale is {scale:g}, at which a model is asked once a step: an audit compares two predictions")
    known = None if calibration is None else _of_calibration(calibration, sampler, steps, scale, settings)
    if known is None and len(ordinary) < 2:
        raise ValueError(
            f"ordinary must be two prompts at least, and a hundred or more for small p-values; got {len(ordinary)}"
        )
    images = _images(captions, training)
    threshold, index = _verdicts(sampler, calibration, settings, images)
    run = _run(sampler, model, captions, known, ordinary, steps, scale, first, settings)
    open_folder(out, run)

    gaps = Gaps(sampler, first, steps, scale, batch_size, progress)
    usual = known or _measured(gaps, ordinary, len(captions), out, settings)

    def seeds(place: int, number: int) -> list[int]:
        """Of a caption by its place, whatever else is to be done."""
        return [settings.seed + place + k * len(captions) for k in range(number)]

    looks = [(one.id, one.text, seeds(i, settings.noises)) for i, one in enumerate(captions)]
    lines = gaps(looks, out / "gaps.jsonl", "captions")
    rows = ranked(captions, lines, usual, settings.rate)

    places = {prompt.id: i for i, prompt in enumerate(captions)}
    worst = [captions[places[row["id"]]] for row in rows if row["status"] == "ok"][: settings.verify]
    tasks = [(one.id, one.text, seeds(places[one.id], settings.seeds)) for one in worst]
    verify = Verification(sampler, out, steps, scale, usual.gap, threshold, batch_size, progress)
    found = verify(tasks, index) if tasks else {}
    rows = [verdict(row, found.get(row["id"], [])) for row in rows]
    write_csv(out / "audit.csv", rows)
    told = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **run}
    told |= ranked_record(rows, lines, usual, settings.rate)
    told |= verified_record(found, len(tasks) * settings.seeds, threshold, index)
    told |= {"training_images": len(images), "without_caption": len(images) - len(_images(captions))}
    with whole(out / "audit.json") as part:
        part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    page.write(out, told, {prompt.id: prompt.image for prompt in captions}, rows, found)
    return rows


def _images(captions: Sequence[Prompt], more: Sequence[Path] = ()) -> list[Path]:
    """The captions' own images, then the others; each file once."""
    found: dict[Path, Path] = {}
    for path in (*(prompt.image for prompt in captions if prompt.image), *more):
        found.setdefault(path.resolve(), path)
    return list(found.values())


def _of_calibration(calibration: Calibration, sampler: Sampler, steps: int, scale: float, settings: Settings) -> Usual | None:
    """What the calibration knows, where its pictures were made as the captions' are; None where not."""
    first, levels = settings.looked(steps), sampler.solver(steps).levels
    alike = calibration.fitted(sampler, steps) is calibration and len(calibration.gap) == len(levels)
    alike = alike and calibration.scale == scale and settings.noises == 1 and first <= min(map(len, calibration.first_gaps))
    alike = alike and not (calibration.model and differing(calibration.model, fingerprint(sampler.pipe)))
    if not (alike and calibration.settings.get("size", list(sampler.size())) == list(sampler.size())):
        return None
    ones = (1.0,) * first
    ordinary = tuple(statistic([look[:first]], ones) for look in calibration.first_gaps)
    return Usual(calibration.gap[:first], ordinary, "the calibration")


def _measured(gaps: Gaps, ordinary: Sequence[str], count: int, out: Path, settings: Settings) -> Usual:
    """The same of these prompts, whose noises are those after the captions'."""
    start = settings.seed + count * settings.noises
    seeds = [[start + j + k * len(ordinary) for k in range(settings.noises)] for j in range(len(ordinary))]
    looks = [(f"{j:04d}", text, own) for j, (text, own) in enumerate(zip(ordinary, seeds, strict=True))]
    path = out / "ordinary.jsonl"
    lines = [line for line in gaps(looks, path, "ordinary prompts").values() if line["status"] == "ok"]
    if len(lines) < 2:
        raise ValueError(f"{len(lines)} of {len(ordinary)} ordinary prompts could be measured: see {str(path)!r}")
    usual = tuple(median(noise[k] for line in lines for noise in line["gaps"]) for k in range(gaps.steps))
    if min(usual) <= 0:
        raise ValueError("the usual noise gap is 0: the model takes no notice of prompts")
    return Usual(usual, tuple(statistic(line["gaps"], usual) for line in lines), "measured here")


def _verdicts(
    sampler: Sampler, calibration: Calibration | None, settings: Settings, images: Sequence[Path]
) -> tuple[float, Index | None]:
    """The threshold of the basin score, and the index of the training images; what there is to refuse is refused here."""
    threshold = THRESHOLD if calibration is None or not settings.verify else calibration.threshold(RATE)
    if settings.verify:
        basin.Probe.of(sampler.scheduler)
    if not (settings.verify and images):
        return threshold, None
    return threshold, Index(images, settings.similarity, settings.threshold, settings.on_error)


def _run(
    sampler: Sampler,
    model: str,
    captions: Sequence[Prompt],
    known: Usual | None,
    ordinary: Sequence[str],
    steps: int,
    scale: float,
    first: int,
    settings: Settings,
) -> dict[str, Any]:
    """The contents of run.json: what decides gaps, scores and pictures. How many are verified is free to change.

    So are the training images: they are compared with the pictures every time.
    """
    usual = [known.gap, known.ordinary] if known else list(ordinary)
    return {
        "model": model,
        "weights_sha256": weights_sha256(sampler.pipe),
        "captions": len(captions),
        "captions_sha256": _digest([(prompt.id, prompt.text) for prompt in captions]),
        "ordinary_sha256": _digest(usual),
        "steps": steps,
        "scale": scale,
        "first_steps": first,
        "noises": settings.noises,
        "seed": settings.seed,
        "size": list(sampler.size()),
        "options": {name: str(value) for name, value in sampler.options.items()},
        **sampler.provenance,
    }


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()
