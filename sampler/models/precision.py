"""A context in which modules compute in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which half precision parameters and buffers are float32. On exit the original tensors are restored."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}  # by the original's id, so that a shared tensor stays shared
    try:
        for module in modules:
            for part in module.modules():
                holders: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
                for places in holders:
                    for name, tensor in places.items():
                        if tensor is None or tensor.dtype not in HALF:
                            continue
                        if id(tensor) not in made:
                            full = tensor.detach().float()
                            made[id(tensor)] = nn.Parameter(full, False) if isinstance(tensor, nn.Parameter) else full
                        kept.append((places, name, tensor))
                        places[name] = made[id(tensor)]
        yield
    finally:
        for places, name, tensor in kept:
            places[name] = tensor
