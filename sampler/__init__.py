"""basinescape: a sampler for guided diffusion models that keeps samples from reproducing training images.

Every public name can be imported from here. The first access to a name imports its module, so that `basinescape.kernels`
needs only torch and triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` does the same
    from .auditing.caption_audit import audit
    from .auditing.set_verdicts import judge
    from .bulk.generate import generate
    from .bulk.settings import Files, Placement, Recipe
    from .calibration.calibration import Calibration
    from .data.prompts import Job
    from .guidance.guard import Guard
    from .guidance.guidance import Guidance
    from .guidance.transitions import At, Fallen, FirstMinimum, Settled
    from .hosts.escape_pipeline import escape
    from .hosts.kdiffusion import EscapeDenoiser
    from .hosts.modular import BasinEscapeGuidance
    from .hosts.own_loop import Escape
    from .sampler import Sampler
    from .sampling.output import Output

__version__ = "0.1.0"
__all__ = [
    "At",
    "BasinEscapeGuidance",
    "Calibration",
    "Escape",
    "EscapeDenoiser",
    "Fallen",
    "Files",
    "FirstMinimum",
    "Guard",
    "Guidance",
    "Job",
    "Output",
    "Placement",
    "Recipe",
    "Sampler",
    "Settled",
    "audit",
    "escape",
    "generate",
    "judge",
]
_MODULES = {
    "audit": "auditing.caption_audit",
    "judge": "auditing.set_verdicts",
    "generate": "bulk.generate",
    **dict.fromkeys(("Files", "Placement", "Recipe"), "bulk.settings"),
    "Calibration": "calibration.calibration",
    "Job": "data.prompts",
    "Guard": "guidance.guard",
    "Guidance": "guidance.guidance",
    **dict.fromkeys(("At", "Fallen", "FirstMinimum", "Settled"), "guidance.transitions"),
    "Escape": "hosts.own_loop",
    "EscapeDenoiser": "hosts.kdiffusion",
    "BasinEscapeGuidance": "hosts.modular",
    "escape": "hosts.escape_pipeline",
    "Sampler": "sampler",
    "Output": "sampling.output",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
