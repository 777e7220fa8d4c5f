"""`basinescape generate`: an image for every prompt of a file."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..quiet import quieten
from . import options
from .runs import conclude, looked_at, shard_of, spread

if TYPE_CHECKING:
    from basinescape import Calibration, Guidance, Sampler
    from basinescape.transitions import Rule


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
    guidance: Annotated[
        Method | None, typer.Option(help="plain, delayed, opposite or guarded; default guard with a calibration, else delayed")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="of the guard; default calibration.json in the model's folder, see calibrate")
    ] = None,
    rule: Annotated[str, typer.Option(help="how predictions combine: cfg, rescale, cfg-zero, apg, tcfg, ...")] = "cfg",
    rule_option: Annotated[list[str] | None, typer.Option(help="of the rule, as phi=0.5; may be repeated")] = None,
    scale: Annotated[
        float | None, typer.Option(help="guidance scale (after the transition); default as calibrated, else 7.5")
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
    steps: Annotated[int | None, typer.Option(help="denoising steps; default as calibrated, else 50")] = None,
    scheduler: options.Scheduler = "own",
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
    progress: Annotated[bool, typer.Option(help="--no-progress is --log none")] = True,
) -> None:
    """Make an image for every prompt of a file. The same command goes on where it was stopped."""
    from basinescape.data.prompts import Prompts

    part, shown = shard_of(shard), looked_at(log, metrics, progress)
    jobs = Prompts(prompts, seed, on_error)
    quieten()
    from basinescape import Calibration, Guidance, Sampler
    from basinescape.generate import generate

    given = {"rule": rule, **options.named("rule_option", rule_option, float)}
    given |= {"restart": _restart(restart)} if restart else {}
    Guidance.cfg(7.5 if scale is None else scale, **given)  # raises for what no guidance can be
    if until not in (None, "auto", "settled"):
        _timestep(until)
    copies = None
    if training_images is not None:
        from basinescape.audit.index import Copies
        from basinescape.data.pictures import images_in

        copies = Copies(training_images, images_in(training_images), similarity or None, threshold, on_error)
    found = options.found(model, calibration)
    known = None if found is None else Calibration.load(found)
    steps = steps if steps is not None else known.steps if known else 50
    scale = scale if scale is not None else known.scale if known else 7.5
    loading = {"allow_pickle": allow_pickle, "compile": compile, "capture": capture}
    load = None
    if engine == Where.ray:
        load, device, dtype = spread((model, device, dtype, scheduler, attention), loading, workers)
    sampler = Sampler.from_pretrained(model, device, dtype, scheduler, attention, **loading)
    sampler = sampler.using(**{"height": height, "width": width, **options.of_call(option)})
    size = options.batch_size(sampler, batch_size)
    chosen = guidance or (Method.delayed if until or restart else Method.guard)  # delayed, where options of it are given
    planned = partial(
        _plan,
        sampler=sampler,
        calibration=known,
        steps=steps,
        scale=scale,
        before=before,
        opposite_scale=opposite_scale,
        until=until,
        minimum={"earliest": earliest, "latest": latest},
        given=given,
    )
    try:
        plan = planned(chosen)
    except ValueError as error:
        if guidance or calibration or chosen != Method.guard:
            raise
        plan = planned(Method.delayed)
        typer.echo(
            f"{error}. So no prompt is guided until timestep {plan.until.timestep:g}, which copies less and costs ordinary "
            f"prompts content; once calibrated (basinescape calibrate --model {model}), only what looks memorized is held back",
            err=True,
        )
    texts = {"clip_skip": clip_skip, "negative_prompt": negative_prompt}
    more = {"progress": shown, "format": format, "shard": part, "load": load, "workers": workers, "copies": copies}
    conclude(generate(sampler, jobs, out, plan, model, steps, size, **texts, **more), out)


def _plan(
    method: Method,
    sampler: Sampler,
    calibration: Calibration | None,
    steps: int,
    scale: float,
    before: float,
    opposite_scale: float,
    until: str | None,
    minimum: dict[str, int | None],
    given: dict[str, Any],
) -> Guidance:
    """The guidance that was asked for. Raises ValueError where it does not fit the rest."""
    from basinescape import Guidance

    if method == Method.cfg:
        return Guidance.cfg(scale, **given)
    if method == Method.guard:
        return _guard(sampler, calibration, steps, scale, until, given)
    transition = _transition(until, minimum, sampler, calibration, steps)
    if method == Method.delayed:
        return Guidance.delayed(scale, until=transition, before=before, **given)
    return Guidance.opposite(opposite_scale, scale=scale, until=transition, **given)


def _guard(
    sampler: Sampler, calibration: Calibration | None, steps: int, scale: float, until: str | None, given: dict[str, Any]
) -> Guidance:
    """The guard of a calibration. Raises ValueError where there is none, or it is not for this."""
    import torch
    from basinescape import Guidance
    from basinescape.guard import Ladder

    solver = sampler.solver(steps)
    if calibration is None:
        raise ValueError("a guard needs a calibration, and the model has none")
    for name, value, own in (("until", until, None), ("rule", given["rule"], "cfg"), ("restart", given.get("restart"), None)):
        if value != own:
            raise ValueError(f"{name} is {value!r}, but a guard has the guidance that it was calibrated with")
    found = Guidance.guard(scale, calibration.fitted(sampler, steps))
    Ladder.make(solver, found, torch.device("cpu"))
    return found


def _transition(
    until: str | None, minimum: dict[str, int | None], sampler: Sampler, calibration: Calibration | None, steps: int
) -> Rule:
    """Where guidance starts: as asked for, else where the calibration says, else the paper's timestep."""
    from basinescape import At, FirstMinimum

    if until == "auto":
        return FirstMinimum(**minimum)
    if until == "settled":
        if calibration is None:
            raise ValueError("until 'settled' needs a calibration, which `basinescape calibrate` makes, and the model has none")
        return calibration.fitted(sampler, steps).settled()
    if until is not None:
        return At(_timestep(until))
    return At(500.0 if calibration is None or calibration.ordinary is None else calibration.ordinary.transition)


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
