"""A loop in the style of the published scripts: one image at a time, and the host reads values back in every step.

It is written from the definitions of the methods, so the images of every guidance method are also checked against it.
"""

from __future__ import annotations

from typing import Any

import torch
from basinescape import At, Guidance
from basinescape.kernels.definition import is_minimum
from basinescape.models import adapt
from torch import Tensor


@torch.no_grad()
def published(pipe: Any, prompt: str, seed: int, steps: int, guidance: Guidance, height: int) -> Tensor:
    """Latents (1, C, h, w) of one square image under the pipeline's own scheduler and a guidance of constant scale."""
    scheduler, device = pipe.scheduler, pipe.device
    scheduler.set_timesteps(steps, device=device)
    model = adapt(pipe)
    inputs = model.encode([prompt], height, height).inputs
    noise = torch.randn((1, *model.shape(height, height)), generator=torch.Generator().manual_seed(seed))
    latents = (noise * scheduler.init_noise_sigma).to(device, pipe.unet.dtype)
    gaps: list[float] = []
    left = guidance.until is None
    for t in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        uncond, cond = pipe.unet(doubled, t, **inputs, return_dict=False)[0].chunk(2)
        gaps.append(torch.norm((cond - uncond).float()).item())
        if isinstance(guidance.until, At):
            left = t.item() <= guidance.until.timestep
        elif not left:
            left = len(gaps) > 2 and is_minimum(*gaps[-3:])
        weight = guidance.scale if left else guidance.before
        latents = scheduler.step(uncond + weight * (cond - uncond), t, latents, return_dict=False)[0]
    return latents
