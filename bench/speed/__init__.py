"""Benchmarks of speed. All peers run in one process, interleaved, and only peers whose results agree are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module

import torch
from basinescape import checks

from ..tables import Row

BENCHES = ("kernel", "step", "images", "engine")


def run(names: Sequence[str], device: torch.device | str | None = None, preset: str | None = None) -> Iterator[Row]:
    """The rows of each named bench, as they are found: what, peer, unit, median, spread, ratio and more.

    device: default "cuda" where there is a GPU, else "cpu". preset: "cpu", "cuda" or "quick"; default the device's own.

    Raises ValueError for a device that is not there, RuntimeError where kernels are interpreted.
    """
    device = checks.device(device)
    for name in names:
        # Imported when asked for: `kernel` needs torch and triton alone, the others need diffusers.
        yield from getattr(import_module(f".{name}", __package__), name)(device, preset or device.type)
