"""`basinescape audit`: which captions does the model reproduce?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..quiet import quieten
from . import options


def audit(
    captions: Annotated[
        Path,
        typer.Option(help="with their images: a folder with .txt files or metadata.jsonl, or a .jsonl, .json, .csv, ... file"),
    ],
    out: Annotated[Path, typer.Option(help="folder for audit.csv, audit.html and the images")],
    model: options.Model = "tiny",
    calibration: Annotated[str | None, typer.Option(help="default calibration.json in the model's folder")] = None,
    first_steps: Annotated[int | None, typer.Option(help="steps that are looked at, 1 to 10; default as calibrated")] = None,
    noises: Annotated[int, typer.Option(help="initial noises a caption; the largest score counts")] = 2,
    rate: Annotated[float | None, typer.Option(help="share of ordinary captions flagged; default as calibrated")] = None,
    verify: Annotated[int, typer.Option(help="sample so many of the worst captions, and look for their training images")] = 0,
    seeds: Annotated[int, typer.Option(help="with --verify: images a caption")] = 4,
    training_images: Annotated[
        Path | None, typer.Option(help="with --verify: more training images, anywhere in a folder")
    ] = None,
    similarity: options.Similarity = None,
    threshold: options.Threshold = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps of a whole run; default as calibrated")] = None,
    scheduler: options.Scheduler = "own",
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    option: options.Option = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    allow_pickle: options.AllowPickle = False,
    on_error: options.OnError = "stop",
    progress: options.Progress = True,
) -> None:
    """Find the captions whose training images a model reproduces."""
    quieten()
    from basinescape import Calibration, Sampler
    from basinescape.data.captions import read_captions
    from basinescape.data.pictures import images_in

    from ..evaluation.audit import Settings, audit

    found = read_captions(captions, every=True, on_error=on_error)
    settings = Settings(first_steps, noises, rate, verify, seeds, seed, similarity or None, threshold, on_error)
    more = images_in(training_images) if training_images else []
    beside = options.found(model, calibration)
    if beside is None:
        raise ValueError(
            f"an audit needs to know what is ordinary on the model: basinescape calibrate --model {model}, "
            "and --calibration FILE where that does not write into the model's folder"
        )
    calibrated = Calibration.load(beside)
    sampler = Sampler.from_pretrained(model, device, dtype, scheduler, allow_pickle=allow_pickle)
    sampler = sampler.using(**options.of_call(option))
    size = options.batch_size(sampler, batch_size)
    rows = audit(sampler, model, found, out, calibrated, steps or calibrated.steps, settings, more, size, progress)
    flagged = sum(row["flagged"] for row in rows)
    typer.echo(f"{len(rows)} captions, {flagged} flagged: {out / 'audit.csv'}, {out / 'audit.html'}")
    checked = [row for row in rows if row["copies"] is not None]
    if checked:
        copied = [row for row in checked if row["copies"]]
        images = sum(row["copies"] for row in copied)
        typer.echo(f"of the worst {len(checked)}, {len(copied)} reproduce a training image, in {images} images")
    failed = [row["id"] for row in rows if row["status"] != "ok"]
    if failed:
        typer.echo(f"{len(failed)} failed ({', '.join(failed[:5])}): see status in audit.csv", err=True)
        raise typer.Exit(1)
