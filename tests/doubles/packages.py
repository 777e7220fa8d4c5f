"""Packages that need not be installed, as the benchmarks use them: xformers by torch's attention, Ray in this process.

What xformers' kernels compute, and what other processes and machines do, is not seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """xformers', of (B, tokens, channels), as diffusers calls it."""
    return functional.scaled_dot_product_attention(query, key, value, attn_bias, p, scale=scale)


class Actor:
    """A worker of Ray's, which does its work when it is asked."""

    def __init__(self, made: object) -> None:
        self.made = made

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.made, name))


class Cluster:
    """Ray on one machine; like Ray, it has the GPUs that it finds unless it is told how many."""

    def __init__(self) -> None:
        self.resources: dict[str, float] | None = None

    def init(self, num_cpus: int = 2, num_gpus: int | None = None, **_: Any) -> None:
        self.resources = {"CPU": num_cpus, "GPU": int(torch.cuda.is_available()) if num_gpus is None else num_gpus}

    def shutdown(self) -> None:
        self.resources = None

    def remote(self, **_: Any) -> Any:
        return lambda kind: SimpleNamespace(remote=lambda *given: Actor(kind(*given)))


@contextmanager
def installed() -> Iterator[None]:
    """Inside, both can be imported, and diffusers knows of xformers."""
    from diffusers.models import attention_processor

    found = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "ray")}
    for name, module in found.items():
        module.__spec__ = ModuleSpec(name, None)
    cluster, (package, ops, ray) = Cluster(), found.values()
    package.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
    vars(ray).update(
        init=cluster.init,
        shutdown=cluster.shutdown,
        remote=cluster.remote,
        is_initialized=lambda: cluster.resources is not None,
        cluster_resources=lambda: cluster.resources,
        get=lambda made: made,
        wait=lambda made, timeout: (made, []),
        kill=lambda worker: None,
        exceptions=SimpleNamespace(RayError=RuntimeError),
    )
    with (
        patch.dict(sys.modules, found),
        patch.object(attention_processor, "xformers", package),
        patch.object(attention_processor, "is_xformers_available", lambda: True),
    ):
        yield
