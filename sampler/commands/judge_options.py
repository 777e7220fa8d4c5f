"""The options of `basinescape judge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from . import options


@dataclass(frozen=True)
class What:
    """Which pictures, and where the verdicts are written."""

    TITLE: ClassVar = "What"
    images: Annotated[
        str,
        typer.Option(
            help="with their prompts: a folder with .txt files, metadata.jsonl or a run of generate; .jsonl, .tar or .parquet; "
            "PNG files that hold their prompt; or a pattern of such names"
        ),
    ]
    out: Annotated[Path, typer.Option(help="folder for judge.csv and judge.html")]
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: the i-th of n parts, from 0, in OUT/shard-i-of-n; then once without it, to put them together"),
    ] = None
    on_error: options.OnError = "stop"
    progress: options.Progress = True


@dataclass(frozen=True)
class Model(options.ModelOptions):
    """Which model, and how it is asked."""

    model: Annotated[
        str,
        typer.Option(
            help="that made the pictures: no other can judge them; default that of a run of generate", show_default=False
        ),
    ] = ""
    batch_size: Annotated[
        int | None, typer.Option(help="pictures judged together; default what the GPU's memory holds, 16 on a CPU")
    ] = None


@dataclass(frozen=True)
class Verdicts:
    """What is suspect."""

    TITLE: ClassVar = "Verdict"
    threshold: Annotated[
        float | None, typer.Option(help="score above which a picture is suspect; default as calibrated, else 0.3")
    ] = None
    calibration: Annotated[str | None, typer.Option(help="default calibration.json in the model's folder, if any")] = None
    rate: Annotated[
        float | None, typer.Option(help="with a calibration: share of ordinary pictures that are suspect; default a guard's")
    ] = None
    probes: Annotated[int, typer.Option(help="noises that a picture is judged by, a call of the network each")] = 2
    seed: Annotated[int, typer.Option(help="of the noises, the same for every picture")] = 0
