"""How much memory the operators of a call read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITTEN = ("copy_", "fill_", "normal_", "zero_")  # their first argument is written without being read


class Traffic(TorchDispatchMode):
    """Inside, `bytes` grows by what every operator is given and what it makes. Views take nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        made, named = func(*args, **(kwargs or {})), dict(kwargs or {})
        if not func.is_view:
            named.pop("out", None)
            read = args[1:] if func.overloadpacket.__name__ in WRITTEN else args
            tensors = (one for one in tree_leaves((read, named, made)) if isinstance(one, Tensor))
            self.bytes += sum(one.numel() * one.element_size() for one in tensors)
        return made


def moved(call: Callable[[], object]) -> int:
    """The bytes that a call's operators read and write, each as if nothing were in a cache."""
    with Traffic() as traffic:
        call()
    return traffic.bytes
