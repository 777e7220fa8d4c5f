"""What a user sets in a graphical host: the widgets of ComfyUI's node and of the webuis' script, and what they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..checks import share
from ..guidance.transitions import RULES as TRANSITIONS
from ..guidance.transitions import At, Fallen, FirstMinimum, Transition
from ..kernels.rules import RULES

TIMESTEP, MINIMUM, FALLEN = At.label, FirstMinimum.label, Fallen.label
UNTIL = {rule.label: rule for rule in TRANSITIONS.values() if rule.label}  # what a menu offers


class Widget(NamedTuple):
    """A widget: its type, as ComfyUI names it, and the type's options."""

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
            "options": list(UNTIL),
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
            "and loses more of the prompt. Otherwise: a run that begins at or below it (a second pass) is guided in full.",
        },
    ),
    "latest": Widget(
        "Float",
        {
            "default": 0.5,
            "min": 0.0,
            "max": 1.0,
            "step": 0.05,
            "tooltip": "Without 'timestep': full guidance from this share of the steps on at the latest, but not before the "
            "gap can show a minimum or a fall. 1: a sample may wait for ever.",
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


def transition(until: str, timestep: float, latest: float, timesteps: list[float], goes_on: bool) -> Transition | None:
    """The transition rule that the widgets stand for in a run with steps at these timesteps.

    None where the run begins past its transition: it goes on from another run's latents, or begins at or below `timestep`.
    Raises ValueError for widgets out of range.
    """
    if until == TIMESTEP:
        return At(timestep)
    rule = UNTIL[until]
    step = max(round(share("latest", latest) * len(timesteps)), rule.earliest_step)
    deadline: dict[str, Any] = {"latest": step} if "latest" in rule.field_names() else {}
    return None if goes_on or timesteps[0] <= timestep else rule.asked(**deadline)
