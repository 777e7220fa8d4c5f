"""Loads the model, its calibration and its scheduler as the options of a command ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from .options import of_call

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from .. import Calibration, Sampler


def found(model: str, calibration: str | None) -> Calibration | None:
    """Return the calibration that is given, or that lies beside the model; None without one."""
    from .. import Calibration

    path = calibration or Calibration.beside(model)
    return None if path is None else Calibration.load(path)


def of_enough(known: Calibration | None, given: str | None) -> Calibration | None:
    """Return the calibration for thresholds. None, with a message, if it was not `given` and its pictures are too few."""
    from ..calibration.calibration import FEW

    if known is None or given or known.images >= FEW:
        return known
    typer.echo(
        f"the model's calibration is of {known.images} pictures, and thresholds need {FEW}: it is left out; calibrate again "
        "with more prompts and --force",
        err=True,
    )
    return None


def sampler(
    model: str,
    known: Calibration | None,
    scheduler: str | SchedulerMixin | None,
    option: Sequence[str] | None,
    height: int | None = None,
    width: int | None = None,
    **loading: Any,
) -> Sampler:
    """Return the sampler that the options ask for. Scheduler, size and call options that they leave open are as calibrated."""
    from .. import Sampler

    made = Sampler.from_pretrained(model, scheduler=scheduler_of(scheduler, known), **loading)
    settings = {} if known is None else known.settings
    if known is not None:
        how = f"{known.steps} steps, scale {known.scale:g}, {type(made.scheduler).__name__}"
        typer.echo(f"calibrated: what no option says is as in the model's calibration ({how})", err=True)
    given = {"height": height, "width": width, **of_call(option)}
    calibrated = dict(zip(("height", "width"), settings.get("size", ()), strict=False)) | settings.get("options", {})
    return made.using(**calibrated | {name: value for name, value in given.items() if value is not None})


def scheduler_of(given: str | SchedulerMixin | None, known: Calibration | None) -> str | SchedulerMixin:
    """Return the scheduler that is given, else the calibration's, else the model's own."""
    if given is not None or known is None:
        return given or "own"
    return known.scheduler or "own"


def for_workers(
    model: str, scheduler: str | SchedulerMixin, loading: dict[str, Any], workers: int | None
) -> tuple[Callable[[], Sampler], dict[str, Any]]:
    """Return (what loads the sampler of a cluster's worker, the options that load this process's, which makes no pictures)."""
    from .. import Sampler
    from ..bulk.ray import cluster
    from ..checks import at_least_one

    _, gpu = cluster(None if workers is None else at_least_one("workers", workers))
    device, dtype = ("cuda", "float16") if gpu else ("cpu", "float32")
    there = loading | {"device": loading["device"] or device, "dtype": loading["dtype"] or dtype}
    here = there | {"device": "cpu", "compile": False, "capture": False}
    here |= {"attention": "sdpa"} if there["attention"] == "xformers" else {}  # which a CPU does not have
    return partial(Sampler.from_pretrained, model, scheduler=scheduler, **there), here
