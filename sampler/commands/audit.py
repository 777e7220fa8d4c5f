"""`basinescape audit`: find the captions that a model reproduces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from . import model_loading, options
from .quiet import quieten
from .runs import going_on

if TYPE_CHECKING:
    from ..auditing.caption_audit import Settings

EXAMPLE = """
  basinescape audit --model my-model --captions training/ --verify 9 --out audit"""


@dataclass(frozen=True)
class What:
    """Which captions, how they are ranked, and where that is written."""

    TITLE: ClassVar = "What"
    captions: Annotated[
        Path,
        typer.Option(
            help="perhaps with their images: a folder with .txt files or metadata.jsonl, or a .jsonl, .json, .csv, ... file"
        ),
    ]
    out: Annotated[Path, typer.Option(help="folder for audit.csv, audit.html, audit.json and the pictures")]
    images: Annotated[Path | None, typer.Option(help="folder of the images that a file of captions names")] = None
    prompts: Annotated[
        Path | None, typer.Option(help="ordinary ones, measured once if no calibration has their gaps; default 200 that ship")
    ] = None
    rate: Annotated[float, typer.Option(help="of the flagged captions, the share that may be ordinary")] = 0.1
    noises: Annotated[int, typer.Option(help="initial noises a caption; above 1, ordinary prompts are measured too")] = 1
    first_steps: Annotated[
        int | None, typer.Option(help="steps that are looked at, 1 to 10; default a tenth of all, as a guard")
    ] = None
    on_error: options.OnError = "stop"
    progress: options.Progress = True


@dataclass(frozen=True)
class Verify:
    """Which captions are sampled to the end, and how their pictures are judged."""

    TITLE: ClassVar = "Verification"
    verify: Annotated[int, typer.Option(help="sample so many of the worst captions, and judge their pictures")] = 0
    seeds: Annotated[int, typer.Option(help="with --verify: pictures a caption")] = 4
    training_images: Annotated[
        Path | None, typer.Option(help="with --verify: training images beside the captions' own, anywhere in a folder")
    ] = None
    similarity: options.Similarity = None
    threshold: options.Threshold = None


@dataclass(frozen=True)
class Model(options.ModelOptions):
    """Which model, and how it is sampled."""

    calibration: Annotated[str | None, typer.Option(help="default calibration.json in the model's folder, if any")] = None
    steps: Annotated[int | None, typer.Option(help="denoising steps of a whole run; default as calibrated")] = None
    scale: Annotated[float | None, typer.Option(help="guidance scale; default as calibrated")] = None
    seed: options.Seed = 0
    batch_size: options.BatchSize = None


def audit(what: What, model: Model, verification: Verify) -> None:
    """Find the captions that a model has memorized; with --verify, whether its pictures of them are copies.

    Neither needs training images: where there are some, pictures are compared with them too.
    """
    quieten()
    from ..auditing.caption_audit import Settings, audit
    from ..data.captions import read_captions
    from ..data.pictures import images_in
    from ..data.prompts import read_prompts

    judged: dict[str, Any] = {name: getattr(verification, name) for name in ("verify", "seeds", "threshold")}
    judged |= {"similarity": verification.similarity or None}
    sampled: dict[str, Any] = {name: getattr(model, name) for name in ("steps", "scale", "seed", "batch_size")}
    settings = Settings(what.rate, what.noises, what.first_steps, on_error=what.on_error, **judged, **sampled)
    captions = read_captions(what.captions, images=what.images, every=True, on_error=what.on_error)
    if verification.training_images and not verification.verify:
        raise ValueError("training_images are compared with pictures, and verify is 0, so none is made: give --verify N")
    training = images_in(verification.training_images) if verification.training_images else ()
    ordinary = [job.prompt for job in read_prompts(what.prompts)] if what.prompts else None
    known = model_loading.of_enough(model_loading.found(model.model, model.calibration), model.calibration)
    sampler = model_loading.sampler(model.model, known, model.scheduler, model.option, **model.loading)
    with going_on(what.out):
        rows = audit(sampler, captions, what.out, settings, ordinary, known, training, model.model, what.progress)
    _conclude(rows, what.out, settings)


def _conclude(rows: Sequence[dict[str, Any]], out: Path, settings: Settings) -> None:
    """Print the results. Raises typer.Exit(1) if something failed."""
    flagged = sum(row["flagged"] for row in rows)
    typer.echo(f"{flagged} of {len(rows)} captions are flagged as memorized: {out / 'audit.csv'}, {out / 'audit.html'}")
    verified = [row for row in rows if row["n"] is not None]
    pictures = sum(row["n"] for row in verified)
    for column, said in (("suspects", "look like copies"), ("copies", "are copies of training images")):
        found = [row[column] for row in verified if row[column] is not None]
        if found:
            of = f", made from {sum(map(bool, found))} of the {len(found)} captions with the largest gaps" if any(found) else ""
            typer.echo(f"{sum(found)} of {pictures} pictures {said}{of}")
    failed = [row["id"] for row in rows if row["status"] != "ok"]
    missing = min(settings.verify, len(rows) - len(failed)) * settings.seeds - pictures
    if failed:
        typer.echo(f"{len(failed)} captions failed ({', '.join(failed[:5])}): see status in audit.csv", err=True)
    if missing:
        typer.echo(f"{missing} pictures failed: the same command makes them again", err=True)
    if failed or missing:
        raise typer.Exit(1)
