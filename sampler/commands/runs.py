"""Commands about the folders of `generate`: what a run came to, whether its images are what they were, shards made one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .. import Sampler
    from ..runs.progress import Progress, Summary

NOTES = {  # kinds of images -> (what is said of them, the field of the manifest that says more)
    "again": ("looked memorized and began again", "attempts"),
    "suspect": ("may still be copies of training images", "suspect"),
    "copies": ("marked as copies of training images", "copy and nearest"),
    "duplicates": ("near-duplicates of other images of the set", "duplicate_of"),
    "truncated": ("cut at the text encoder's limit", "truncated"),
    "flagged": ("flagged and blacked out", "nsfw_content_detected"),
    "failed": ("failed", "status"),
}


def conclude(summary: Summary, out: Path, model: str) -> None:
    """Say what a run came to; exits with 1 where images failed, with 128 + its number where a signal stopped it."""
    counts = summary.counts
    typer.echo(f"{summary.done} images in {out} ({counts['ok']} new)")
    if counts["ok"] + counts["failed"]:
        typer.echo(
            f"{counts['attempts']} attempts in {summary.seconds:.1f} s, {summary.rate:.3g} images/s by {model}, "
            f"{summary.calls_an_image:.4g} predictions of the network an image"
        )
    for kind, (what, field) in NOTES.items():
        if counts[kind]:
            ids = ", ".join(summary.ids[kind]) + (", ..." if counts[kind] > len(summary.ids[kind]) else "")
            typer.echo(f"{counts[kind]} {what} ({ids}): see {field} in manifest.jsonl", err=True)
    if summary.skipped:
        typer.echo(f"{summary.skipped} rows of the prompts skipped", err=True)
    if summary.signal is not None:
        typer.echo(f"stopped: {summary.left} of {summary.total} images are left; the same command makes them", err=True)
        raise typer.Exit(128 + summary.signal)
    if counts["failed"]:
        raise typer.Exit(1)


def shard_of(text: str | None) -> tuple[int, int] | None:
    """(i, n) of "i/n". Raises ValueError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(f"shard must be i/n with i from 0 to n - 1, such as 0/8, got {text!r}")
    return int(found[1]), int(found[2])


def spread(arguments: tuple, loading: dict[str, Any], workers: int | None) -> tuple[Callable[[], Sampler], str, str]:
    """How a cluster's workers load their samplers; device and dtype of this process's, which is looked at alone."""
    from .. import Sampler
    from ..bulk.ray import cluster
    from ..checks import at_least_one

    _, gpu = cluster(None if workers is None else at_least_one("workers", workers))
    source, device, dtype, *rest = arguments
    device, dtype = device or ("cuda" if gpu else "cpu"), dtype or ("float16" if gpu else "float32")
    return partial(Sampler.from_pretrained, source, device, dtype, *rest, **loading), "cpu", dtype


def looked_at(log: str, metrics: int | None, host: str, progress: bool) -> Progress:
    """What shows how far a run is; with "json", warnings and errors are JSON too."""
    from ..runs.progress import JsonFormatter, Progress

    shown = Progress(log, metrics, host=host)
    if shown.kind == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    if not progress:
        shown.kind = "none"
    return shown


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, Ctrl-C, or the second one of a run, which ends it at once, exits with 130 and a word about how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nstopped at once, what was begun is lost: the same command makes all that is left", err=True)
        raise typer.Exit(130) from None


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
