"""The guidance as widgets of the graphical hosts (ComfyUI, the webuis, InvokeAI), and what their settings stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..checks import share
from ..guidance.guidance import Guidance
from ..guidance.transitions import RULES as TRANSITIONS
from ..guidance.transitions import At, Fallen, FirstMinimum, Transition
from ..kernels.rules import RULES

TIMESTEP, MINIMUM, FALLEN = At.label, FirstMinimum.label, Fallen.label
UNTIL = {rule.label: rule for rule in TRANSITIONS.values() if rule.label}  # what a menu offers


class Widget(NamedTuple):
    """A widget: its type as ComfyUI names it, the type's options, and its tooltip."""

    kind: str
    options: dict[str, Any]
    tooltip: str


WIDGETS = {
    "before": Widget(
        "Float",
        {"default": 0.0, "min": -100.0, "max": 100.0, "step": 0.1},
        "Guidance weight until the transition. 0 holds guidance back; below 0 it pushes away from the prompt (opposite "
        "guidance; the paper has -2).",
    ),
    "until": Widget(
        "Combo",
        {"default": TIMESTEP, "options": list(UNTIL)},
        "Where the transition is: at a timestep, or, for each sample, where the distance between its two predictions has its "
        "first minimum or has halved.",
    ),
    "timestep": Widget(
        "Float",
        {"default": 680.0, "min": 0.0, "max": 1000.0, "step": 10.0},
        "With 'timestep': full guidance from this one on. 1000 is noise, 0 the image. A smaller one copies less and loses more "
        "of the prompt. Otherwise: a run that begins at or below it (a second pass) is guided in full.",
    ),
    "latest": Widget(
        "Float",
        {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.05},
        "Without 'timestep': full guidance from this share of the steps on at the latest, but not before the gap can show a "
        "minimum or a fall. 1: a sample may wait for ever.",
    ),
    "rule": Widget(
        "Combo",
        {"default": "cfg", "options": list(RULES)},
        "How the predictions are combined: plain classifier-free guidance, or a rule that keeps it in bounds.",
    ),
}


@dataclass(frozen=True)
class Settings:
    """What the widgets are set to. Raises ValueError for what is out of range."""

    before: float
    until: str
    timestep: float
    latest: float
    rule: str

    def __post_init__(self) -> None:
        if self.until not in list(UNTIL):
            raise ValueError(f"until must be one of {', '.join(UNTIL)}; got {self.until!r}")
        self.guidance(1.0, [1000.0])

    def guidance(
        self, scale: float, timesteps: list[float], goes_on: bool = False, shape: str | tuple[float, ...] = "static"
    ) -> Guidance:
        """Return the guidance of a run with steps at these timesteps in 0..1000. scale: after the transition.

        Unless `until` is TIMESTEP, guidance is full in a run that continues another one, or begins at or below `timestep`.
        """
        until: Transition | None = At(self.timestep)
        if self.until != TIMESTEP:
            rule = UNTIL[self.until]
            step = max(round(share("latest", self.latest) * len(timesteps)), rule.earliest_step)
            deadline: dict[str, Any] = {"latest": step} if "latest" in rule.field_names() else {}
            until = None if goes_on or timesteps[0] <= self.timestep else rule.asked(**deadline)
        return Guidance(scale, self.before, until, shape, rule=self.rule)
