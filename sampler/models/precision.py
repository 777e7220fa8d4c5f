"""Modules that compute in float32 for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, half precision weights are float32. Afterwards the same tensors are back in their places."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}  # by the tensor it stands for: one that is in two places stays one
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
