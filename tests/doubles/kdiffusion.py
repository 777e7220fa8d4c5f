"""The package k-diffusion's own `sampling` and `external`, without what the rest of it imports (training, wandb, clip)."""

import importlib.util
import sys
from types import ModuleType

import pytest


def package():
    """(sampling, external) of the installed package; skips the test where there is none."""
    found = importlib.util.find_spec("k_diffusion")  # finds it without running it
    if found is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion")
    if "k_diffusion" not in sys.modules:
        sys.modules["k_diffusion"] = whole = ModuleType("k_diffusion")
        whole.__path__ = list(found.submodule_search_locations)
        for name in ("torchdiffeq", "torchvision", "torchvision.transforms"):
            if importlib.util.find_spec(name.split(".")[0]) is None:
                stand_in(name)
    return importlib.import_module("k_diffusion.sampling"), importlib.import_module("k_diffusion.external")


def stand_in(name):
    """An empty module: what `sampling` and `external` import, and no sampler calls."""
    sys.modules[name] = module = ModuleType(name)
    module.odeint = module.functional = None
    module.__path__ = []
