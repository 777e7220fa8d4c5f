"""`basinescape judge`: find the pictures of a set that look like copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import model_loading
from .judge_options import Model, Verdicts, What
from .options import of_call
from .quiet import quieten
from .runs import going_on, shard_of

if TYPE_CHECKING:
    from .. import Calibration, Sampler

EXAMPLE = """
  basinescape judge --model my-model --images made/ --out verdicts"""


def judge(what: What, model: Model, verdicts: Verdicts) -> None:
    """Find the pictures of a set that look like copies, by the model alone. The same command goes on where it was stopped.

    Scores differ by up to 0.2 near the threshold from those in generate's manifest, which are of the latents before decoding.
    """
    part = shard_of(what.shard)
    quieten()
    from .. import Sampler
    from ..auditing.set_verdicts import Settings, judge
    from ..data.prompted import prompted

    if verdicts.threshold is not None and verdicts.rate is not None:
        raise ValueError("threshold and rate say the same: give one of the two")
    made = _run_of(Path(what.images))
    source = model.model or made.get("model")
    if not source:
        raise ValueError("model must be given: the one that made the pictures, since no other can judge them")
    known, given = model_loading.found(source, verdicts.calibration), of_call(model.option)
    enough = model_loading.of_enough(known, verdicts.calibration) if verdicts.threshold is None else None
    size, options = _as_made(made, known)
    settings = Settings(
        _threshold(enough, verdicts.rate) if verdicts.threshold is None else verdicts.threshold,
        verdicts.probes,
        verdicts.seed,
        given.pop("height", None),
        given.pop("width", None),
        model.batch_size,
        what.on_error,
        size,
    )
    prompted(what.images, what.on_error)  # raises, before the model is loaded, if there are none
    sampler = Sampler.from_pretrained(source, scheduler=model_loading.scheduler_of(model.scheduler, known), **model.loading)
    sampler = sampler.using(**options | given)
    _compare(made, source, sampler)
    if enough is not None:
        sampler.measured_on(enough.model, None)  # sizes are told of each picture
    with going_on(what.out):
        rows = judge(sampler, what.images, what.out, settings, source, part, what.progress)
    _conclude(rows, what.out / f"shard-{part[0]}-of-{part[1]}" if part else what.out, source)


def _conclude(rows: Sequence[dict[str, Any]], home: Path, model: str) -> None:
    """Print the results. Raises typer.Exit(1) if a picture could not be judged."""
    verdicts, failed = (
        [row["suspect"] for row in rows if row["suspect"] is not None],
        [row for row in rows if row["status"] != "ok"],
    )
    found = f"{sum(verdicts)} of {len(verdicts)} pictures are suspect, as {model} judges"
    typer.echo(f"{found}: {home / 'judge.csv'}, {home / 'judge.html'}" if rows else found)
    if failed:
        named = ", ".join(row["id"] for row in failed[:5])
        typer.echo(f"{len(failed)} failed ({named}), the first: {failed[0]['status']}; see status in judge.csv", err=True)
        raise typer.Exit(1)


def _run_of(images: Path) -> dict[str, Any]:
    """Return the settings of the run of `generate` that made the pictures; empty if there is none."""
    from ..runs.run_folder import read_settings

    runs = [folder for folder in (images, images.parent) if (folder / "run.json").is_file()]
    return read_settings(runs[0]) if runs else {}


def _as_made(made: dict[str, Any], known: Calibration | None) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    """Return (height, width) and options of the call with which the pictures were made: their run's, else the calibration's."""
    if "prompts" in made:  # a run of generate
        return (made["height"], made["width"]), made.get("options", {}) | {"clip_skip": made["clip_skip"]}
    return (None, {}) if known is None else (known.size, known.settings.get("options", {}))


def _compare(made: dict[str, Any], source: str, sampler: Sampler) -> None:
    """Print a warning if another model made the run: compare weights, or names if dtypes differ or the weights are unknown."""
    from ..runs.provenance import weights_sha256

    dtype = made.get("dtype")
    if "weights" in made and dtype == sampler.provenance["dtype"]:
        same = made["weights"] == weights_sha256(sampler.pipe)
    else:
        same = Path(made.get("model", source)).name == Path(source).name
        if same and dtype:
            typer.echo(
                f"the pictures were made in {dtype}, so only the model's name is compared; --dtype {dtype} compares weights",
                err=True,
            )
    if not same:
        typer.echo(
            f"{made.get('model')} made the pictures, and {source} judges them: scores mean nothing unless these are one model",
            err=True,
        )


def _threshold(known: Calibration | None, rate: float | None) -> float:
    """Return the calibration's threshold at the rate, else that of all models. Raises ValueError for a rate without one."""
    from ..guidance.guard import RATE, THRESHOLD

    if known is not None:
        return known.threshold(RATE if rate is None else rate)
    if rate is not None:
        raise ValueError("rate needs a calibration, which `basinescape calibrate` makes, and the model has none")
    return THRESHOLD
