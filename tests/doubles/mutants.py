"""Sources with one thing broken, to see that a check finds it."""

from __future__ import annotations

import importlib
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from basinescape.kernels.dispatch import jit

KERNELS = {
    "sums": ("sums_kernel", "gap_kernel"),
    "guide": ("guide_kernel",),
    "weight_decision": ("record_kernel",),
    "step": ("step_kernel", "tile_kernel"),
}
JITTED = {
    "tiles": ("tile_of", "read"),
    "rules": ("guided_prediction", "transition", "combined"),
    "sums": ("sums_of", "added", "total", "total_gap", "total_sums", *KERNELS["sums"]),
    "guide": KERNELS["guide"],
    "weight_decision": ("place", "find_transition", "factors", "record", *KERNELS["weight_decision"]),
    "step": ("mixed", "finish", *KERNELS["step"]),
}


def module(name: str) -> ModuleType:
    return importlib.import_module(f"basinescape.{name}")


def changed(source: str, old: str, new: str) -> str:
    """`source` with its only `old` replaced; AssertionError if that is not there once, and the mutant is no more."""
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in\n{source}"
    return source.replace(old, new)


def function(source: str, name: str, namespace: dict[str, Any]) -> FunctionType:
    """The function `name` that `source` defines, whose source can be inspected."""
    file = f"<mutant {name} {hash(source)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec", dont_inherit=True), namespace)
    return namespace[name]


@contextmanager
def mutant(where: str, name: str, old: str, new: str) -> Iterator[None]:
    """Let device function `name` of kernels/`where`.py be one in which `new` stands for `old`, and all that call it with it."""
    namespace: dict[str, Any] = {}
    for part in JITTED:
        namespace |= vars(module(f"kernels.{part}"))
    for part, names in JITTED.items():
        for each in names:
            source = textwrap.dedent(inspect.getsource(getattr(module(f"kernels.{part}"), each).fn)).removeprefix("@jit\n")
            source = changed(source, old, new) if (part, each) == (where, name) else source
            namespace[each] = jit(function(source, each, namespace))
    with ExitStack() as stack:
        for part, name in product(KERNELS, sum(KERNELS.values(), ())):
            if hasattr(module(f"kernels.{part}"), name):
                stack.enter_context(patch.object(module(f"kernels.{part}"), name, namespace[name]))
        yield


@contextmanager
def host_mutant(where: str, owner: str, name: str, old: str, new: str) -> Iterator[None]:
    """Let method `name` of class `owner` of `where` be one in which `new` stands for `old`."""
    home = module(where)
    cls = getattr(home, owner)
    source = textwrap.dedent(inspect.getsource(vars(cls)[name]))
    with patch.object(
        cls, name, function("from __future__ import annotations\n" + changed(source, old, new), name, dict(vars(home)))
    ):
        yield
