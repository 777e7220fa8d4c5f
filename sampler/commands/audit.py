"""`basinescape audit`: find the captions that a model reproduces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .quiet import quieten

if TYPE_CHECKING:
    from ..auditing.audit import Settings


def audit(
    captions: Annotated[
        Path,
        typer.Option(
            help="perhaps with their images: a folder with .txt files or metadata.jsonl, or a .jsonl, .json, .csv, ... file"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder for audit.csv, audit.html, audit.json and the pictures")],
    images: Annotated[Path | None, typer.Option(help="folder of the images that a file of captions names")] = None,
    model: options.Model = "tiny",
    calibration: Annotated[str | None, typer.Option(help="default calibration.json in the model's folder, if any")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="ordinary ones, measured once if no calibration has their gaps; default 200 that ship")
    ] = None,
    rate: Annotated[float, typer.Option(help="of the flagged captions, the share that may be ordinary")] = 0.1,
    noises: Annotated[int, typer.Option(help="initial noises a caption; above 1, ordinary prompts are measured too")] = 1,
    first_steps: Annotated[
        int | None, typer.Option(help="steps that are looked at, 1 to 10; default a tenth of all, as a guard")
    ] = None,
    verify: Annotated[int, typer.Option(help="sample so many of the worst captions, and judge their pictures")] = 0,
    seeds: Annotated[int, typer.Option(help="with --verify: pictures a caption")] = 4,
    training_images: Annotated[
        Path | None, typer.Option(help="with --verify: training images beside the captions' own, anywhere in a folder")
    ] = None,
    similarity: options.Similarity = None,
    threshold: options.Threshold = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps of a whole run; default as calibrated")] = None,
    scale: Annotated[float | None, typer.Option(help="guidance scale; default as calibrated")] = None,
    scheduler: options.Scheduler = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    option: options.Option = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    allow_pickle: options.AllowPickle = False,
    on_error: options.OnError = "stop",
    progress: options.Progress = True,
) -> None:
    """Find the captions that a model has memorized; with --verify, whether its pictures of them are copies.

    Neither needs training images: where there are some, pictures are compared with them too.
    """
    quieten()
    from ..auditing.audit import Settings, audit
    from ..calibration.baseline import ordinary_prompts
    from ..data.captions import read_captions
    from ..data.pictures import images_in
    from ..data.prompts import read_prompts

    settings = Settings(
        rate, noises, first_steps, verify, seeds, seed, similarity or None, threshold, on_error, steps, scale, batch_size
    )
    found = read_captions(captions, images=images, every=True, on_error=on_error)
    training = images_in(training_images) if training_images else ()
    ordinary = [job.prompt for job in read_prompts(prompts or ordinary_prompts(model))]
    known = options.found(model, calibration)
    known = options.of_enough(known, calibration) if verify else known
    loading: dict[str, Any] = {"allow_pickle": allow_pickle, "device": device, "dtype": dtype}
    sampler = options.sampler(model, known, scheduler, option, **loading)
    rows = audit(sampler, found, out, settings, ordinary, known, training, model, progress)
    _conclude(rows, out, settings)


def _conclude(rows: Sequence[dict[str, Any]], out: Path, settings: Settings) -> None:
    """Say what came out. Raises typer.Exit(1) where something failed."""
    flagged = sum(row["flagged"] for row in rows)
    typer.echo(f"{len(rows)} captions, {flagged} flagged: {out / 'audit.csv'}, {out / 'audit.html'}")
    verified = [row for row in rows if row["n"] is not None]
    for column, said in (("suspects", "made pictures that look like copies"), ("copies", "made copies of training images")):
        found = [row[column] for row in verified if row[column] is not None]
        if found:
            typer.echo(f"of the worst {len(found)}, {sum(map(bool, found))} {said}: {sum(found)} of {_pictures(verified)}")
    failed = [row["id"] for row in rows if row["status"] != "ok"]
    missing = min(settings.verify, len(rows) - len(failed)) * settings.seeds - _pictures(verified)
    if failed:
        typer.echo(f"{len(failed)} captions failed ({', '.join(failed[:5])}): see status in audit.csv", err=True)
    if missing:
        typer.echo(f"{missing} pictures failed: the same command makes them again", err=True)
    if failed or missing:
        raise typer.Exit(1)


def _pictures(rows: Sequence[dict[str, Any]]) -> int:
    return sum(row["n"] for row in rows)
