"""Solvers: coefficients measured on a diffusers scheduler, or the scheduler's own `step` if it is not linear.

A deterministic one- or two-step solver is linear in latents, guided prediction and history, for each prediction type:

    latents' = a * latents + b * guided + history        history' = p * latents + q * guided

Euler (Karras et al., https://arxiv.org/abs/2206.00364), DDIM (https://arxiv.org/abs/2010.02502) and flow-matching Euler have
p = q = 0; DPM-Solver++ 2M (https://arxiv.org/abs/2211.01095, Algorithm 2) keeps its last denoised prediction in `history`.
The numbers of each step are measured by calling the scheduler with unit vectors, so they are the scheduler's own.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..types import Scheduler
from .schedule import Schedule, noise_levels, own_step, prepared, scale_model_input, step_of_calls


@dataclass(frozen=True)
class Solver:
    """The data of a scheduler that the loop needs for K network calls, all on the CPU.

    schedule:     the schedule that the scheduler was set to.
    timesteps:    (K,) float32, the timesteps passed to the network.
    step:         (K,) int64, the step each call belongs to: second-order solvers call the network twice a step.
    level:        (K,) float32, each call's noise level as a timestep in 0..1000 of the training schedule; None if it is not
                  known.
    log_snr:      (K,) float32, each call's noise level as log(a^2 / s^2) of latents a * data + s * noise; None if not known.
    input_scale:  (K,) float32, the factor on the latents at the network's input.
    init_sigma:   standard deviation of the initial noise.
    scheduler:    the scheduler that was measured.
    coefficients: (K, 4) float32 a, b, p, q of the module's formula; None if the scheduler is not linear.
    """

    schedule: Schedule
    timesteps: Tensor
    step: Tensor
    level: Tensor | None
    log_snr: Tensor | None
    input_scale: Tensor
    init_sigma: float
    scheduler: Scheduler
    coefficients: Tensor | None

    @classmethod
    def of(cls, scheduler: Scheduler, schedule: Schedule) -> Solver:
        """Measure `scheduler` over `schedule`. torch's global generator keeps its state.

        Raises ValueError for a scheduler that cannot take these steps, or whose noise does not depend on the seed alone.
        """
        name = type(scheduler).__name__
        with torch.random.fork_rng(devices=[]):
            plan = prepared(scheduler, schedule)
            try:
                input_scale, coefficients = _measure(scheduler, schedule)
                linear = _agrees(scheduler, schedule, coefficients)
                repeats = linear or torch.equal(_trajectory(scheduler, schedule, 1), _trajectory(scheduler, schedule, 2))
            except Exception as error:  # whatever a scheduler raises
                raise ValueError(f"scheduler {name} cannot take {schedule}: {checks.line(error)}") from error
        if not repeats:
            raise ValueError(
                f"scheduler {name} draws noise that no seed decides (config {dict(scheduler.config)}): "
                "use another, or a deterministic setting of it"
            )
        calls = len(plan.timesteps)
        if not bool(coefficients.isfinite().all()):
            raise ValueError(
                f"scheduler {name} has steps that are not finite for {schedule}: its timesteps are "
                f"{reprlib.repr([round(float(t), 3) for t in plan.timesteps])}"
            )
        if schedule.denoising_end is not None:
            trained = plan.config.get("num_train_timesteps", 1000)
            calls = int((plan.timesteps >= round(trained * (1 - schedule.denoising_end))).sum())
            if not calls:
                raise ValueError(f"denoising_end {schedule.denoising_end} leaves no step of {schedule.steps}")
        known = noise_levels(plan)
        if known is not None and bool(known.log_snr[:calls].isnan().any()):
            raise ValueError(f"{schedule} leads to noise levels that scheduler {name} has not: a flow's are from 0 to 1")
        return cls(
            schedule=schedule,
            timesteps=plan.timesteps[:calls].float(),
            step=step_of_calls(plan)[:calls],
            level=None if known is None else known.timestep[:calls],
            log_snr=None if known is None else known.log_snr[:calls],
            input_scale=input_scale[:calls].float(),
            init_sigma=float(getattr(plan, "init_noise_sigma", 1.0)),
            scheduler=scheduler,
            coefficients=coefficients[:calls].float() if linear else None,
        )

    @property
    def steps(self) -> int:
        return int(self.step[-1]) + 1

    @property
    def first_calls(self) -> Tensor:
        """(steps,) int64, the first call of each step."""
        return torch.searchsorted(self.step, torch.arange(self.steps))

    @property
    def levels(self) -> list[float]:
        """The level of each step's first call, NaN where that is not known."""
        return [math.nan] * self.steps if self.level is None else self.level[self.first_calls].tolist()

    @property
    def log_snrs(self) -> list[float] | None:
        """The log SNR of each step's first call; None where that is not known."""
        return None if self.log_snr is None else self.log_snr[self.first_calls].tolist()

    def call_at(self, timestep: float) -> int:
        """The first call of the first step whose level is at or below `timestep`. Raises ValueError where there is none."""
        for level, call in zip(self.levels, self.first_calls.tolist(), strict=True):
            if level <= timestep:
                return call
        raise ValueError(f"no step is at or below timestep {timestep:g}: the last one is at {self.levels[-1]:g}")

    def first(self, call: int) -> tuple[float, float]:
        """The coefficients a, b of `call` if it is the first of its run and so has no history."""
        plan = _begun(self.scheduler, self.schedule, call)
        latents, guided = torch.eye(2, dtype=torch.float64).view(2, 1, 1, 1, 2)
        a, b = own_step(plan, guided, plan.timesteps[call], latents, _generators(), self.schedule.eta).flatten().tolist()
        return a, b

    def renoised(self, low: int, high: int) -> tuple[float, float]:
        """(scale, sigma): scale * latents + sigma * noise takes the latents of call `low` to the noise level of `high`."""
        (clean, noise), (signal, total) = (self._mixed(call) for call in (low, high))
        scale = signal / clean
        return scale, math.sqrt(total**2 - (scale * noise) ** 2)

    def _mixed(self, call: int) -> tuple[float, float]:
        """The factors on clean latents and on noise in the latents of a call."""
        plan = _begun(self.scheduler, self.schedule, call)
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        t = plan.timesteps[call : call + 1]

        def mix(clean: Tensor, noise: Tensor) -> float:
            if hasattr(plan, "scale_noise"):
                return plan.scale_noise(clean, t, noise).item()
            return plan.add_noise(clean, noise, t).item()

        return mix(one, 0 * one), mix(0 * one, one)


