"""What a sampler's call returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Output:
    """What a call returns.

    images:          a list of PIL images, or an array or tensor, as `output` asked; the latents for "latent". Of a video model
                     lists of frames, or an array or tensor (B, frames, ...).
    latents:         (B, C, h, w) final latents in the network's dtype.
    transition_step: (B,) int64 on the CPU, the step at which each sample's guidance changed; -1 for none, 0 for plain cfg.
    noise_gap:       (B, steps) float32 on the CPU, ||cond - uncond||_2 at each step, NaN where it was not computed.
    timesteps:       (steps,) float32 on the CPU, in the scheduler's units.
    attempts:        (B,) int64 on the CPU, how often a guard began each sample, whose transition and gaps are the last one's.
    score:           (B,) float32 on the CPU, how memorized it looks by its gaps, 1 where they are as usual: see `Rung.score`.
    suspect:         (B,) bool on the CPU, the samples that still look memorized. These three are None without a guard.
    finite:          (B,) bool on the CPU, whether a sample's latents, and its pixels where decoded, have neither NaN nor inf.
    nsfw_content_detected: (B) the safety checker's verdicts; such a picture is black. None without a checker, or undecoded.
    truncated:       (B) what was cut off each prompt at the text encoder's limit, "" for nothing.
    """

    images: Any
    latents: Tensor
    transition_step: Tensor
    noise_gap: Tensor
    timesteps: Tensor
    attempts: Tensor | None = None
    score: Tensor | None = None
    suspect: Tensor | None = None
    finite: Tensor | None = None
    nsfw_content_detected: list[bool] | None = None
    truncated: Sequence[str] = ()

    def judged(self, i: int) -> dict[str, Any]:
        """What a guard says of sample `i`, as plain data; nothing without one."""
        if self.attempts is None:
            return {}
        return {name: getattr(self, name)[i].item() for name in ("attempts", "score", "suspect")}
