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

from .runs import conclude, looked_at, merge, shard_of, spread, verify
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


for command in (verify, merge):
    app.command()(command)


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


class Bench(StrEnum):
    """What is timed."""

    kernel = "kernel"
    step = "step"
    images = "images"
    engine = "engine"
    all = "all"


@app.command()
def generate(
    prompts: Annotated[
        str,
        typer.Option(help='JSON Lines {"prompt", "id"?, "seed"?, "negative_prompt"?}, .csv, .parquet, hf:DATASET, or -'),
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
    batch_size: Annotated[int, typer.Option(help="images sampled together; a free place is filled at once")] = 8,
    height: Annotated[int | None, typer.Option(help="pixels; default the model's own")] = None,
    width: Annotated[int | None, typer.Option(help="pixels; default the model's own")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="of the prompts that have none of their own")] = None,
    clip_skip: Annotated[int | None, typer.Option(help="how many of the text encoder's last layers to leave out")] = None,
    attention: Annotated[str, typer.Option(help="sdpa or xformers")] = "sdpa",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default float16 on a GPU")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is a GPU")] = None,
    allow_pickle: Annotated[bool, typer.Option(help="load weights that are not safetensors; they can run code")] = False,
    format: Annotated[str, typer.Option(help="png, jpg, webp, latents, or many a file: parquet, webdataset")] = "png",
    on_error: Annotated[str, typer.Option(help="what a row of the prompts that is wrong does: stop or skip")] = "stop",
    engine: Annotated[Where, typer.Option(help="local, or ray: a worker on every GPU of the cluster")] = "local",
    workers: Annotated[int | None, typer.Option(help="with --engine ray; default one a GPU")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: the i-th of n parts, from 0, in OUT/shard-i-of-n; see merge")] = None,
    log: Annotated[str, typer.Option(help="auto (a bar in a terminal, else lines), plain, json or none")] = "auto",
    metrics: Annotated[int | None, typer.Option(help="port on which Prometheus finds the same numbers")] = None,
    progress: Annotated[bool, typer.Option(help="--no-progress is --log none")] = True,
) -> None:
    """Make an image for every prompt of a file. The same command goes on where it was stopped."""
    from basinescape.prompts import Prompts

    part, shown = shard_of(shard), looked_at(log, metrics, progress)
    jobs = Prompts(prompts, seed, on_error)
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
    load = None
    if engine == Where.ray:
        load, device, dtype = spread((source, device, dtype, scheduler, attention, allow_pickle), workers)
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
    size = (height, width, clip_skip)
    summary = generate(
        sampler, jobs, out, plan, model, steps, batch_size, negative_prompt, *size, shown, format, part, load, workers
    )
    conclude(summary, out)


def _guarded(sampler: Sampler, calibration: str | Path | None, steps: int, scale: float, rule: str) -> Guidance:
    """The guard of a calibration. Raises ValueError where there is none, or it is not for this."""
    import torch
    from basinescape import Calibration, Guidance
    from basinescape.guard import Ladder

    solver = sampler.solver(steps)
    if calibration is None:
        raise ValueError("a guard needs a calibration, which `basinescape calibrate` makes, and the model has none")
    if rule != "cfg":
        raise ValueError(f"rule is {rule!r}, but a guard has the rule that it was calibrated with")
    found = Guidance.guard(scale, Calibration.load(calibration))
    Ladder.make(solver, found, torch.device("cpu"))
    return found


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


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="folder for results.jsonl, table.csv and the images")],
    scenario: Annotated[str, typer.Option(help="tiny, 1, 2, 3, 4, or a .yaml file")] = "tiny",
    methods: Annotated[str, typer.Option(help="names with commas between, or 'all'")] = "all",
    seeds: Annotated[int, typer.Option(help="images a prompt")] = 4,
    first_seed: Annotated[int, typer.Option(help="their seeds are counted up from here")] = 0,
    limit: Annotated[int | None, typer.Option(help="only the first prompts of each group")] = None,
    batch_size: Annotated[int, typer.Option(help="images sampled together")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is a GPU")] = None,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
) -> None:
    """Measure memorization. Every method runs on every prompt of a scenario."""
    _quieten()
    from . import scenario as scenarios
    from .evaluation.evaluate import evaluate
    from .methods import table

    chosen = scenarios.load(scenario)
    names = list(table(chosen)) if methods == "all" else methods.split(",")
    rows = evaluate(chosen, names, out, seeds, limit, batch_size, dtype, device, progress, first_seed)
    typer.echo(aligned(rows))


@app.command()
def quality(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder written by evaluate; gets quality.csv, quality.jsonl")],
    clip: Annotated[str | None, typer.Option(help="CLIP model of the text alignment, as openai/clip-vit-base-patch16")] = None,
    features: Annotated[str, typer.Option(help="of FID and KID: concept, inception, sscd, clip, dino, or 'none'")] = "concept",
    references: Annotated[Path | None, typer.Option(help="folder of images for FID and KID; for tiny: fresh scenes")] = None,
    similarity: Annotated[str | None, typer.Option(help="to the training images: pixels, sscd, clip or dino")] = None,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
) -> None:
    """Measure the images of an evaluation. Text alignment, distance from ordinary images, similarity to training images."""
    _quieten()
    from .evaluation.quality import quality

    typer.echo(aligned(quality(run, clip, None if features == "none" else features, references, similarity, progress)))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="folders written by evaluate, or one by generate")],
    out: Annotated[Path, typer.Option(help="the page to write, one HTML file that needs no network")],
) -> None:
    """Make a page about evaluations. Tables, the noise gap's curves, and training images beside what was made of them."""
    from .evaluation import report as page
    from .evaluation import sheet

    if len(runs) == 1 and sheet.is_run(runs[0]):
        return typer.echo(f"{sheet.sheet(runs[0], out)} images in {out}")
    page.report(runs, out)
    typer.echo(f"{len(runs)} run{'s' if len(runs) > 1 else ''} in {out}")


@app.command()
def analyze(
    out: Annotated[Path, typer.Option(help="folder for the figures, CSV files and summary.json; new or empty")],
    scenario: Annotated[str, typer.Option(help="tiny, 1, 2, 3, 4, or a .yaml file")] = "tiny",
    seeds: Annotated[int, typer.Option(help="trajectories a prompt")] = 2,
    limit: Annotated[int | None, typer.Option(help="only the first prompts of each group")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is a GPU")] = None,
) -> None:
    """Make basins visible. Where guidance may start, how wide a basin is, and whether a rule finds its edge."""
    _quieten()
    from . import scenario as scenarios
    from .evaluation.analyze import analyze

    summary = analyze(scenarios.load(scenario), out, seeds, limit, dtype=dtype, device=device)
    for rows in (summary["onset"], summary["detection"], summary["agreement"]):
        typer.echo(aligned(rows) + "\n")


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
    what: Annotated[Bench, typer.Argument(help="the launch, a step without network, whole images, in-flight batching, or all")],
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
