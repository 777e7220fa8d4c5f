"""The commands that measure methods: `evaluate`, `quality`, `analyze`, `report`. `add` puts them on the command line."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer
from basinescape.commands import options
from basinescape.commands.quiet import quieten

from ..tables import aligned

if TYPE_CHECKING:
    from ..scenario import Scenario

FIELDS = """A scenario of your own is a .yaml file. Fields: model (a folder or hub id) and memorized (captions that may be
memorized), which it must have; general (ordinary prompts), images (a folder of training images), name, steps, scheduler,
scale, transition (a timestep, 0 to 1000), similarity (pixels, sscd, clip, dino), threshold (of the similarity, above which an
image is a copy), calibration (a file that calibrate wrote), options (of the pipeline's own call, as height: 768), where. What
it leaves open is as calibrated, else as the model's own pipeline has it. Captions are .jsonl, .csv, .parquet (prompt or caption
or text; perhaps image or file_name, id, concept), .json, or a folder of images with .txt files or metadata.jsonl. Files are
looked for beside the .yaml file."""
METHODS = """A method of your own is FILE.py:NAME, where NAME is a Guidance or a guard, a function (sampler, prompts,
seeds[, steps]) that returns an Output, or an object with such a sample; see basinescape.bench.methods.own."""
OWN = f"--model and --prompts take the place of a scenario; other options change one. {FIELDS}"

ScenarioName = Annotated[
    str | None, typer.Option("--scenario", help="tiny (the default), 1, 2, 3, 4, or a .yaml file, see below")
]
Model = Annotated[str | None, typer.Option(help="your model, a folder in diffusers' format or a hub id")]
Prompts = Annotated[Path | None, typer.Option(help="with --model: its captions, a file or a folder of images, see below")]
General = Annotated[Path | None, typer.Option(help="ordinary prompts beside them, a file as for --prompts")]
Images = Annotated[Path | None, typer.Option(help="folder of training images: copies of any of them are found")]
Steps = Annotated[int | None, typer.Option(help="denoising steps; default the scenario's, else as calibrated")]
Scheduler = Annotated[str | None, typer.Option(help="own (the model's), ddim, dpmsolver++, ...; default as for --steps")]
Scale = Annotated[float | None, typer.Option(help="guidance scale; default as for --steps")]
Until = Annotated[float | None, typer.Option(help="timestep of the transition of delayed and opposite guidance")]
Similarity = Annotated[str | None, typer.Option(help="pixels, sscd, clip or dino; default sscd if installed, else pixels")]
Threshold = Annotated[float | None, typer.Option(help="similarity above which an image is a copy; default its own")]
Calibration = Annotated[str | None, typer.Option(help="of the guard; default calibration.json in the model's folder")]
Seeds = Annotated[int, typer.Option(help="images a prompt")]
Limit = Annotated[int | None, typer.Option(help="only the first prompts of each group")]
BatchSize = Annotated[int, typer.Option(help="images sampled together")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; default cuda where there is a GPU")]
Progress = Annotated[bool, typer.Option(help="show a progress bar")]


def add(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command(epilog=f"{METHODS} {OWN}")(evaluate)
    app.command()(quality)
    app.command()(report)
    app.command(epilog=OWN)(analyze)


def evaluate(
    out: Annotated[Path, typer.Option(help="folder for results.jsonl, table.csv and the images")],
    scenario: ScenarioName = None,
    model: Model = None,
    prompts: Prompts = None,
    general: General = None,
    images: Images = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="names with commas between, FILE.py:NAME (see below), or all; default cfg, delayed-at, opposite-at, guard"
        ),
    ] = None,
    seeds: Seeds = 4,
    first_seed: Annotated[int, typer.Option(help="their seeds are counted up from here")] = 0,
    limit: Limit = None,
    steps: Steps = None,
    scheduler: Scheduler = None,
    scale: Scale = None,
    until: Until = None,
    similarity: Similarity = None,
    threshold: Threshold = None,
    calibration: Calibration = None,
    option: options.Option = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "float32",
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Measure memorization. Methods run on captions that may be memorized and on ordinary prompts."""
    quieten()
    from basinescape.calibration.baseline import STATIC
    from basinescape.models import shipped

    from ..evaluation.comparison import Comparison
    from ..evaluation.evaluate import Incomplete, evaluate
    from ..methods import DEFAULT

    sampled = {"steps": steps, "scheduler": scheduler, "scale": scale, "transition": until, "calibration": calibration}
    chosen = _scenario(scenario, model, prompts, general, images, similarity, threshold, option, **sampled)
    names = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    if names is None:
        typer.echo(f"methods: {', '.join(DEFAULT)}", err=True)
    failed = None
    try:
        rows = evaluate(chosen, names, out, seeds, limit, batch_size, dtype, device, progress, first_seed)
    except Incomplete as error:
        failed, rows = error, error.rows
    if rows:
        compared = Comparison.of(rows, STATIC if chosen.transition is None else chosen.transition)
        origin = f"A copy: {chosen.copy}" if compared.sure() and chosen.model not in shipped() else ""
        said = (compared.sure(), origin, compared.finding())
        typer.echo("\n\n".join([aligned(compared.text_rows()), *(fill(text, 80) for text in said if text)]))
    if failed:
        typer.echo(f"basinescape: {failed}", err=True)
        raise typer.Exit(1)


