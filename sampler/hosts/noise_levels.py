"""What the noise levels of a denoiser mean: its scalings, its timesteps in 0..1000, and how its pictures are judged.

A model is one of three: a k-diffusion wrapper of a network; what ComfyUI calls a model sampling and Forge a predictor; or any
other denoiser, whose network predicts noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..detection.basin_score import LOG_SNR, Probe
from ..schedulers.schedule import timestep_of_ratio

UNEVEN = {"sample_dpm_fast", "sample_dpm_adaptive"}  # k-diffusion's samplers whose steps are not those of a schedule


def scalings(model: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out), (B,) each, of denoised = c_skip x + c_out * (what the network returned). sigma: (B,)."""
    one = torch.ones_like(sigma)
    if hasattr(model, "calculate_denoised"):
        column, zero = one[:, None], 0 * one[:, None]
        return model.calculate_denoised(sigma, zero, column).flatten(), model.calculate_denoised(sigma, column, zero).flatten()
    *skip, out, _ = model.get_scalings(sigma) if hasattr(model, "get_scalings") else (-sigma, None)
    return skip[0] if skip else one, out


def is_flow(model: Any) -> bool:
    """Whether the model denoises (1 - sigma) x0 + sigma noise, not x0 + sigma noise."""
    return (
        hasattr(model, "noise_scaling") and float(model.noise_scaling(torch.tensor([0.5]), torch.zeros(1), torch.ones(1))) < 1
    )


def timestep(model: Any, sigma: float) -> float:
    """Return the timestep in 0..1000 of a noise level: 1000 sigma for flow matching, the model's own where it has 1000, else
    the one at which Stable Diffusion has the same ratio of noise to data."""
    level = torch.tensor([sigma], device=getattr(getattr(model, "sigmas", None), "device", None))
    if hasattr(model, "sigma_to_t"):
        return float(model.sigma_to_t(level)) * 1000 / (len(model.sigmas) if hasattr(model, "sigmas") else 1)
    if is_flow(model):
        return 1000 * sigma
    if getattr(model, "num_timesteps", None) == 1000:
        return float(model.timestep(level))
    return float(timestep_of_ratio(level / getattr(model, "sigma_data", 1.0)))


def denoiser_probe(model: Any, flow: bool) -> Probe:
    """Return the `Probe` of a denoiser, whose target is the picture itself."""
    ratio = math.exp(-LOG_SNR / 2)
    sigma = ratio / (1 + ratio) if flow else ratio * float(getattr(model, "sigma_data", 1.0))
    return Probe(sigma, LOG_SNR, (1 - sigma if flow else 1.0, sigma), (1.0, 0.0))
