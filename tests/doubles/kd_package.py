"""The package k-diffusion's own `sampling` and `external`, without what the rest of it imports (training, wandb, clip)."""

import functools
import importlib.util
import sys
from types import ModuleType

import pytest


@functools.cache
def package():
    """(sampling, external) of the installed package; skips the test where there is none."""
    found = importlib.util.find_spec("k_diffusion")  # finds it without running it
    if found is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion")
    needed = [name for name in ("torchdiffeq", "torchvision") if importlib.util.find_spec(name) is None]
    if "torchvision" in needed:
        needed.append("torchvision.transforms")
    whole = ModuleType("k_diffusion")
    whole.__path__ = list(found.submodule_search_locations)
    sys.modules |= {"k_diffusion": whole} | {name: stand_in(name) for name in needed}
    importlib.import_module("k_diffusion.external")
    for name in needed:  # nobody else shall find them
        del sys.modules[name]
    return sys.modules["k_diffusion.sampling"], sys.modules["k_diffusion.external"]


def stand_in(name):
    """What `sampling` and `external` import, and no sampler calls."""
    module = ModuleType(name)
    module.odeint = module.functional = None
    module.__path__ = []
    return module
