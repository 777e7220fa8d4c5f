"""Detects changes of a module, after which everything made from it, such as a compiled network, must be made again.

A `Snapshot` holds all that decides a module's results, except the contents of its tensors: the modules, parameters, hooks and
processors, the tensors' addresses, and every plain attribute. So it notices hooks, FreeU, and a LoRA that is loaded, scaled,
switched off or merged.
"""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

_CODE = (type, FunctionType, MethodType, BuiltinFunctionType)


class Snapshot:
    """The state of an object, of a module's submodules too, and of the objects they hold, such as attention processors."""

    def __init__(self, thing: Any):
        parts = list(thing.modules()) if isinstance(thing, nn.Module) else [thing]
        held = [value for part in parts for value in vars(part).values() if _has_state(value)]
        self._kept = [(vars(part), _copied(vars(part))) for part in (*parts, *held)]
        self._tensors = [x for part in parts for x in _tensors(part)]
        self._addresses = [_address(x) for x in self._tensors]

    def holds(self) -> bool:
        """Whether the state is unchanged."""
        try:  # identity first, and in C: a thousand modules take a millisecond or two
            same = all(now == then for now, then in self._kept)
        except (RuntimeError, TypeError, ValueError):  # two arrays compared
            return False
        return same and all(_address(x) == was for x, was in zip(self._tensors, self._addresses, strict=True))


def checksum(module: nn.Module) -> list[int]:
    """Return a checksum of each parameter's bits, for uses that depend on the tensors' contents. For modules on the CPU."""
    return [crc32(part.detach().contiguous().view(-1).view(torch.uint8).numpy().data) for part in module.parameters()]


def _has_state(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, *_CODE))


def _copied(value: Any) -> Any:
    """Copy dicts, lists and sets, but not the objects in them."""
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, (list, set)):
        return type(value)(map(_copied, value)) if type(value) in (list, set) else value
    return value


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, nn.Module):
        return [x for x in (*part._parameters.values(), *part._buffers.values()) if x is not None]
    return [x for x in vars(part).values() if isinstance(x, Tensor)]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor without memory of its own
        return 0
