"""Which step of a run each call of the model belongs to, from its noise level alone."""

from __future__ import annotations

import math
from typing import Any

NEAR = 1e-4  # relative; sigmas that a sampler computes from logarithms are off the schedule by less
AHEAD = 2  # how many steps a sampler looks ahead at most


class StepOfSigma:
    """The steps of a run, and the one that its sampler is at.

    sigmas: of each step, falling. twice: the sampler calls the model twice at each. step: of the last call, -1 before it.
    returns: how often the sampler has gone back to an earlier step.

    A call belongs to the last step whose sigma is not below the call's. The first call there is the first of its step. A call
    whose sigma is not lower than that of the call before it means one of three things:

    - The sampler had looked ahead (Heun), if this call is the next step's. From then on a lower call is another one of the same
      step, unless a call between the two steps was made.
    - The sampler calls the model twice in each step, if `twice` says so. Then no step is begun.
    - Else the sampler has gone back. The step begins anew.
    """

    def __init__(self, sigmas: list[float], twice: bool = False):
        self.sigmas, self.twice = sigmas, twice
        self.step = -1
        self.returns = 0
        self._ahead = self._between = False
        self._sigma = math.inf  # of the last call

    def call(self, sigma: float) -> bool:
        """Note a call at this noise level. Return whether it begins its `step`; what was noted from there on is void then."""
        found = max(sum(known > sigma * (1 - NEAR) for known in self.sigmas) - 1, 0)
        lower, self._sigma = sigma < self._sigma * (1 - NEAR), sigma
        if found == self.step and (lower or self.twice):
            self._between = lower
            return False
        if lower and self._ahead and not self._between and found <= self.step + AHEAD:
            return False
        if not lower and found <= self.step:
            looked = 0 < found > self.step - AHEAD and math.isclose(self.sigmas[found], sigma, rel_tol=NEAR)
            self._ahead |= looked
            self.returns += not looked
        self.step, self._between = found, False
        return True


def evaluates_twice(sampler: Any) -> bool:
    """Whether one of ComfyUI's samplers calls the model a second time at a step's own noise level, to correct it."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    return name == "sample_sa_solver_pece" or bool(getattr(sampler, "extra_options", {}).get("use_pece"))
