"""basinescape: a sampler for guided diffusion models that keeps samples from reproducing training images."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded when first asked for: `basinescape.kernels` needs torch and triton alone, the sampler needs diffusers.
_HOMES = {"Calibration": "calibration.calibration", "Guidance": "guidance.guidance", "Guard": "guidance.guard"}
_HOMES |= dict.fromkeys(("At", "Fallen", "FirstMinimum", "Settled"), "guidance.transitions")
_HOMES |= {"Escape": "hosts.escape", "escape": "hosts.pipelines", "Output": "sampling.output", "Sampler": "sampler"}
__all__ = ["At", "Calibration", "Escape", "Fallen", "FirstMinimum", "Guard", "Guidance", "Output", "Sampler", "Settled"]
__all__ += ["escape"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
