"""`basinescape verify`: check whether the images of a run are as they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(out: Annotated[Path, typer.Argument(metavar="DIR", help="folder written by generate")]) -> None:
    """Check that a run's folder holds all its images as they were made, and nothing else.

    Exit code 1, and a line each, for images that are missing, changed or failed, damaged lines of manifest.jsonl, and files
    that are none of the run's.
    """
    from ..data.verify import verify

    wrong = 0
    for file, what in verify(out):
        typer.echo(f"{file} {what}")
        wrong += 1
    if wrong:
        raise typer.Exit(1)
    typer.echo(f"all images of {out} are there as they were made")
