"""The command line, `basinescape`. Each command reads its options, calls one function, and prints the result."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from basinescape import __version__
from basinescape.commands import audit, calibrate, generate, grouping, judge
from basinescape.commands.merge import merge
from basinescape.commands.quiet import quieten
from basinescape.commands.verify import verify

from .commands import evaluation
from .tables import Row, aligned, tables, writable

SUMMARY = "Sample guided diffusion models without reproducing training images."
DEBUG = "BASINESCAPE_DEBUG"  # an environment variable: if it is set, errors are shown with their traceback
app = typer.Typer(
    help=SUMMARY,
    invoke_without_command=True,
    epilog=f"Set {DEBUG}=1 to see where an error comes from.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the plain help fits into 80 columns
)


class Bench(StrEnum):
    """What `bench` times."""

    kernel = "kernel"
    step = "step"
    images = "images"
    engine = "engine"
    all = "all"


@app.callback()
def top(version: Annotated[bool, typer.Option("--version", help="say which version this is", is_eager=True)] = False) -> None:
    if version:
        typer.echo(f"basinescape {__version__}")
        raise typer.Exit


grouping.add(app, generate.generate, generate.EXAMPLE)
for command in (verify, merge):
    app.command()(command)
grouping.add(app, calibrate.calibrate, calibrate.EXAMPLE)
grouping.add(app, audit.audit, audit.EXAMPLE)
grouping.add(app, judge.judge, judge.EXAMPLE)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder for the pictures and the table")] = Path("out/demo")) -> None:
    """See memorization and its cure on the two small pipelines that ship. Takes about two minutes on two cores."""
    quieten()
    from .evaluation.demo import demo

    typer.echo(demo(out))


evaluation.add(app)


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
    json = json and writable(json, "json")
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
    """Time the sampler beside its peers. In one process, interleaved; only results that agree are compared.

    What was timed before an error or Ctrl-C is printed and written, too.
    """
    quieten()
    from basinescape import checks

    speed, json, rows = _benchmarks("speed"), json and writable(json, "json"), list[Row]()
    found = {**_benchmarks("speed.timing").taken(checks.device(device)), "rows": rows}
    try:
        for row in speed.run(speed.BENCHES if what == Bench.all else [what.value], device):
            rows.append(row)
    except BaseException as error:
        found["stopped by"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        if rows:
            typer.echo(tables(rows))
        if rows and json:
            json.write_text(dumps(found, indent=1) + "\n")


@app.command()
def report_gpu(file: Annotated[Path, typer.Argument(help="what python -m basinescape.bench.gpu --out wrote")]) -> None:
    """Print a result file of the checks and benchmarks on a GPU as tables."""
    report = _benchmarks("gpu.report")
    typer.echo(report.rendered(report.read(file)))


def _benchmarks(name: str) -> Any:
    """Import a module of the benchmarks. Raises ImportError where they are missing: only a checkout has them."""
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: benchmarks run in a checkout of the repository") from error


def main() -> None:
    """Run the command line. An error prints one line and exits with code 2."""
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
    """The text printed for an error: its message if that is written for users, else also its type and a hint at DEBUG."""
    if hasattr(error, "format_message"):  # an error of typer: an option is missing, or is not a number
        return error.format_message()
    if isinstance(error, ValueError | OSError | ImportError | RuntimeError):
        return str(error)
    return f"{type(error).__name__}: {error} (set {DEBUG}=1 to see where)"