def _begun(scheduler: Scheduler, schedule: Schedule, call: int) -> Scheduler:
    """A fresh copy of `scheduler`, set to start at `call`."""
    plan = prepared(scheduler, schedule)
    if hasattr(plan, "set_begin_index"):
        plan.set_begin_index(call)
    return plan


def _measure(scheduler: Scheduler, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The scale of the network's input (K,) and the coefficients (K, 4), both float64, as exact as the scheduler's own numbers.

    The latents and the guided prediction of call k are unit vectors, each in a slot of its own. What the call returns in the
    slots of call k - j are its coefficients on the latents and the prediction of that call.
    """
    lags = 3  # one more than is used, so that a dependence on call k - 2 does not add to a, b, p or q
    plan = prepared(scheduler, schedule)
    timesteps = plan.timesteps
    input_scale = torch.ones(len(timesteps), dtype=torch.float64)
    response = torch.zeros(len(timesteps), lags, 2, dtype=torch.float64)
    slots = torch.eye(2 * lags, dtype=torch.float64)
    for k, t in enumerate(timesteps):
        input_scale[k] = scale_model_input(plan, torch.ones(1, dtype=torch.float64), t)
        latents, guided = slots[2 * (k % lags) :][:2].view(2, 1, 1, 1, 2 * lags)
        out = own_step(plan, guided, t, latents, _generators(), schedule.eta).view(lags, 2)
        response[k] = torch.stack([out[(k - j) % lags] for j in range(lags)])
    history = torch.cat([response[1:, 1], response.new_zeros(1, 2)])  # row k holds what call k + 1 makes of call k
    return input_scale, torch.cat([response[:, 0], history], dim=1)


def _agrees(scheduler: Scheduler, schedule: Schedule, coefficients: Tensor) -> bool:
    """Whether the coefficients give the same latents as the scheduler's own steps on random predictions."""
    plan = prepared(scheduler, schedule)
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 4, 8, 8), generator=rng, dtype=torch.float64) * getattr(plan, "init_noise_sigma", 1.0)
    history = torch.zeros_like(latents)
    for (a, b, p, q), t in zip(coefficients, plan.timesteps, strict=True):
        guided = 3 * torch.randn(latents.shape, generator=rng, dtype=torch.float64)
        scale_model_input(plan, latents, t)  # some schedulers ask to be called in this order
        expected = own_step(plan, guided, t, latents, _generators(), schedule.eta)
        found = a * latents + b * guided + history
        if not torch.allclose(found, expected.double(), rtol=1e-4, atol=1e-4 * latents.std().item()):
            return False
        history = p * latents + q * guided
        latents = expected.double()
    return True


def _trajectory(scheduler: Scheduler, schedule: Schedule, seed: int) -> Tensor:
    """The final latents of the scheduler's own steps. seed: of torch's global generator; the sample's is always 0."""
    torch.default_generator.manual_seed(seed)  # of the CPU alone
    plan, generators = prepared(scheduler, schedule), _generators()
    latents = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    for t in plan.timesteps:
        latents = own_step(plan, latents.sin(), t, latents, generators, schedule.eta)
    return latents.nan_to_num()


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0)]
