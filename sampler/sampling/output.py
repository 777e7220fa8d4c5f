"""What a sampler's call returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models import Decoded, Encoded
from ..schedulers.solver_coefficients import Solver
from .samples import Results


@dataclass(repr=False)
class Output:
    """What a call returns.

    images:          a list of PIL images, or an array or tensor, as `output` asked; the latents for "latent". Of a video model
                     lists of frames, or an array or tensor (B, frames, ...).
    latents:         (B, C, h, w), or another shape that the model's latents have; in the network's dtype, but float32 of Wan.
    transition_step: (B,) int64 on the CPU, the step at which each sample's guidance changed; -1 for none, 0 for plain cfg.
    noise_gap:       (B, steps) float32 on the CPU, ||cond - uncond||_2 at each step, NaN where it was not computed.
    timesteps:       (steps,) float32 on the CPU, in the scheduler's units.
    attempts:        (B,) int64 on the CPU, the attempts that a guard made; transition_step and noise_gap are the last one's.
    score:           (B,) float32 on the CPU, each picture's `basin_score`; the higher, the more like a copy.
    suspect:         (B,) bool on the CPU, the samples that still look like copies.
    calls:           (B,) int64 on the CPU, the predictions that each sample needed: one or two a network call, and two for each
                     noise that it was judged by. These four are None without a guard.
    finite:          (B,) bool on the CPU, whether a sample's latents, and its pixels where decoded, have neither NaN nor inf.
    nsfw_content_detected: (B) the safety checker's verdicts; a flagged picture is black. None without a checker, or undecoded.
    truncated:       (B) the text cut off each prompt at the text encoder's limit, "" for nothing.
    """

    images: Any
    latents: Tensor
    transition_step: Tensor
    noise_gap: Tensor
    timesteps: Tensor
    attempts: Tensor | None = None
    score: Tensor | None = None
    suspect: Tensor | None = None
    calls: Tensor | None = None
    finite: Tensor | None = None
    nsfw_content_detected: list[bool] | None = None
    truncated: Sequence[str] = ()

    def __repr__(self) -> str:
        """A short summary, without the tensors."""
        shape = " x ".join(map(str, self.latents.shape[1:]))
        parts = [f"{len(self.latents)} images", f"latents {shape}", f"transition steps {self.transition_step.tolist()}"]
        if self.score is not None and self.suspect is not None:
            parts.append(f"scores {[round(score, 2) for score in self.score.tolist()]}, {int(self.suspect.sum())} suspect")
        if self.finite is not None and not bool(self.finite.all()):
            parts.append(f"{int((~self.finite).sum())} not finite")
        return f"Output({', '.join(parts)})"

    def judged(self, i: int) -> dict[str, Any]:
        """The guard's attempts, score and verdict of sample `i`, as plain data; empty without a guard."""
        if self.attempts is None:
            return {}
        return {name: getattr(self, name)[i].item() for name in ("attempts", "score", "suspect")}

    @classmethod
    def of(
        cls, results: Results, encoded: Encoded, solver: Solver, output: str, decode: Callable[[Tensor, str], Decoded]
    ) -> Output:
        """Decode a batch, and return its output. Runs in inference mode, but returns ordinary tensors."""
        latents = results.latents.clone()  # the next batch of a captured step overwrites them
        finite = latents.isfinite().flatten(1).all(dim=1).cpu()
        images, flagged = latents, None
        if output != "latent":
            decoded = decode(latents, output)
            images, flagged, finite = decoded.images, decoded.flagged, finite & decoded.finite
        transition, gaps = results.transition.cpu(), results.gaps.cpu()
        timesteps = solver.timesteps[solver.first_calls]
        judged = results.attempts, results.score, results.suspect, results.calls
        made: list[Any] = [images, latents, transition, gaps, timesteps, *judged, finite, flagged, encoded.truncated]
        with torch.inference_mode(False):
            owned: list[Any] = [value.clone() if isinstance(value, Tensor) else value for value in made]
            return cls(*owned)

    @classmethod
    def joined(cls, parts: Sequence[Output]) -> Output:
        """Join the outputs of several batches, one after the other. They must have the same steps and settings."""
        if len(parts) == 1:
            return parts[0]
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        return cls(
            **{name: _joined(values) for name, values in columns.items() if name != "timesteps"}, timesteps=parts[0].timesteps
        )


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    return np.concatenate(values) if isinstance(first, np.ndarray) else list(chain.from_iterable(values))
