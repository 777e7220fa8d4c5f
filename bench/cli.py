"""The command line, `basinescape`: each command reads its options, calls one function, and says what came out."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from .commands.audit import audit
from .commands.calibrate import calibrate
from .commands.generate import generate
from .quiet import quieten
from .tables import aligned, tables

SUMMARY = "Sample guided diffusion models without reproducing training images."
DEBUG = "BASINESCAPE_DEBUG"  # an environment variable: where it is set, errors show where they come from
app = typer.Typer(
    help=SUMMARY,
    epilog=f"Set {DEBUG}=1 to see where an error comes from.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the plain help fits into 80 columns
)


class Bench(StrEnum):
    """What is timed."""

    kernel = "kernel"
    step = "step"
    images = "images"
    all = "all"


for command in (generate, calibrate, audit):
    app.command()(command)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder for the table and the pictures")] = Path("out/demo")) -> None:
    """See memorization and its cure on the small pipeline that ships."""
    quieten()
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
    quieten()
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
    quieten()
    from .evaluation.quality import quality

    typer.echo(aligned(quality(run, clip, None if features == "none" else features, references, similarity, progress)))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="folders written by evaluate")],
    out: Annotated[Path, typer.Option(help="the page to write, one HTML file that needs no network")],
) -> None:
    """Make a page about evaluations. Tables, the noise gap's curves, and training images beside what was made of them."""
    from .evaluation.report import report

    report(runs, out)
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
    quieten()
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
    what: Annotated[Bench, typer.Argument(help="the launch, a step without its network, whole images, or all of them")],
    json: Annotated[Path | None, typer.Option(help="also write device, date, versions and the rows as JSON")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is a GPU")] = None,
) -> None:
    """Time the sampler beside its peers. In one process, interleaved; only results that agree are compared."""
    quieten()
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
