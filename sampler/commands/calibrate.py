"""`basinescape calibrate`: what is ordinary on a model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .quiet import quieten


def calibrate(
    model: options.Model = "tiny",
    out: Annotated[
        Path | None, typer.Option(help="file to write; default calibration.json in the model's folder, where it is found")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="ordinary ones, none of them memorized, 199 or more, as for generate; default 200 that ship"),
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
    """Measure what is ordinary on a model, for thresholds at a stated false-alarm rate. A run that was stopped goes on."""
    quieten()
    from .. import Sampler, models
    from ..calibration.calibration import FILE
    from ..calibration.measure import calibrate
    from ..calibration.ordinary import prompts_for
    from ..data.prompts import read_prompts

    jobs = read_prompts(prompts or prompts_for(model), seed, on_error)
    if out is None:
        folder = Path(models.located(model))
        if not folder.is_dir():
            raise ValueError(f"out must be given: model {model!r} is no folder here that {FILE} could lie in")
        out = folder / FILE
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise ValueError(f"out {str(out)!r} must be a file in a folder that exists")
    loading = {"allow_pickle": allow_pickle, "compile": compile, "capture": capture}
    sampler = Sampler.from_pretrained(model, device, dtype, scheduler, attention, **loading)
    sampler = sampler.using(**options.of_call(option))
    steps, scale = options.steps_and_scale(sampler, None, steps, scale)
    size = options.batch_size(sampler, batch_size)
    shifts = range(0, pictures * len(jobs), len(jobs))
    texts, seeds = [job.prompt for job in jobs] * pictures, [job.seed + shift for shift in shifts for job in jobs]
    made = calibrate(sampler, texts, seeds, out, steps, scale, settled, size, progress)
    typer.echo(f"{made.images} pictures, {steps} steps: {out}, {out.with_suffix('.png').name}")
    if settled and made.ordinary is not None:
        typer.echo(f"static transition, a first guess: {made.ordinary.transition:g}")
