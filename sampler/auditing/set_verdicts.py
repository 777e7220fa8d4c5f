"""Judges pictures that exist already: which of them look like copies of training images? The model alone decides.

The autoencoder encodes each picture. The picture is judged with the prompt it was made from, by its basin score (see
`detection.basin_score`), with the same noises as every other. So its score depends on nothing else in the set. It differs, near
the threshold by up to 0.2, from the score in a manifest of `generate`, which is that of the latents before they are decoded,
with noises from the picture's own seed.

The folder gets `scores.jsonl` (written batch by batch, so that a stopped run can be resumed), and `judge.csv` and `judge.html`,
with the most suspect first. A picture is judged again if it or its prompt changed. A shard works in a folder of its own, and
the same run without a shard puts the shards together.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappush, heappushpop
from itertools import islice
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import checks
from ..data.prompted import Prompted, about, prompted
from ..data.tables import write_csv
from ..detection import basin_score
from ..guidance.guard import PROBES, THRESHOLD
from ..models import memory
from ..runs.atomic import atomic_write
from ..runs.batch_retry import halving
from ..runs.jsonl_journal import Journal, read_lines
from ..runs.jsontext import json_bytes
from ..runs.provenance import weights_sha256
from ..runs.run_folder import differences, open_folder, read_settings
from ..sampler import Sampler
from . import judge_page
from .html_images import inside

log = logging.getLogger(__name__)
SCORES, SHARDS = "scores.jsonl", "shard-*-of-*"
SHOWN = 200  # pictures on the page; judge.csv has them all
FEW, MANY = 0.5, 1.5  # shares of a model's pixels between which a picture was probably not scaled
HELD = 4  # batches whose pictures are in memory at a time, so that pictures of one size can share a batch
FREE = ("model",)  # a field of run.json that may differ: the weights identify the model, whatever its path
NOT_FINITE = "failed: its score is not finite"
Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How pictures are judged.

    threshold: the basin score above which a picture is suspect. probes: noises per picture. seed: of the noises, for every one.
    height, width: what all pictures are resized to; None: each keeps its size, or gets the nearest that the model can make.
    usual: the (height, width) in which the model makes pictures, to tell scaled ones; None: its own.
    batch_size: pictures judged together; None: as many as a GPU's free memory holds, 16 on a CPU.
    on_error: what happens at a row, a member or a file that is wrong; see `data.rows.Faults`.

    Raises ValueError for anything else.
    """

    threshold: float = THRESHOLD
    probes: int = PROBES
    seed: int = 0
    height: int | None = None
    width: int | None = None
    batch_size: int | None = None
    on_error: str = "stop"
    usual: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        checks.finite("threshold", self.threshold)
        checks.at_least_one("probes", self.probes)
        checks.at_least("seed", self.seed, 0)
        if self.batch_size is not None:
            checks.at_least_one("batch_size", self.batch_size)


def judge(
    sampler: Sampler,
    images: str | Path,
    out: str | Path,
    settings: Settings = Settings(),
    model: str | None = None,
    shard: tuple[int, int] | None = None,
    progress: bool = True,
) -> list[Line]:
    """Judge the pictures of `images` into the folder `out`; returns the rows of `judge.csv`.

    images: see `prompted`. model: what run.json calls the sampler's model; None: where it was loaded from.
    shard: (i, n): judge only every n-th picture, from the i-th on, in the folder `out`/shard-i-of-n.

    A row has id, file, prompt, score, suspect, and status: "ok", or "failed: " and why there is no score. A failed picture is
    judged again when the run is started again. The most suspect come first, and those without a score last.

    Raises ValueError for settings that do not fit, for a folder that holds something else, for what `prompted` refuses, and if
    there are no pictures; FileNotFoundError if there is no such source.
    """
    _check(sampler, settings)
    found = prompted(images, settings.on_error)
    size = settings.batch_size or memory.batch_size(sampler.model, *sampler.size())
    model = sampler.source if model is None else model
    run = _run(sampler, model, images, settings)
    home = _opened(Path(out), run, shard)
    judging, rows, total = Judging(sampler, settings, size), [], about(images)
    if total is not None and shard is not None:
        total = len(range(shard[0], total, shard[1]))
    with (
        Journal(home / SCORES, lambda line: line["id"] if line.get("status") == "ok" else None) as journal,
        tqdm(total=total, desc="judging", unit=" pictures", disable=not progress) as bar,
    ):
        known = {line["id"]: line for line in _scored(home)}
        mine = islice(found, *((None,) if shard is None else (shard[0], None, shard[1])))
        while part := list(islice(mine, HELD * size)):
            lines = judging(part, known)
            journal.append(*(line for line in lines if line != known.get(line["id"])))
            rows += [_row(line, settings.threshold) for line in lines]
            bar.update(len(lines))
    if judging.scaled:
        log.warning(
            "%d pictures are judged in less than half of the pixels that the model makes, %d x %d, or in more than %g times as "
            "many: a copy that was scaled may pass; judge pictures in the size they were made in",
            *(judging.scaled, *judging.usual, MANY),
        )
    if not rows and shard is None:  # a shard may have none
        raise ValueError(f"images {str(images)!r} have no pictures")
    rows.sort(key=lambda row: -_rank(row))
    if rows:
        write_csv(home / "judge.csv", rows)
        shown = {id: uri for _, id, uri in judging.worst}
        judge_page.write(home, run | {"images": str(images)}, rows, shown, settings.threshold)
    return rows


def _check(sampler: Sampler, settings: Settings) -> None:
    """Raises ValueError if no picture at all can be judged."""
    basin_score.Probe.of(sampler.scheduler)
    if "num_frames" in sampler.model.options:
        raise ValueError("the model makes videos: judge those by Sampler.judge, as lists of frames")
    if (settings.height, settings.width) != (None, None):
        sampler.size(settings.height, settings.width)


