"""Maps of the noise gap: its square at each latent pixel, summed over a run's first calls of the network.

A memorized caption changes the prediction most where the training image has its content, so a map shows the copied region. A
guided run makes both predictions anyway: a map costs no calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..sampler import Sampler
from ..types import Branch, Network

TOP = 4.0  # times the usual gap: the brightest value of a map


class Heat:
    """Watches the first `calls` calls of a sampler's network, in one run at a time. `Sampler.wrapped` takes its `watch`."""

    def __init__(self, calls: int):
        self._calls, self._seen = calls, 0
        self._total: Tensor | None = None

    def watch(self, network: Network) -> Network:
        """Return a network that makes the same predictions and records their gaps, from now on."""
        self._seen, self._total = 0, None

        def watched(latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
            made = network(latents, timesteps, branch)
            if branch == "both" and self._seen < self._calls:
                uncond, cond = made.float().chunk(2)
                squares = (cond - uncond).square()
                self._total = squares if self._total is None else self._total + squares
                self._seen += 1
            return made

        return watched

    def maps(self, sampler: Sampler, usual: Sequence[float]) -> Tensor:
        """Return (B, h, w) float32 on the CPU: the gap of each latent pixel, relative to the usual one.

        usual: the usual gap of a whole picture in each call. A picture with these gaps has a map whose mean square is 1.
        Raises RuntimeError if no run was watched.
        """
        if self._total is None:
            raise RuntimeError("no run was watched")
        squares = sampler.model.unpacked(self._total, *sampler.size(), sampler.options)
        pixels = squares.flatten(1, -3).sum(dim=1).cpu()
        return (pixels * pixels[0].numel() / sum(gap**2 for gap in usual)).sqrt()


def in_grey(heat: Tensor) -> Image.Image:
    """Return a map (h, w) as a grey picture: black for 0, white for TOP and above."""
    return Image.fromarray((heat / TOP * 255).nan_to_num(0).clamp(0, 255).round().to(torch.uint8).numpy())


def overlaid(picture: Image.Image, heat: Image.Image) -> Image.Image:
    """Return the picture in grey, with red where its map is above the usual gap."""
    shown = np.asarray(heat, dtype=np.float32) * TOP / 255
    strength = Image.fromarray(np.uint8(np.clip((shown - 1) / (TOP - 1), 0, 1) * 255))
    grey = picture.convert("L").convert("RGB")
    return Image.composite(
        Image.new("RGB", grey.size, (255, 40, 0)), grey, strength.resize(grey.size, Image.Resampling.BICUBIC)
    )
