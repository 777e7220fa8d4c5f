"""`basinescape merge`: join the shards of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="the --out of a run that was made with --shard")],
    out: Annotated[Path, typer.Option(help="folder for the run as if made in one, which generate can go on with")],
) -> None:
    """Make one run of a run's shards. Files of an image are linked where the file system can, else copied.

    Exit code 1 where images are missing: `verify` names them.
    """
    from ..data.merge import merge

    images, total = merge(run, out)
    typer.echo(f"{images} of {total} images in {out}")
    if images < total:
        raise typer.Exit(1)
