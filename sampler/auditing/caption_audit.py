"""An audit: which captions does a model reproduce, what may be claimed of them, and what was not looked at?

Every caption is ranked by the noise gaps of its first steps (`ranking`). It gets a conformal p-value by comparison with
ordinary captions, whose gaps come from a calibration or are measured here. Captions that Benjamini and Hochberg's rule
discovers at the stated rate are flagged. The worst are then sampled to the end. Each of their pictures is judged by its basin
score and, if there are training images, by the nearest one of the whole set.

The folder gets `gaps.jsonl`, `ordinary.jsonl` and `verified.jsonl`, which grow with every batch, so that a stopped audit can be
resumed and a finished one can verify more captions. It also gets `images/<id>-<seed>.png`, `heat/<id>-<seed>.png`,
`predictions/<id>.png`, `audit.csv`, `audit.json` (the record of what was done and found) and `audit.html`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from .. import checks
from ..calibration.baseline import ordinary_prompts
from ..calibration.calibration import EARLY, LOOKED, Calibration, steps_and_scale
from ..calibration.cost_bar import PlainRuns
from ..data.captions import Prompt, read_captions
from ..data.pictures import images_in
from ..data.prompts import read_prompts
from ..data.tables import write_csv
from ..detection import basin_score
from ..guidance.guard import RATE, THRESHOLD
from ..models import memory
from ..runs.atomic import atomic_write
from ..runs.jsontext import json_bytes
from ..runs.provenance import weights_sha256
from ..runs.run_folder import open_folder
from ..sampler import Sampler
from . import audit_page
from .ranking import Reference, Task, first_gaps, statistic
from .record import ranked, ranked_record, verdict, verified_record
from .training_images import TrainingImages
from .verification import Verification

log = logging.getLogger(__name__)
FIRST_SEED = 1_000_000_000  # of the ordinary captions: far above the seeds of the audited ones


@dataclass(frozen=True)
class Settings:
    """How an audit is done.

    rate:    the largest expected share of ordinary captions among the flagged ones (the false discovery rate).
    noises:  initial noises per caption. first_steps: steps that are measured; None: as many as a guard's early look.
    verify:  how many of the worst captions are sampled, in `seeds` pictures each. seed: of the first picture.
    similarity, threshold, on_error: as for `TrainingImages`.
    steps, scale: of a whole run; None: as calibrated, else as the model's own pipeline has them.
    batch_size: samples per batch; None: as many as a GPU's free memory holds, 16 on a CPU.

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
    steps: int | None = None
    scale: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("noises", 1), ("verify", 0), ("seeds", 1), ("seed", 0)):
            checks.at_least(name, getattr(self, name), least)
        for name in ("steps", "batch_size"):
            if getattr(self, name) is not None:
                checks.at_least_one(name, getattr(self, name))
        if self.first_steps is not None and not 1 <= checks.at_least_one("first_steps", self.first_steps) <= LOOKED:
            raise ValueError(f"first_steps must be 1 to {LOOKED}, got {self.first_steps}")
        checks.rate(self.rate)

    def looked(self, steps: int) -> int:
        """Return how many of a run's `steps` are measured."""
        return min(steps, self.first_steps or max(1, min(LOOKED, round(EARLY * steps))))


