"""One run of a sampler that goes by noise levels, in ComfyUI or a webui: the step it is at, and the guidance of its calls."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from torch import Tensor

from ..kernels.state import TransitionState, per_sample
from .guidance_widgets import Settings
from .noise_levels import scalings, timestep
from .own_loop import Escape
from .step_of_sigma import StepOfSigma

logger = logging.getLogger(__name__)


class SamplerRun:
    """The guidance of one run of a sampler.

    settings: of the guidance. steps: of the sampler. model: the one that `noise_levels` describes. x: (B, ...), the latents of
    its first call. scale: in that call. goes_on: the run goes on from another run's latents.

    `state` is its `Escape`. Each call of the model is one `begin_call`, then one `guided`, which combines the predictions.
    """

    def __init__(self, settings: Settings, steps: StepOfSigma, model: Any, x: Tensor, scale: float, goes_on: bool = False):
        self.steps, self.model, self.scale = steps, model, scale
        self.timesteps = [timestep(model, sigma) for sigma in steps.sigmas]
        self._guidance = partial(settings.guidance, timesteps=self.timesteps, goes_on=goes_on)
        self.state = self._at(scale, x)
        self._marks: list[tuple[int, TransitionState]] = []  # (a step begun, what had been noted before it)

    def begin_call(self, sigma: Tensor) -> None:
        """Go to the next call of the model, at noise level sigma (B,), the same for all."""
        first = self.steps.call(float(sigma.reshape(-1)[0]))
        if first:
            while self._marks and self._marks[-1][0] >= self.steps.step:
                self.state.forget(self._marks.pop()[1])
            self._marks.append((self.steps.step, self.state.mark()))
        self.state.seek(2 * self.steps.step + (not first))

    @property
    def needs_cond(self) -> bool:
        """Whether the call may need the conditional prediction. It needs none before the transition at weight 0."""
        # A scale of 0 may have changed by the time that the predictions are combined.
        return self.scale == 0 or self.state.branch() != "uncond"

    def guided(self, x: Tensor, sigma: Tensor, uncond: Tensor, cond: Tensor | None, scale: float) -> Tensor:
        """Return the guided denoised prediction, (B, ...), from the model's, (B, ...) each; cond: None where it has no weight.

        x: (B, ...) of the call. sigma: (B,), or one for all. scale: after the transition; it may change from call to call.
        """
        if scale != self.scale:
            last, self.scale = self.state, scale
            self.state = self._at(scale, x)
            self.state.forget(last.mark())
            self.state.seek(last.calls)
        skip, out = (per_sample(part, x) for part in scalings(self.model, sigma.reshape(-1).expand(len(x)).to(x)))
        return skip * x + out * self.state((uncond - skip * x) / out, None if cond is None else (cond - skip * x) / out)

    def report(self, finished: bool) -> None:
        """Log what became of each sample: a warning where it never had full guidance and its picture is finished."""
        each = zip(self.state.transition_step.tolist(), self.state.noise_gap.tolist(), strict=True)
        for i, (step, gaps) in enumerate(each, start=1):
            where = "no full guidance" if step < 0 else f"full guidance from step {step} (timestep {self.timesteps[step]:.0f})"
            shown = " ".join(f"{k}:{gap:.4g}" for k, gap in enumerate(gaps) if gap == gap) or "not computed"
            logger.log(
                logging.WARNING if finished and step < 0 else logging.INFO,
                f"Basin Escape: sample {i} of {self.state.batch}, {len(gaps)} steps from timestep {self.timesteps[0]:.0f}: "
                f"{where}; noise gap of each step: {shown}",
            )
        if self.steps.returns:
            logger.info(f"Basin Escape: the sampler went back {self.steps.returns} times; what it did again counts")

    def _at(self, scale: float, x: Tensor) -> Escape:
        calls = [k // 2 for k in range(2 * len(self.timesteps))]  # the first of each step, and all others of it
        return Escape(self._guidance(scale), self.timesteps, len(x), x.device, calls)
