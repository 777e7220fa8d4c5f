"""What figures and images owe to the machine: the versions of what computes them, and the device."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("basinescape", "torch", "triton", "diffusers", "transformers", "xformers")


@contextmanager
def own_numbers() -> Iterator[None]:
    """Inside, or in a function that it decorates, torch computes as a pipeline's dtypes say, whatever a caller has around it:
    autocast, another default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def environment(device: torch.device) -> dict[str, Any]:
    """device, a GPU by its name; versions, of Python, of CUDA where torch has it, and of those PACKAGES that are there."""
    versions = {"python": platform.python_version()} | {name: found for name in PACKAGES if (found := version_of(name))}
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, "versions": versions}


def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