def audit(
    sampler: Sampler,
    captions: str | Path | Sequence[Prompt | str],
    out: str | Path,
    settings: Settings = Settings(),
    ordinary: str | Path | Sequence[str] | None = None,
    calibration: Calibration | str | Path | None = None,
    training_images: str | Path | Sequence[Path] = (),
    model: str | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Audit captions into the folder `out`; returns the rows of `audit.csv`, the worst caption first.

    captions: a file or folder as for `read_captions`, the prompts that it returns, or a list of captions.
    ordinary: prompts that the model has not memorized, or a file of them; None: those that ship. They are measured, unless the
              calibration has such gaps: it must be of this model, these steps and this scale, and `settings.noises` must be 1.
              Then a warning says that given prompts are not used. Measured gaps are kept in the user's cache for later audits.
    calibration: a Calibration, its file, or the name of a pipeline that ships; None: no calibration.
    training_images: a folder, or files, beside the captions' own images.
    model:    what run.json calls the sampler's model; None: where it was loaded from.

    Raises ValueError, before any work, for what does not fit, and for a folder that holds something else.
    """
    out, model = Path(out), sampler.source if model is None else model
    asked, own = _captions(captions, settings.on_error), ordinary is not None
    ordinary = _ordinary(ordinary, model)
    calibration = Calibration.load(calibration) if isinstance(calibration, str | Path) else calibration
    images = _images(asked, images_in(training_images) if isinstance(training_images, str | Path) else training_images)
    runs = _runs(sampler, settings, calibration, progress)
    first = settings.looked(runs.steps)
    known = None if calibration is None else _of_calibration(calibration, runs, first, settings.noises)
    if known is None and len(ordinary) < 2:
        raise ValueError(
            f"ordinary must be two prompts at least, and a hundred or more for small p-values; got {len(ordinary)}"
        )
    if known is not None and own:
        log.warning("the %d ordinary prompts are not measured: the calibration has gaps of its own", len(ordinary))
    threshold, index = _verdicts(settings, calibration, sampler, images)
    run = _run(model, asked, known or ordinary, settings, runs)
    open_folder(out, run, ("model",))  # the weights identify the model, whatever its path

    reference = known or _measured(runs, first, ordinary, settings.noises, out, _cached(run))
    places = {prompt.id: i for i, prompt in enumerate(asked)}

    def task(id: str, number: int) -> Task:
        """Return a caption with `number` seeds, which depend only on its place."""
        return id, asked[places[id]].text, [settings.seed + places[id] + k * len(asked) for k in range(number)]

    lines = first_gaps(runs, first, [task(id, settings.noises) for id in places], out / "gaps.jsonl", "captions")
    rows = ranked(asked, lines, reference, settings.rate)
    worst = [row["id"] for row in rows if row["status"] == "ok"][: settings.verify]
    verify = Verification(runs, out, reference.gap, threshold, index)
    found = verify([task(id, settings.seeds) for id in worst]) if worst else {}
    rows = [verdict(row, found.get(row["id"], [])) for row in rows]
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **run}
    record |= ranked_record(rows, lines, reference, settings.rate)
    record |= verified_record(found, len(worst) * settings.seeds, threshold, index)
    record |= {"training_images": len(images), "without_caption": len(images) - len(_images(asked))}
    _write(out, record, rows, found, {prompt.id: prompt.image for prompt in asked})
    return rows


def _captions(given: str | Path | Sequence[Prompt | str], on_error: str) -> list[Prompt]:
    if isinstance(given, str | Path):
        return read_captions(given, every=True, on_error=on_error)
    return [Prompt(f"{i:04d}", one) if isinstance(one, str) else one for i, one in enumerate(given)]


def _ordinary(given: str | Path | Sequence[str] | None, model: str) -> Sequence[str]:
    if given is None or isinstance(given, str | Path):
        return [job.prompt for job in read_prompts(ordinary_prompts(model) if given is None else Path(given))]
    return given


def _runs(sampler: Sampler, settings: Settings, calibration: Calibration | None, progress: bool) -> PlainRuns:
    """Return how captions are sampled."""
    steps, scale = steps_and_scale(sampler, calibration, settings.steps, settings.scale)
    return PlainRuns(sampler, steps, scale, settings.batch_size or memory.batch_size(sampler.model, *sampler.size()), progress)


def _images(captions: Sequence[Prompt], more: Sequence[Path] = ()) -> list[Path]:
    """The captions' own images, then the others; each file once."""
    found: dict[Path, Path] = {}
    for path in (*(prompt.image for prompt in captions if prompt.image), *more):
        found.setdefault(path.resolve(), path)
    return list(found.values())


def _of_calibration(calibration: Calibration, runs: PlainRuns, first: int, noises: int) -> Reference | None:
    """Return the gaps of ordinary captions in a calibration, if its pictures are made as the captions' are; else None."""
    alike = calibration.made_on(runs.sampler) and calibration.has(runs.sampler.solver(runs.steps).levels)
    alike = alike and calibration.scale == runs.scale and noises == 1
    if not (alike and first <= min(map(len, calibration.first_gaps))):
        return None
    ones = (1.0,) * first  # its first gaps are relative to the usual ones
    ordinary = tuple(statistic([gaps[:first]], ones) for gaps in calibration.first_gaps)
    return Reference(calibration.gap[:first], ordinary, "the calibration")


def _measured(runs: PlainRuns, first: int, ordinary: Sequence[str], noises: int, out: Path, cached: Path) -> Reference:
    """Return the gaps of ordinary captions, measured here, or read from the user's cache if an earlier audit measured them."""
    count, path = len(ordinary), out / "ordinary.jsonl"
    tasks = [(f"{j:04d}", text, [FIRST_SEED + j + k * count for k in range(noises)]) for j, text in enumerate(ordinary)]
    if not path.exists() and cached.is_file():
        _copy(cached, path)
    every = first_gaps(runs, first, tasks, path, "ordinary prompts, once a model")
    lines = [line for line in every.values() if line["status"] == "ok"]
    if len(lines) < 2:
        raise ValueError(f"{len(lines)} of {count} ordinary prompts could be measured: see {str(path)!r}")
    if len(lines) == len(every):
        with suppress(OSError):  # without a cache the next audit measures again
            cached.parent.mkdir(parents=True, exist_ok=True)
            _copy(path, cached)
    usual = tuple(median(noise[k] for line in lines for noise in line["gaps"]) for k in range(first))
    if min(usual) <= 0:
        raise ValueError("the usual noise gap is 0: the model takes no notice of prompts")
    return Reference(usual, tuple(statistic(line["gaps"], usual) for line in lines), "measured here")


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as part:
        shutil.copyfile(source, part)


def _cached(run: dict[str, Any]) -> Path:
    """Return the file in the user's cache for the gaps of ordinary prompts under the settings of a run."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "basinescape"
    decides = {name: value for name, value in run.items() if name not in ("model", "captions", "captions_sha256", "seed")}
    return home / f"ordinary-{_digest(decides)}.jsonl"


def _verdicts(
    settings: Settings, calibration: Calibration | None, sampler: Sampler, images: Sequence[Path]
) -> tuple[float, TrainingImages | None]:
    """Return (the threshold of the basin score, the index of the training images or None); no index if nothing is verified.

    Raises ValueError for a model whose pictures cannot be judged.
    """
    if not settings.verify:
        return THRESHOLD, None
    basin_score.Probe.of(sampler.scheduler)
    threshold = THRESHOLD if calibration is None else calibration.threshold(RATE)
    return threshold, TrainingImages(images, settings.similarity, settings.threshold, settings.on_error) if images else None


def _run(
    model: str, captions: Sequence[Prompt], ordinary: Reference | Sequence[str], settings: Settings, runs: PlainRuns
) -> dict[str, Any]:
    """Return the contents of run.json: what decides gaps, scores and pictures.

    The number of verified captions is not among them, nor are the training images, with which pictures are compared each time.
    """
    sampler = runs.sampler
    return {
        "model": model,
        "weights_sha256": weights_sha256(sampler.pipe),
        "captions": len(captions),
        "captions_sha256": _digest([(prompt.id, prompt.text) for prompt in captions]),
        "ordinary_sha256": _digest([ordinary.gap, ordinary.ordinary] if isinstance(ordinary, Reference) else list(ordinary)),
        "steps": runs.steps,
        "scale": runs.scale,
        "first_steps": settings.looked(runs.steps),
        "noises": settings.noises,
        "seed": settings.seed,
        "size": list(sampler.size()),
        "options": {name: str(value) for name, value in sampler.options.items()},
        **sampler.provenance,
    }


def _write(
    out: Path,
    record: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    found: dict[str, list[dict[str, Any]]],
    images: dict[str, Path | None],
) -> None:
    write_csv(out / "audit.csv", rows)
    with atomic_write(out / "audit.json") as part:
        part.write_bytes(json_bytes(record, indent=1) + b"\n")
    audit_page.write(out, record, images, rows, found)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()
