"""`basinescape calibrate`: measure what is ordinary on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .quiet import quieten

ON_CPU = 4  # pictures measured together: what is measured is kept after each batch, and a larger one gains no time there


def calibrate(
    model: options.Model = "tiny",
    out: Annotated[
        Path | None, typer.Option(help="file to write; default calibration.json in the model's folder, where commands find it")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a calibration that is there")] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="ordinary ones, not memorized, 199 or more; a file as for generate; default 200 that ship"),
    ] = None,
    pictures: Annotated[int, typer.Option(help="pictures a prompt", min=1)] = 1,
    scale: Annotated[float | None, typer.Option(help="guidance scale; default the model's own")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default the model's own")] = None,
    scheduler: options.Scheduler = "own",
    settled: Annotated[
        bool, typer.Option(help="also measure what --until settled and the static transition need; takes twice as long")
    ] = False,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    option: options.Option = None,
    attention: options.Attention = "sdpa",
    dtype: options.Dtype = None,
    device: options.Device = None,
    allow_pickle: options.AllowPickle = False,
    compile: options.Compile = False,
    capture: options.Capture = False,
    on_error: options.OnError = "stop",
    progress: options.Progress = True,
) -> None:
    """Measure what is ordinary on a model, for thresholds at a stated false-alarm rate.

    The same command goes on where it was stopped.
    """
    quieten()
    from .. import Sampler
    from ..calibration.baseline import ordinary_prompts
    from ..calibration.measure import calibrate
    from ..data.prompts import read_prompts

    jobs = read_prompts(prompts or ordinary_prompts(model), seed, on_error)
    out = _file(out, model, force)
    loading = {"allow_pickle": allow_pickle, "compile": compile, "capture": capture}
    sampler = Sampler.from_pretrained(model, device, dtype, scheduler, attention, **loading)
    sampler = sampler.using(**options.of_call(option))
    steps, scale = options.steps_and_scale(sampler, None, steps, scale)
    size = options.batch_size(sampler, batch_size)
    if batch_size is None and sampler.model.device.type == "cpu":
        size = min(size, ON_CPU)
    shifts = range(0, pictures * len(jobs), len(jobs))
    texts, seeds = [job.prompt for job in jobs] * pictures, [job.seed + shift for shift in shifts for job in jobs]
    made = calibrate(sampler, texts, seeds, out, steps, scale, settled, size, progress, force)
    typer.echo(f"{made.images} pictures, {steps} steps: {out}, {out.with_suffix('.png').name}")
    if settled and made.baseline is not None:
        typer.echo(f"static transition, a first guess: {made.baseline.transition:g}")


def _file(out: Path | None, model: str, force: bool) -> Path:
    """The file to write. Raises ValueError for one that cannot be, and one that is there, unless `force`."""
    from .. import models
    from ..calibration.calibration import FILE

    if out is None:
        folder = Path(models.located(model))
        if not folder.is_dir():
            raise ValueError(f"out must be given: model {model!r} is no folder here that {FILE} could lie in")
        out = folder / FILE
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise ValueError(f"out {str(out)!r} must be a file in a folder that exists")
    if out.exists() and not force:
        raise ValueError(f"out {str(out)!r} exists: give another --out, or --force to replace it")
    return out
