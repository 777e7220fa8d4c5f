"""The machine that figures and images were made on: its device, and the versions of the libraries that compute."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("basinescape", "torch", "triton", "diffusers", "transformers", "xformers")


@contextmanager
def own_numbers() -> Iterator[None]:
    """A context, or a decorator, in which torch computes in a pipeline's own dtypes.

    A caller's autocast, default dtype and default device have no effect in it.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # Only where it changes something: every call of torch passes through the context of a device.
        device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
        with device, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def environment(device: torch.device) -> dict[str, Any]:
    """The device, a GPU by its name, and the versions of Python, CUDA (where torch has it) and the installed PACKAGES."""
    versions = {"python": platform.python_version()} | {name: found for name in PACKAGES if (found := version_of(name))}
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, "versions": versions}


@cache
def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def library(name: str, what: str, package: str | None = None, install: str | None = None) -> Any:
    """Import the module `name` of an optional package. Raises ImportError, which begins with `what`, if it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        package = package or name
        raise ImportError(f"{what} the package {package}: pip install {install or package}") from error
