"""What the commands that make or judge a set share: the shard option, the progress display, Ctrl-C, and the summary."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
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
    """Print a run's summary. Raises typer.Exit: 1 if images failed, 128 + its number if a signal stopped the run."""
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
    """Return (i, n) for "i/n", None for None. Raises ValueError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(f"shard must be i/n with i from 0 to n - 1, such as 0/8, got {text!r}")
    return int(found[1]), int(found[2])


def looked_at(log: str, metrics: int | None, host: str, progress: bool) -> Progress:
    """Return the display of a run's progress. With log "json", warnings and errors are JSON, too."""
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
    """In this context, Ctrl-C (during a run, the second one) exits with 130 and a message on how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nstopped at once, what was begun is lost: the same command makes all that is left", err=True)
        raise typer.Exit(130) from None


@contextmanager
def going_on(out: Path) -> Iterator[None]:
    """In this context, Ctrl-C exits with 130 and a message on how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; what was done is in {out}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
