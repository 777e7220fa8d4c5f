"""The command line, `basinescape`: each command reads its options, calls one function, and says what came out."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .evaluation import commands
from .tables import aligned, tables

if TYPE_CHECKING:
    from basinescape import Guidance, Sampler

SUMMARY = "Sample guided diffusion models without reproducing training images."
DEBUG = "BASINESCAPE_DEBUG"  # an environment variable: where it is set, errors show where they come from
app = typer.Typer(
    help=SUMMARY,
    epilog=f"Set {DEBUG}=1 to see where an error comes from.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the plain help fits into 80 columns
)


class Method(StrEnum):
    """How guidance is scheduled."""

    cfg = "cfg"
    delayed = "delayed"
    opposite = "opposite"
    guard = "guard"


class Bench(StrEnum):
    """What is timed."""

    kernel = "kernel"
    step = "step"
    images = "images"
    all = "all"


@app.command()
def generate(
    prompts: Annotated[
        Path,
        typer.Option(help='JSON Lines {"prompt", "id"?, "seed"?, "negative_prompt"?}, .csv, .parquet, or - for standard input'),
    ],
    out: Annotated[Path, typer.Option(help="folder for images, manifest.jsonl and run.json")],
    model: Annotated[str, typer.Option(help="a folder in diffusers' format, a hub id, or 'tiny'")] = "tiny",
    guidance: Annotated[
        Method | None, typer.Option(help="plain, delayed, opposite or guarded; default guard with a calibration, else delayed")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="of the guard; default calibration.json in the model's folder, see calibrate")
    ] = None,
    rule: Annotated[str, typer.Option(help="how predictions combine: cfg, rescale, cfg-zero, apg, tcfg, ...")] = "cfg",
    scale: Annotated[float, typer.Option(help="guidance scale (after the transition)")] = 7.5,
    before: Annotated[float, typer.Option(help="weight before the transition, with --guidance delayed")] = 0.0,
    opposite_scale: Annotated[float, typer.Option(help="with --guidance opposite: weight -N before the transition")] = 2.0,
    until: Annotated[str, typer.Option(help="timestep of the transition, or 'auto': first minimum of the noise gap")] = "500",
    earliest: Annotated[int, typer.Option(help="with --until auto: first step that may be the transition")] = 2,
    latest: Annotated[int | None, typer.Option(help="with --until auto: step at which guidance starts in any case")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    scheduler: Annotated[str, typer.Option(help="own (the model's), ddim, dpmsolver++, euler, unipc, ...")] = "own",
    seed: Annotated[int, typer.Option(help="seed of the first prompt, counted up from there")] = 0,
    batch_size: Annotated[int, typer.Option(help="images sampled together")] = 8,
    height: Annotated[int | None, typer.Option(help="pixels; default the model's own")] = None,
    width: Annotated[int | None, typer.Option(help="pixels; default the model's own")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="of the prompts that have none of their own")] = None,
    clip_skip: Annotated[int | None, typer.Option(help="how many of the text encoder's last layers to leave out")] = None,
    attention: Annotated[str, typer.Option(help="sdpa or xformers")] = "sdpa",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default float16 on a GPU")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is a GPU")] = None,
    allow_pickle: Annotated[bool, typer.Option(help="load weights that are not safetensors; they can run code")] = False,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
) -> None:
    """Make an image for every prompt of a file."""
    from basinescape.prompts import read_prompts

    jobs = read_prompts(prompts, seed)
    _quieten()
    from basinescape import At, Calibration, FirstMinimum, Guidance, Sampler
    from basinescape.generate import generate

    if until == "auto":
        transition = FirstMinimum(earliest=earliest, latest=latest)
    else:
        try:
            transition = At(float(until))
        except ValueError as error:
            raise ValueError(f"until must be a timestep or 'auto', got {until!r}") from error
    source = Sampler.model_path(model) if model == "tiny" else model
    sampler = Sampler.from_pretrained(source, device, dtype, scheduler, attention, allow_pickle)
    if guidance in (Method.guard, None):
        try:
            plan = _guarded(sampler, calibration or Calibration.beside(source), steps, scale, rule)
        except ValueError as error:
            if guidance or calibration:
                raise
            guidance = Method.delayed
            typer.echo(f"{error}: every prompt is delayed until {until} instead, which costs ordinary ones content", err=True)
    if guidance == Method.cfg:
        plan = Guidance.cfg(scale, rule=rule)
    elif guidance == Method.delayed:
        plan = Guidance.delayed(scale, until=transition, before=before, rule=rule)
    elif guidance == Method.opposite:
        plan = Guidance.opposite(opposite_scale, scale=scale, until=transition, rule=rule)
    written = generate(sampler, jobs, out, plan, model, steps, batch_size, negative_prompt, height, width, clip_skip, progress)
    failed = [line["id"] for line in written if line["status"] != "ok"]
    typer.echo(f"{len(jobs) - len(failed)} images in {out / 'images'} ({len(written) - len(failed)} new)")
    _note([line["id"] for line in written if "truncated" in line], "cut at the text encoder's limit", "truncated")
    _note(
        [line["id"] for line in written if line.get("nsfw_content_detected")],
        "flagged and blacked out",
        "nsfw_content_detected",
    )
    _note([line["id"] for line in written if line.get("suspect")], "may still be copies of training images", "suspect")
    _note(failed, "failed", "status")
    if failed:
        raise typer.Exit(1)


def _guarded(sampler: Sampler, calibration: str | Path | None, steps: int, scale: float, rule: str) -> Guidance:
    """The guard of a calibration. Raises ValueError where there is none, or it is not for this."""
    import torch
    from basinescape import Calibration, Guidance
    from basinescape.guard import planned

    solver = sampler.solver(steps)
    if calibration is None:
        raise ValueError("a guard needs a calibration, which `basinescape calibrate` makes, and the model has none")
    if rule != "cfg":
        raise ValueError(f"rule is {rule!r}, but a guard has the rule that it was calibrated with")
    found = Guidance.guard(scale, Calibration.load(calibration))
    planned(solver, found, torch.device("cpu"))
    return found


def _note(ids: list[str], what: str, field: str) -> None:
    """A line on standard error about the images it is true of, if any; `field` of the manifest says more."""
    if ids:
        typer.echo(
            f"{len(ids)} {what} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''}): see {field} in manifest.jsonl",
            err=True,
        )


@app.command()
def calibrate(
    prompts: Annotated[Path, typer.Option(help="ordinary prompts, none of them memorized, a hundred or more; as for generate")],
    out: Annotated[Path, typer.Option(help="the file to write; calibration.json in the model's folder is found by generate")],
    model: Annotated[str, typer.Option(help="a folder in diffusers' format, a hub id, or 'tiny'")] = "tiny",
    scale: Annotated[float, typer.Option(help="guidance scale")] = 7.5,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 50,
    scheduler: Annotated[str, typer.Option(help="own (the model's), ddim, dpmsolver++, euler, ...")] = "own",
    rate: Annotated[float, typer.Option(help="share of ordinary images that the guard may begin again")] = 0.025,
    seed: Annotated[int, typer.Option(help="seed of the first prompt, counted up from there")] = 0,
    batch_size: Annotated[int, typer.Option(help="images sampled together")] = 8,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default float16 on a GPU")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is a GPU")] = None,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
) -> None:
    """Measure what is ordinary on a model, for the guard."""
    from basinescape.prompts import read_prompts

    jobs = read_prompts(prompts, seed)
    if not out.resolve().parent.is_dir():
        raise ValueError(f"out {str(out)!r} must be a file in a folder that exists")
    _quieten()
    from basinescape import Calibration, Sampler

    source = Sampler.model_path(model) if model == "tiny" else model
    sampler = Sampler.from_pretrained(source, device, dtype, scheduler)
    texts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
    options = {"rate": rate, "batch_size": batch_size, "progress": progress}
    Calibration.measure(sampler, texts, seeds, steps, scale, **options).save(out)
    typer.echo(f"{len(jobs)} prompts, {steps} steps: {out}")


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder for the table and the pictures")] = Path("out/demo")) -> None:
    """See memorization and its cure on the small pipeline that ships."""
    _quieten()
    from .evaluation.demo import demo

    typer.echo(demo(out))


commands.add(app)


@app.command()
def aot(
    json: Annotated[Path | None, typer.Option(help="also write the rows as JSON")] = None,
    target: Annotated[list[str] | None, typer.Option(help="sm_90 and the like; may be repeated; default all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, ...; may be repeated; default all")] = None,
) -> None:
    """Compile every kernel, without a GPU. Registers, spills and the width of loads are read off the machine code."""
    from basinescape.kernels import aot

    for name, given, known in (("target", target, aot.TARGETS), ("dtype", dtype, aot.DTYPES)):
        if given and not set(given) <= set(known):
            raise ValueError(f"{name} must be among {', '.join(known)}; got {', '.join(given)}")
    rows = list(aot.rows(target or aot.TARGETS, dtype or aot.DTYPES))
    typer.echo(aligned(rows))
    if json:
        json.write_text(dumps(rows, indent=1) + "\n")


@app.command()
def bench(
    what: Annotated[Bench, typer.Argument(help="the launch, a step without its network, whole images, or all of them")],
    json: Annotated[Path | None, typer.Option(help="also write device, date, versions and the rows as JSON")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is a GPU")] = None,
) -> None:
    """Time the sampler beside its peers. In one process, interleaved; only results that agree are compared."""
    _quieten()
    from basinescape import arguments

    from . import speed
    from .speed.timing import taken

    rows = list(speed.run(speed.BENCHES if what == Bench.all else [what.value], device))
    typer.echo(tables(rows))
    if json:
        json.write_text(dumps({**taken(arguments.device(device)), "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Run the command line; bad input ends with one line and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if DEBUG in os.environ:
        logging.getLogger("basinescape").setLevel(logging.DEBUG)
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="basinescape", standalone_mode=False) or 0)
    except Exception as error:
        if DEBUG in os.environ:
            raise
        typer.echo(" ".join(f"basinescape: {_said(error)}".split()), err=True)
        sys.exit(2)


def _said(error: Exception) -> str:
    """What an error says: all of it where it is meant for the user, else its kind and how to see where it comes from."""
    if hasattr(error, "format_message"):  # typer's own: an option that is missing, or no number
        return error.format_message()
    if isinstance(error, ValueError | OSError | ImportError | RuntimeError):
        return str(error)
    return f"{type(error).__name__}: {error} (set {DEBUG}=1 to see where)"


def _quieten() -> None:
    """Loading a pipeline draws progress bars and notices of its own, some on import: before it, then. Errors stay."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
