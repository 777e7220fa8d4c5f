"""Solvers: coefficient tables read off a diffusers scheduler, or the scheduler's own `step` where it is not linear.

A deterministic one- or two-step solver is linear in what a step holds, whatever it predicts (epsilon, v, flow):

    latents' = a * latents + b * guided + history        history' = p * latents + q * guided

Euler (Karras et al., https://arxiv.org/abs/2206.00364), DDIM (https://arxiv.org/abs/2010.02502) and flow-matching Euler have
p = q = 0; DPM-Solver++ 2M (https://arxiv.org/abs/2211.01095, Algorithm 2) keeps its last denoised prediction in `history`.
The five numbers of each step are measured by handing the scheduler unit vectors, so they are the scheduler's own.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

# name -> (diffusers class, what its `from_config` overrides)
SCHEDULERS: dict[str, tuple[str, dict]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpmsolver++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def make_scheduler(choice: str | SchedulerMixin | None, current: SchedulerMixin) -> SchedulerMixin:
    """The scheduler `choice` names, with the configuration of `current`; a scheduler stands for itself, None for `current`.

    Raises ValueError for an unknown name, and for a scheduler whose `step` is not diffusers' usual one.
    """
    if isinstance(choice, str):
        if choice not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, or a diffusers scheduler; got {choice!r}")
        name, overrides = SCHEDULERS[choice]
        return getattr(diffusers, name).from_config(current.config, **overrides)
    scheduler = current if choice is None else choice
    if not isinstance(scheduler, SchedulerMixin) or not hasattr(scheduler, "step"):
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, or a diffusers scheduler; got {scheduler!r}")
    return scheduler


def prepared(scheduler: SchedulerMixin, steps: int, device: torch.device | str = "cpu") -> SchedulerMixin:
    """A fresh copy of `scheduler`, set to `steps` steps and told its first one, so that no step looks it up on the device."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


@dataclass(frozen=True)
class Solver:
    """What the loop needs of a scheduler, all on the CPU.

    timesteps:    (K,) float32, one for each network call (some schedulers call the network more than once a step).
    input_scale:  (K,) float32, the factor on the latents at the network's input.
    init_sigma:   standard deviation of the initial noise.
    coefficients: (K, 4) float32 a, b, p, q of the module's formula; None where only the scheduler's own `step` will do.
    step:         (K,) int64, the solver step each network call belongs to.
    level:        (K,) float32, the timestep in 0..1000 of the training schedule, which guidance is laid over.
    """

    timesteps: Tensor
    input_scale: Tensor
    init_sigma: float
    coefficients: Tensor | None
    step: Tensor
    level: Tensor

    @classmethod
    def of(cls, scheduler: SchedulerMixin, steps: int) -> Solver:
        """Measure `scheduler` over `steps` steps.

        Step k is given unit vectors in two slots of its own, (latents, guided); what it returns in the slots of step k - j is
        its coefficient on what that step was given.
        """
        lags = 3  # one more than is used: a solver that looks further back shows there
        plan = prepared(scheduler, steps)
        timesteps = plan.timesteps
        input_scale = torch.ones(len(timesteps))
        response = torch.zeros(len(timesteps), lags, 2)
        for k, t in enumerate(timesteps):
            input_scale[k] = scale_model_input(plan, torch.ones(1), t)
            latents, guided = torch.eye(2 * lags)[2 * (k % lags) :][:2].view(2, 1, 1, 1, 2 * lags)
            out = _step(plan, guided, t, latents).view(lags, 2)
            response[k] = torch.stack([out[(k - j) % lags] for j in range(lags)])
        history = torch.cat([response[1:, 1], torch.zeros(1, 2)])  # what step k + 1 makes of step k is kept by step k
        coefficients = torch.cat([response[:, 0], history], dim=1)
        return cls(
            timesteps=timesteps.float(),
            input_scale=input_scale,
            init_sigma=float(getattr(plan, "init_noise_sigma", 1.0)),
            coefficients=coefficients if _agrees(scheduler, steps, coefficients) else None,
            step=torch.arange(len(timesteps)),
            level=timesteps.float() * (1000 / scheduler.config.get("num_train_timesteps", 1000)),
        )


def scale_model_input(scheduler: SchedulerMixin, latents: Tensor, timestep: Tensor) -> Tensor:
    """The network's input; flow-matching schedulers do not scale."""
    return scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents


def _step(scheduler: SchedulerMixin, guided: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
    """The scheduler's own step, drawing any noise it wants from a generator of its own."""
    noise = {"generator": torch.Generator().manual_seed(0)} if takes_generator(scheduler) else {}
    return scheduler.step(guided, timestep, latents, return_dict=False, **noise)[0]


def takes_generator(scheduler: SchedulerMixin) -> bool:
    """Whether `scheduler.step` can be given the samples' generators."""
    return "generator" in inspect.signature(scheduler.step).parameters


def _agrees(scheduler: SchedulerMixin, steps: int, coefficients: Tensor) -> bool:
    """Whether the scheduler's own steps on random predictions are those of the coefficients."""
    plan = prepared(scheduler, steps)
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 4, 8, 8), generator=rng) * getattr(plan, "init_noise_sigma", 1.0)
    history = torch.zeros_like(latents)
    for (a, b, p, q), t in zip(coefficients, plan.timesteps, strict=True):
        guided = 3 * torch.randn(latents.shape, generator=rng)
        scale_model_input(plan, latents, t)  # some schedulers ask to be called in this order
        expected = _step(plan, guided, t, latents)
        found = a * latents + b * guided + history
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * latents.std().item()):
            return False
        history = p * latents + q * guided
        latents = expected
    return True
