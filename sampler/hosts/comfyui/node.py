"""The node: its widgets, and what it does to a model."""

from __future__ import annotations

from typing import Any, NamedTuple

from basinescape.kernels.rules import RULES
from basinescape.transitions import At, Fallen, FirstMinimum, Rule

from .guided import CFGFunction

ID, NAME, CATEGORY = "BasinEscape", "Basin Escape (delayed or opposite guidance)", "sampling/custom_sampling/guiders"
DESCRIPTION = (
    "Keeps samples from reproducing training images: guidance is held back, or reversed, until a sample has left the basin of "
    "attraction of a training image; then it has the sampler's cfg. Connect it between the model and the sampler."
)
TIMESTEP, MINIMUM, FALLEN = "timestep", "first minimum of the noise gap", "noise gap has halved"


class Widget(NamedTuple):
    """A widget of the node: its ComfyUI type, and the type's options."""

    kind: str
    options: dict[str, Any]


WIDGETS = {
    "before": Widget(
        "Float",
        {
            "default": 0.0,
            "min": -100.0,
            "max": 100.0,
            "step": 0.1,
            "tooltip": "Guidance weight until the transition. 0 holds guidance back; below 0 it pushes away from the prompt "
            "(opposite guidance; the paper has -2).",
        },
    ),
    "until": Widget(
        "Combo",
        {
            "options": [TIMESTEP, MINIMUM, FALLEN],
            "default": TIMESTEP,
            "tooltip": "Where the transition is: at a timestep, or, for each sample, where the distance between its two "
            "predictions has its first minimum or has halved.",
        },
    ),
    "timestep": Widget(
        "Float",
        {
            "default": 680.0,
            "min": 0.0,
            "max": 1000.0,
            "step": 10.0,
            "tooltip": "With 'timestep': full guidance from this one on. 1000 is noise, 0 the image. A smaller one copies less "
            "and loses more of the prompt.",
        },
    ),
    "latest_step": Widget(
        "Int",
        {
            "default": -1,
            "min": -1,
            "max": 1000,
            "tooltip": "Otherwise: full guidance from this step on at the latest; -1: a sample may wait for ever.",
        },
    ),
    "rule": Widget(
        "Combo",
        {
            "options": list(RULES),
            "default": "cfg",
            "tooltip": "How the predictions are combined: plain classifier-free guidance, or a rule that keeps it in bounds.",
        },
    ),
}


def transition(until: str, timestep: float, latest_step: int) -> Rule:
    """The transition rule that the widgets stand for."""
    latest = None if latest_step < 0 else latest_step
    if until == TIMESTEP:
        return At(timestep)
    return FirstMinimum(latest=latest) if until == MINIMUM else Fallen(0.5, latest=latest)


def patched(model: Any, before: float, until: str, timestep: float, latest_step: int, rule: str) -> Any:
    """A clone of ComfyUI's `model` that is guided so. Raises ValueError for widgets that do not go together."""
    clone = model.clone()
    guided = CFGFunction(before, transition(until, timestep, latest_step), rule)
    clone.set_model_sampler_cfg_function(guided, disable_cfg1_optimization=True)
    return clone
