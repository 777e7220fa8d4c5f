"""`basinescape judge`: find the pictures of a set that look like copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .quiet import quieten
from .runs import shard_of

if TYPE_CHECKING:
    from .. import Calibration, Sampler


def judge(
    images: Annotated[
        str,
        typer.Option(
            help="with their prompts: a folder with .txt files, metadata.jsonl or a run of generate; .jsonl, .tar or .parquet; "
            "PNG files that hold their prompt; or a pattern of such names"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder for judge.csv and judge.html")],
    model: Annotated[
        str | None, typer.Option(help="that made the pictures: no other can judge them; default that of a run of generate")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="score above which a picture is suspect; default as calibrated, else 0.3")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="default calibration.json in the model's folder, if any")] = None,
    rate: Annotated[
        float | None, typer.Option(help="with a calibration: share of ordinary pictures that are suspect; default a guard's")
    ] = None,
    probes: Annotated[int, typer.Option(help="noises that a picture is judged by, a call of the network each")] = 2,
    seed: Annotated[int, typer.Option(help="of the noises, the same for every picture")] = 0,
    scheduler: options.Scheduler = None,
    batch_size: Annotated[
        int | None, typer.Option(help="pictures judged together; default what the GPU's memory holds, 16 on a CPU")
    ] = None,
    option: options.Option = None,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: the i-th of n parts, from 0, in OUT/shard-i-of-n; then once without it, to put them together"),
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    allow_pickle: options.AllowPickle = False,
    on_error: options.OnError = "stop",
    progress: options.Progress = True,
) -> None:
    """Find the pictures of a set that look like copies, by the model alone. The same command goes on where it was stopped.

    Scores differ a little from those in generate's manifest, which are of the latents before they are decoded.
    """
    part = shard_of(shard)
    quieten()
    from .. import Sampler
    from ..auditing.judge import Settings, judge

    if threshold is not None and rate is not None:
        raise ValueError("threshold and rate say the same: give one of the two")
    model = _model(model, Path(images))
    known = options.found(model, calibration)
    given = options.of_call(option)
    size = {name: given.pop(name, None) for name in ("height", "width")}
    Settings(probes=probes, seed=seed, batch_size=batch_size)  # raises for what cannot be, before the model is loaded
    loading: dict[str, Any] = {"allow_pickle": allow_pickle, "device": device, "dtype": dtype}
    sampler = Sampler.from_pretrained(model, scheduler=options.scheduler_of(scheduler, known), **loading)
    sampler = sampler.using(**({} if known is None else known.settings.get("options", {}))).using(**given)
    if threshold is None:
        threshold = _threshold(sampler, options.of_enough(known, calibration), rate)
    settings = Settings(threshold, probes, seed, **size, batch_size=batch_size, on_error=on_error)
    rows = judge(sampler, images, out, settings, model, part, progress)
    _conclude(rows, out / f"shard-{part[0]}-of-{part[1]}" if part else out, model)


def _conclude(rows: Sequence[dict[str, Any]], home: Path, model: str) -> None:
    """Say what came out. Raises typer.Exit(1) where a picture could not be judged."""
    suspect = sum(bool(row["suspect"]) for row in rows)
    typer.echo(f"{suspect} of {len(rows)} pictures are suspect, as {model} judges: {home / 'judge.csv'}, {home / 'judge.html'}")
    failed = [row["id"] for row in rows if row["status"] != "ok"]
    if failed:
        typer.echo(f"{len(failed)} failed ({', '.join(failed[:5])}): see status in judge.csv", err=True)
        raise typer.Exit(1)


def _model(given: str | None, images: Path) -> str:
    """The model that is given, else that of the run of `generate` that the pictures are; says where the two differ."""
    from ..runs.folder import read_settings

    runs = [folder for folder in (images, images.parent) if (folder / "run.json").is_file()]
    made = read_settings(runs[0]).get("model") if runs else None
    if given is None and made is None:
        raise ValueError("model must be given: the one that made the pictures, since no other can judge them")
    if given and made and Path(given).name != Path(made).name:
        typer.echo(
            f"{made} made the pictures, and {given} judges them: scores mean nothing unless these are one model", err=True
        )
    return str(given or made)


def _threshold(sampler: Sampler, known: Calibration | None, rate: float | None) -> float:
    """The calibration's at the rate, else the one for all models. Raises ValueError for a rate without a calibration."""
    from ..guidance.guard import RATE, THRESHOLD

    if known is None:
        if rate is not None:
            raise ValueError("rate needs a calibration, which `basinescape calibrate` makes, and the model has none")
        return THRESHOLD
    return known.fitted(sampler, known.steps).threshold(RATE if rate is None else rate)
