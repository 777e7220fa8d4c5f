"""Which implementation a device gets: decided when the package is imported, and visible in `backend`."""

from __future__ import annotations

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
    """The implementation that runs on `device`: "triton", "triton-interpreter" (TRITON_INTERPRET=1) or "eager"."""
    if INTERPRETED:
        return "triton-interpreter"
    return "triton" if triton and torch.device(device).type == "cuda" else "eager"
