"""The choice of an implementation for a device, made when the package is imported (`backend`); and kernel launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only installation: kernels stay plain functions that nothing calls
    triton = tl = None

jit = triton.jit if triton else lambda fn: fn

# Triton reads TRITON_INTERPRET when a kernel is decorated, so the answer holds for the life of the process.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def backend(device: torch.device | str) -> str:
    """The implementation that runs on `device`: "triton", "triton-interpreter" (TRITON_INTERPRET=1) or "eager".

    "meta" stands for a GPU.
    """
    if INTERPRETED:
        return "triton-interpreter"
    return "triton" if triton and torch.device(device).type in ("cuda", "meta") else "eager"


@dataclass(frozen=True)
class Launch:
    """The arguments of one kernel launch, `kernel[(programs,)](*arguments, **options)`."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Launch] | None = None


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Run `programs` programs of a kernel. Inside `recorded`, append a `Launch` to its list instead."""
    if _recorded is None:
        kernel[(programs,)](*arguments, **options)
    else:
        _recorded.append(Launch(kernel, programs, arguments, options))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect all launches of the `with` block in the list; they do not run."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None