def _run(sampler: Sampler, model: str, images: str | Path, settings: Settings) -> dict[str, Any]:
    """Return the contents of run.json: what decides scores. The threshold may change, and shards may run on other devices."""
    how: dict[str, Any] = {"log_snr": basin_score.LOG_SNR, "probes": settings.probes, "seed": settings.seed}
    how |= {"height": settings.height, "width": settings.width, "options": dict(sampler.options)}
    where = {name: value for name, value in sampler.provenance.items() if name != "device"}
    return {"model": model, "judged": Path(images).name, **how, "weights": weights_sha256(sampler.pipe), **where}


def _opened(out: Path, run: dict[str, Any], shard: tuple[int, int] | None) -> Path:
    """Prepare and return the folder to work in: a shard has its own; a whole run uses `out`, which may hold its shards.

    Raises ValueError for a folder that holds something else.
    """
    if shard is not None:
        home = out / f"shard-{shard[0]}-of-{shard[1]}"
        open_folder(home, run | {"shard": list(shard)}, FREE)
        return home
    text = json_bytes(run, indent=2)
    shards = sorted(path.parent for path in out.glob(f"{SHARDS}/run.json"))
    for part in shards:
        if facts := differences(read_settings(part), json.loads(text), (*FREE, "shard")):
            raise ValueError(f"{str(part)!r} is a shard of another run ({facts}): choose another folder")
    if shards and not (out / "run.json").exists():
        with atomic_write(out / "run.json") as file:
            file.write_bytes(text + b"\n")
    open_folder(out, run, FREE)
    return out


def _scored(home: Path) -> Iterator[Line]:
    """Yield the lines of pictures that were judged earlier, in this folder and in the shards in it."""
    for path in [*sorted(home.glob(f"{SHARDS}/{SCORES}")), home / SCORES]:
        yield from (line for line in read_lines(path) if line.get("status") == "ok")


def _row(line: Line, threshold: float) -> Line:
    """A row of judge.csv."""
    score, status = line.get("score"), line["status"]
    suspect = status == NOT_FINITE or (None if score is None else basin_score.suspects(score, threshold))
    facts = {name: line.get(name) for name in ("id", "file", "prompt", "score")}
    return {**facts, "suspect": suspect, "status": status}


def _rank(line: Line) -> float:
    """Return a number that is larger for a more suspect picture: infinite if its score is not finite."""
    score = line.get("score")
    return score if score is not None else inf if line["status"] == NOT_FINITE else -inf


class Judging:
    """Judges pictures.

    worst: the most suspect pictures, for the page: a heap of (rank, id, small picture as a data URI).
    scaled: how many pictures are judged in far fewer or far more pixels than `usual`, (height, width), has.
    """

    def __init__(self, sampler: Sampler, settings: Settings, size: int):
        self.sampler, self.settings, self.size = sampler, settings, size
        self.worst: list[tuple[float, str, str]] = []
        self.scaled, self.usual = 0, settings.usual or sampler.size()

    def __call__(self, part: Sequence[Prompted], known: dict[str, Line]) -> list[Line]:
        """Return a line for each picture, in their order: the line in `known` if neither the picture nor its prompt changed."""
        lines: dict[str, Line] = {}
        waiting: list[tuple[Line, Image.Image]] = []
        opened: dict[str, Image.Image] = {}
        for one in part:
            line: Line = {"id": one.id, "file": one.file, "prompt": one.prompt}
            try:
                image = opened[one.id] = one.open()
                if one.prompt is None:
                    raise ValueError(f"no prompt: {one.reason}")
            except ValueError as error:
                lines[one.id] = line | {"status": f"failed: {checks.line(error)}"}
                continue
            width, height = self.settings.width or image.width, self.settings.height or image.height
            self.scaled += not FEW <= width * height / prod(self.usual) <= MANY
            line["sha256"] = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            earlier = known.get(one.id, {})
            if all(earlier.get(name) == line[name] for name in ("prompt", "sha256")):
                lines[one.id] = earlier | line
            else:
                waiting.append((line, image))
        for some, scores in halving(self._scores, waiting) if waiting else ():
            for k, (line, _) in enumerate(some):
                lines[line["id"]] = line | _verdict(scores if isinstance(scores, Exception) else scores[k])
        found = [lines[one.id] for one in part]
        for line in found:
            if "sha256" in line:
                self._keep(_rank(line), line["id"], opened[line["id"]])
        return found

    def _scores(self, waiting: Sequence[tuple[Line, Image.Image]]) -> list[float]:
        return self.sampler.model.finite(self._measured, waiting)[:, 0].tolist()

    def _measured(self, waiting: Sequence[tuple[Line, Image.Image]]) -> Tensor:
        """(n, 1) float32."""
        settings, images = self.settings, [image for _, image in waiting]
        how: dict[str, Any] = {name: getattr(settings, name) for name in ("probes", "height", "width")}
        how |= {"seeds": [settings.seed] * len(images), "batch_size": self.size}
        return self.sampler.judge(images, [line["prompt"] for line, _ in waiting], **how).score[:, None]

    def _keep(self, rank: float, id: str, image: Image.Image) -> None:
        if len(self.worst) < SHOWN:
            heappush(self.worst, (rank, id, inside(image)))
        elif rank > self.worst[0][0]:
            heappushpop(self.worst, (rank, id, inside(image)))


def _verdict(score: float | Exception) -> Line:
    """Return the fields of a line for a score, or for the exception in its place."""
    if isinstance(score, Exception):
        return {"status": f"failed: {checks.line(score)}"}
    return {"score": round(score, 5), "status": "ok"} if isfinite(score) else {"status": NOT_FINITE}
