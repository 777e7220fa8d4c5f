"""Benchmarks of speed. All peers run interleaved in one process, and only peers whose results agree are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module

import torch
from basinescape import checks

from ..tables import Row

BENCHES = ("kernel", "step", "images", "engine")


def run(names: Sequence[str], device: torch.device | str | None = None, preset: str | None = None) -> Iterator[Row]:
    """Run the named benches, and yield each row when it is measured: what, peer, unit, median, spread, ratio and more.

    device: default "cuda" if there is a GPU, else "cpu". preset: "cpu", "cuda" or "quick"; default the name of the device.

    Raises ValueError for a missing device, RuntimeError if "kernel" would time interpreted kernels or peers of "engine" differ.
    """
    device = checks.device(device)
    for name in names:
        # Imported when asked for: `kernel` needs torch and triton alone, the others need diffusers.
        yield from getattr(import_module(f".{name}", __package__), name)(device, preset or device.type)
