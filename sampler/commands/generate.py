"""`basinescape generate`: an image for every prompt of a file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .quiet import quieten
from .runs import conclude, looked_at, shard_of, spread

if TYPE_CHECKING:
    from .. import Calibration, Guard, Guidance, Sampler
    from ..guidance.transitions import Rule


class Method(StrEnum):
    """How guidance is scheduled."""

    cfg = "cfg"
    delayed = "delayed"
    opposite = "opposite"
    guard = "guard"


class Where(StrEnum):
    """Where samples are made."""

    local = "local"
    ray = "ray"


def generate(
    prompts: Annotated[
        str,
        typer.Option(
            help='JSON Lines {"prompt", "id"?, "seed"?, "negative_prompt"?, "steps"?, "scale"?}, .json, .csv, .tsv, .parquet, '
            ".txt with a prompt a line, each perhaps .gz; hf:DATASET, or -"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder for images, manifest.jsonl and run.json")],
    model: options.Model = "tiny",
    guidance: Annotated[Method | None, typer.Option(help="plain, delayed, opposite or guarded; default guard")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="thresholds at a stated false-alarm rate; default calibration.json in the model's folder")
    ] = None,
    rule: Annotated[str, typer.Option(help="how predictions combine: cfg, rescale, cfg-zero, apg, tcfg, ...")] = "cfg",
    rule_option: Annotated[list[str] | None, typer.Option(help="of the rule, as phi=0.5; may be repeated")] = None,
    scale: Annotated[
        float | None, typer.Option(help="guidance scale (after the transition); default as calibrated, else the model's own")
    ] = None,
    before: Annotated[float, typer.Option(help="weight before the transition, with --guidance delayed")] = 0.0,
    opposite_scale: Annotated[float, typer.Option(help="with --guidance opposite: weight -N before the transition")] = 2.0,
    until: Annotated[
        str | None,
        typer.Option(
            help="transition of delayed and opposite guidance: a timestep; 'auto', the first minimum of the noise gap; or "
            "'settled', when that is ordinary; default the calibration's timestep, else 500"
        ),
    ] = None,
    earliest: Annotated[int, typer.Option(help="with --until auto: first step that may be the transition")] = 2,
    latest: Annotated[int | None, typer.Option(help="with --until auto: step at which guidance starts in any case")] = None,
    restart: Annotated[
        str | None, typer.Option(help="LOW,HIGH,TIMES: at timestep LOW go back to HIGH by new noise, so many times")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default as calibrated, else the model's own")] = None,
    scheduler: options.Scheduler = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    height: Annotated[int | None, typer.Option(help="pixels; default the model's own")] = None,
    width: Annotated[int | None, typer.Option(help="pixels; default the model's own")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="of the prompts that have none of their own")] = None,
    clip_skip: Annotated[int | None, typer.Option(help="how many of the text encoder's last layers to leave out")] = None,
    option: options.Option = None,
    training_images: Annotated[
        Path | None, typer.Option(help="folder: each image's nearest one there goes to the manifest, and copies are marked")
    ] = None,
    similarity: options.Similarity = None,
    threshold: options.Threshold = None,
    attention: options.Attention = "sdpa",
    dtype: options.Dtype = None,
    device: options.Device = None,
    allow_pickle: options.AllowPickle = False,
    compile: options.Compile = False,
    capture: options.Capture = False,
    format: Annotated[str, typer.Option(help="png, jpg, webp, latents, or many a file: parquet, webdataset")] = "png",
    on_error: options.OnError = "stop",
    engine: Annotated[Where, typer.Option(help="local, or ray: a worker on every GPU of the cluster")] = "local",
    workers: Annotated[int | None, typer.Option(help="with --engine ray; default one a GPU")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: the i-th of n parts, from 0, in OUT/shard-i-of-n; see merge")] = None,
    log: Annotated[str, typer.Option(help="auto (a bar in a terminal, else lines), plain, json or none")] = "auto",
    metrics: Annotated[int | None, typer.Option(help="port on which Prometheus finds the same numbers")] = None,
    metrics_host: Annotated[str, typer.Option(help="address of that port; 0.0.0.0: reached from other machines")] = "127.0.0.1",
    progress: Annotated[bool, typer.Option(help="--no-progress is --log none")] = True,
) -> None:
    """Make an image for every prompt of a file. The same command goes on where it was stopped."""
    from ..data.prompts import Prompts

    part, shown = shard_of(shard), looked_at(log, metrics, metrics_host, progress)
    jobs = Prompts(prompts, seed, on_error)
    quieten()
    from .. import Guidance
    from ..bulk.generate import generate

    given = {"rule": rule, **options.named("rule_option", rule_option, float)}
    given |= {"restart": _restart(restart)} if restart else {}
    Guidance.cfg(7.5 if scale is None else scale, **given)  # raises for what no guidance can be
    if until not in (None, "auto", "settled"):
        _timestep(until)
    copies = None
    if training_images is not None:
        from ..audit.index import Copies
        from ..data.pictures import images_in

        copies = Copies(training_images, images_in(training_images), similarity or None, threshold, on_error)
    known = options.found(model, calibration)
    loading = {"allow_pickle": allow_pickle, "compile": compile, "capture": capture}
    load = None
    if engine == Where.ray:
        scheduler = options.scheduler_of(scheduler, known)
        load, device, dtype = spread((model, device, dtype, scheduler, attention), loading, workers)
    loading |= {"device": device, "dtype": dtype, "attention": attention}
    sampler = options.sampler(model, known, scheduler, option, height, width, **loading)
    steps, scale = options.steps_and_scale(sampler, known, steps, scale)
    chosen = guidance or (Method.delayed if until or restart else Method.guard)  # delayed, where options of it are given
    known = options.of_enough(known, calibration) if chosen == Method.guard else known
    plan = _plan(
        chosen,
        sampler=sampler,
        calibration=None if known is None else known.fitted(sampler, steps),
        scale=scale,
        before=before,
        opposite_scale=opposite_scale,
        until=until,
        minimum={"earliest": earliest, "latest": latest},
        given=given,
    )
    texts = {"clip_skip": clip_skip, "negative_prompt": negative_prompt}
    more = {"progress": shown, "format": format, "shard": part, "load": load, "workers": workers, "copies": copies}
    conclude(generate(sampler, jobs, out, plan, model, steps, batch_size, **texts, **more), out)


def _plan(
    method: Method,
    sampler: Sampler,
    calibration: Calibration | None,
    scale: float,
    before: float,
    opposite_scale: float,
    until: str | None,
    minimum: dict[str, int | None],
    given: dict[str, Any],
) -> Guidance | Guard:
    """The guidance that was asked for. Raises ValueError where it does not fit the rest."""
    from .. import Guidance

    if method == Method.cfg:
        return Guidance.cfg(scale, **given)
    if method == Method.guard:
        if until is not None:
            raise ValueError(f"until is {until!r}, which a guard finds by itself: leave it out, or take --guidance delayed")
        fits = calibration is not None and calibration.scale == scale
        if calibration is not None and not fits:
            typer.echo(f"the calibration is of scale {calibration.scale:g}, not {scale:g}: the guard goes without it", err=True)
        return Guidance.guard(scale, calibration if fits else None, **given)
    transition = _transition(until, minimum, calibration)
    if method == Method.delayed:
        return Guidance.delayed(scale, until=transition, before=before, **given)
    return Guidance.opposite(opposite_scale, scale=scale, until=transition, **given)


def _transition(until: str | None, minimum: dict[str, int | None], calibration: Calibration | None) -> Rule:
    """Where guidance starts: as asked for, else where the calibration says, else the paper's timestep."""
    from .. import At, FirstMinimum
    from ..calibration.baseline import STATIC

    if until == "auto":
        return FirstMinimum(**minimum)
    if until == "settled":
        if calibration is None:
            raise ValueError(
                "until 'settled' needs a calibration, which `basinescape calibrate --settled` makes, and the model has none"
            )
        return calibration.settled()
    if until is not None:
        return At(_timestep(until))
    return At(STATIC if calibration is None or calibration.baseline is None else calibration.baseline.transition)


def _timestep(until: str) -> float:
    try:
        return float(until)
    except ValueError as error:
        raise ValueError(f"until must be a timestep, 'auto' or 'settled', got {until!r}") from error


def _restart(text: str) -> tuple[float, float, int]:
    try:
        low, high, times = text.split(",")
        return float(low), float(high), int(times)
    except ValueError as error:
        raise ValueError(f"restart must be LOW,HIGH,TIMES, two timesteps and a number, as 300,500,2; got {text!r}") from error
