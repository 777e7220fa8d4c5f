"""Float32 for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Half precision weights are float32 inside; afterwards the same tensors are in their places again."""
    kept: list[tuple[dict[str, Tensor], str, Tensor]] = []
    made: dict[int, Tensor] = {}  # a tensor in two places stays one
    try:
        for module in modules:
            for part in module.modules():
                for places in (part._parameters, part._buffers):
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
