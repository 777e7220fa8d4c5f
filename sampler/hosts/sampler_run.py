"""One run of a sampler that goes by noise levels, in ComfyUI or a webui: where it stands, and what guides its calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..guidance.guidance import Guidance
from ..kernels.state import Transition, per_sample
from ..schedulers.schedule import timestep_of_ratio
from .escape import Escape
from .sigma_steps import Steps

logger = logging.getLogger(__name__)


class Run:
    """The guidance of one run of a sampler.

    guidance: of the run, at a scale. scale: of its first call. steps: those of the sampler. timesteps: of each, in 0..1000.
    batch, device: of the latents.

    `state` is its `Escape`. `go` says that the model is called; then `guided` combines what it returned.
    """

    def __init__(
        self,
        guidance: Callable[[float], Guidance],
        scale: float,
        steps: Steps,
        timesteps: list[float],
        batch: int,
        device: torch.device,
    ):
        self.guidance, self.scale, self.steps, self.timesteps = guidance, scale, steps, timesteps
        self.state = self._at(scale, batch, device)
        self._marks: list[tuple[int, Transition]] = []  # (a step begun, what had been noted before it)

    def go(self, sigma: Tensor) -> None:
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
        # A scale of 0 may be another one by the time that the predictions are combined.
        return self.scale == 0 or self.state.branch() != "uncond"

    def guided(self, x: Tensor, sigma: Tensor, uncond: Tensor, cond: Tensor | None, scale: float, sampling: Any) -> Tensor:
        """The denoised prediction, (B, ...), from those that the model made, (B, ...) each; cond: None where it has no weight.

        x: (B, ...) of the call. sigma: (B,), or one for all. scale: after the transition; it may be another one in each call.
        sampling: of the model, as `scalings` takes it.
        """
        if scale != self.scale:
            last, self.scale = self.state, scale
            self.state = self._at(scale, last.batch, last.device)
            self.state.forget(last.mark())
            self.state.seek(last.calls)
        skip, out = (per_sample(part, x) for part in scalings(sampling, sigma.reshape(-1).expand(len(x)).to(x)))
        return skip * x + out * self.state((uncond - skip * x) / out, None if cond is None else (cond - skip * x) / out)

    def report(self, finished: bool) -> None:
        """Log what became of each sample: a warning where its last step is done and it was never guided."""
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

    def _at(self, scale: float, batch: int, device: torch.device) -> Escape:
        calls = [k // 2 for k in range(2 * len(self.timesteps))]  # the first of each step, and all others of it
        return Escape(self.guidance(scale), self.timesteps, batch, device, calls)


def scalings(model: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out), (B,) each, of denoised = c_skip x + c_out * (what the network returned).

    model: what ComfyUI calls a model sampling and Forge a predictor.
    """
    one, zero = torch.ones_like(sigma)[:, None], torch.zeros_like(sigma)[:, None]
    return model.calculate_denoised(sigma, zero, one).flatten(), model.calculate_denoised(sigma, one, zero).flatten()


def timestep(model: Any, sigma: float) -> float:
    """The timestep in 0..1000 of a noise level: 1000 sigma for flow matching, the model's own where it has 1000, else that at
    which Stable Diffusion has the same ratio of noise to data."""
    level = torch.tensor([sigma])
    clean = float(model.noise_scaling(level, torch.zeros(1), torch.ones(1)))
    if clean < 1:
        return 1000 * sigma
    if getattr(model, "num_timesteps", None) == 1000:
        return float(model.timestep(level))
    return float(timestep_of_ratio(level / getattr(model, "sigma_data", 1.0)))