def quality(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder written by evaluate; gets quality.csv, quality.jsonl")],
    clip: Annotated[str | None, typer.Option(help="CLIP model of the text alignment, as openai/clip-vit-base-patch16")] = None,
    features: Annotated[str, typer.Option(help="of FID and KID: concept, inception, sscd, clip, dino, or 'none'")] = "concept",
    references: Annotated[Path | None, typer.Option(help="folder of images for FID and KID; for tiny: fresh scenes")] = None,
    similarity: Annotated[str | None, typer.Option(help="to the training images: pixels, sscd, clip or dino")] = None,
    progress: Progress = True,
) -> None:
    """Measure the images of an evaluation. Text alignment, distance from ordinary images, similarity to training images."""
    quieten()
    from ..evaluation.quality import quality

    typer.echo(aligned(quality(run, clip, None if features == "none" else features, references, similarity, progress)))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="folders written by evaluate, or one by generate")],
    out: Annotated[Path, typer.Option(help="the page to write, one HTML file that needs no network; .csv and .tex beside it")],
) -> None:
    """Make a page about evaluations. The finding, copies against concept, the table, and what became of each caption."""
    quieten()
    from ..evaluation import sheet
    from ..evaluation.report import report

    if len(runs) == 1 and sheet.is_run(runs[0]):
        return typer.echo(f"{sheet.sheet(runs[0], out)} images in {out}")
    files = report(runs, out)
    typer.echo(f"{len(runs)} run{'s' if len(runs) > 1 else ''} in {', '.join(map(str, files))}")


def analyze(
    out: Annotated[Path, typer.Option(help="folder for the figures, CSV files and summary.json; new or empty")],
    scenario: ScenarioName = None,
    model: Model = None,
    prompts: Prompts = None,
    general: General = None,
    images: Images = None,
    seeds: Annotated[int, typer.Option(help="trajectories a prompt")] = 2,
    limit: Limit = None,
    steps: Steps = None,
    scheduler: Scheduler = None,
    scale: Scale = None,
    similarity: Similarity = None,
    threshold: Threshold = None,
    calibration: Calibration = None,
    option: options.Option = None,
    dtype: Dtype = "float32",
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Make basins visible. Where guidance may start, how wide a basin is, and what tells memorized prompts from others."""
    quieten()
    from ..evaluation.analyze import analyze

    sampled = {"steps": steps, "scheduler": scheduler, "scale": scale, "calibration": calibration}
    chosen = _scenario(scenario, model, prompts, general, images, similarity, threshold, option, **sampled)
    summary = analyze(chosen, out, seeds, limit, dtype=dtype, device=device, progress=progress)
    for what in ("onset", "detection", "agreement"):
        if summary[what]:
            typer.echo(aligned(summary[what]) + "\n")


def _scenario(
    name: str | None,
    model: str | None,
    prompts: Path | None,
    general: Path | None,
    images: Path | None,
    similarity: str | None,
    threshold: float | None,
    option: list[str] | None,
    **sampled: Any,
) -> Scenario:
    """The scenario that the options describe. Raises what `scenario.load` raises."""
    from ..scenario import load

    paths = {"memorized": prompts, "general": general, "images": images}
    given = {field: None if path is None else str(path) for field, path in paths.items()} | sampled
    given |= {"similarity": similarity, "threshold": threshold, "options": options.of_call(option) or None}
    return load(name, model=model, **given)
