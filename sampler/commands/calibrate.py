"""`basinescape calibrate`: measure what is ordinary on a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from . import model_loading, options
from .quiet import quieten

SAVED_TOGETHER = 4  # pictures in a batch on a CPU, where a larger one is no faster: results are saved after each batch
EXAMPLE = """
  basinescape calibrate --model my-model"""


@dataclass(frozen=True)
class What:
    """Which pictures are measured, and where that is written."""

    TITLE: ClassVar = "What"
    prompts: Annotated[
        Path | None,
        typer.Option(help="ordinary ones, not memorized, 199 or more; a file as for generate; default 200 that ship"),
    ] = None
    pictures: Annotated[int, typer.Option(help="pictures a prompt", min=1)] = 1
    seed: options.Seed = 0
    settled: Annotated[
        bool, typer.Option(help="also measure what --until settled and the static transition need; takes twice as long")
    ] = False
    out: Annotated[
        Path | None, typer.Option(help="file to write; default calibration.json in the model's folder, where commands find it")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="replace a calibration that is there")] = False
    on_error: options.OnError = "stop"
    progress: options.Progress = True


@dataclass(frozen=True)
class Model(options.ModelOptions):
    """Which model, and how it is sampled."""

    scheduler: Annotated[str | None, typer.Option(help="own (the model's), ddim, dpmsolver++, euler, ...; default own")] = None
    steps: Annotated[int | None, typer.Option(help="denoising steps; default the model's own")] = None
    scale: Annotated[float | None, typer.Option(help="guidance scale; default the model's own")] = None
    attention: options.Attention = "sdpa"
    batch_size: Annotated[
        int | None, typer.Option(help="pictures measured together; default what the GPU's memory holds, 4 on a CPU")
    ] = None
    compile: options.Compile = False
    capture: options.Capture = False


def calibrate(what: What, model: Model) -> None:
    """Measure what is ordinary on a model, for thresholds at a stated false-alarm rate.

    The same command goes on where it was stopped.
    """
    quieten()
    from ..calibration.baseline import ordinary_prompts
    from ..calibration.calibration import steps_and_scale
    from ..calibration.measure import calibrate
    from ..data.prompts import read_prompts
    from ..models import memory

    jobs = read_prompts(what.prompts or ordinary_prompts(model.model), what.seed, what.on_error)
    out = _file(what.out, model.model, what.force)
    loading = model.loading | {"attention": model.attention, "compile": model.compile, "capture": model.capture}
    sampler = model_loading.sampler(model.model, None, model.scheduler, model.option, **loading)
    steps, scale = steps_and_scale(sampler, None, model.steps, model.scale)
    size = model.batch_size
    if size is None:
        size = SAVED_TOGETHER if sampler.model.device.type == "cpu" else memory.batch_size(sampler.model, *sampler.size())
    shifts = range(0, what.pictures * len(jobs), len(jobs))
    texts, seeds = [job.prompt for job in jobs] * what.pictures, [job.seed + shift for shift in shifts for job in jobs]
    how: dict[str, Any] = {
        "steps": steps,
        "scale": scale,
        "settled": what.settled,
        "batch_size": size,
        "progress": what.progress,
    }
    made = calibrate(sampler, texts, seeds, out, what.force, **how)
    typer.echo(f"{made.images} pictures, {steps} steps: {out}, {out.with_suffix('.png').name}")
    if what.settled and made.baseline is not None:
        typer.echo(f"static transition, a first guess: {made.baseline.transition:g}")


def _file(out: Path | None, model: str, force: bool) -> Path:
    """Return the file to write. Raises ValueError if it cannot be written, or if it exists, unless `force`."""
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
