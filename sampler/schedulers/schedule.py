"""Make diffusers' schedulers by name, set their steps, call them as its pipelines do, and find their noise levels."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from .. import checks
from ..types import Scheduler

# name -> (diffusers class, what its `from_config` overrides)
SCHEDULERS: dict[str, tuple[str, dict]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpmsolver++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmsolver-sde": ("DPMSolverSDEScheduler", {}),
    "dpmsolver-singlestep": ("DPMSolverSinglestepScheduler", {}),
    "edm-dpmsolver++": ("EDMDPMSolverMultistepScheduler", {}),
    "edm-euler": ("EDMEulerScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
OWN = "own"  # the pipeline's own scheduler

Family = Literal["vp", "edm", "flow"]


def make_scheduler(choice: str | Scheduler | None, current: Scheduler) -> Scheduler:
    """The scheduler with the name `choice`, configured as `current`; `current` for None and "own"; a scheduler as it is.

    Raises ValueError for an unknown name, for a name of another formulation than that of `current` (the network was not trained
    on its noise), and for a scheduler whose `step` takes other arguments than diffusers' usual ones; ImportError if the
    scheduler's package is missing.
    """
    if isinstance(choice, str) and choice in SCHEDULERS:
        name, overrides = SCHEDULERS[choice]
        try:
            cls = getattr(diffusers, name)
            made = cls.from_config(current.config, **_shifted(cls, current.config), **overrides)
        except ImportError as error:  # diffusers' stand-in for a class whose package is missing
            raise ImportError(f"scheduler {choice!r} needs a package that is not installed: {checks.line(error)}") from error
        if family(made) != family(current):
            raise ValueError(
                f"scheduler {choice!r} is of the {family(made)} formulation, and the model's own {type(current).__name__} of "
                f"the {family(current)} one; use one of {', '.join(_named(family(current)))}, or a scheduler made by hand"
            )
        return made
    scheduler = current if choice is None or choice == OWN else choice
    if not isinstance(scheduler, SchedulerMixin) or not hasattr(scheduler, "step"):
        given = repr(choice) if isinstance(choice, str) else type(scheduler).__name__
        raise ValueError(f"scheduler must be {OWN}, {', '.join(SCHEDULERS)}, or a diffusers scheduler; got {given}")
    known = inspect.signature(scheduler.step).parameters.items()
    needed = [name for name, parameter in known if parameter.default is inspect.Parameter.empty]
    if needed != ["model_output", "timestep", "sample"]:
        raise ValueError(f"scheduler {type(scheduler).__name__} cannot be used here: its step takes {', '.join(needed)}")
    return scheduler


def _shifted(cls: type[Scheduler], config: Mapping[str, Any]) -> dict[str, Any]:
    """The shift of a flow's noise levels under its name in `cls`: schedulers call it "shift" or "flow_shift"."""
    names, known = {"shift": "flow_shift", "flow_shift": "shift"}, inspect.signature(cls).parameters
    return {own: config[name] for own, name in names.items() if own in known and own not in config and name in config}


def _named(formulation: Family) -> list[str]:
    """The names of one formulation's schedulers, found by the first word of each name, after "own"."""
    first_words = {name: name.split("-")[0] for name in SCHEDULERS}
    return [OWN, *(name for name, word in first_words.items() if formulation == (word if word in ("edm", "flow") else "vp"))]


def family(scheduler: Scheduler) -> Family:
    """How clean latents x and noise n are mixed: "vp" sqrt(1 - b) x + sqrt(b) n, "edm" x + sigma n, "flow" (1 - t) x + t n."""
    own = own_settings(scheduler)
    if "sigma_data" in own:
        return "edm"
    flow = own.get("use_flow_sigmas") or own.get("prediction_type") == "flow_prediction"
    return "flow" if flow or not own.keys() & {"beta_schedule", "trained_betas"} else "vp"


def configured(scheduler: Scheduler) -> tuple:
    """All that a scheduler's coefficients depend on."""
    return scheduler, dict(scheduler.config), getattr(scheduler, "shift", None)


def own_settings(scheduler: Scheduler) -> dict[str, Any]:
    """A scheduler's settings, without those of other classes, which `from_config` keeps in its configuration."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in known}


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, in the arguments of diffusers' pipelines.

    steps:         the number of steps; ignored if timesteps or sigmas are given.
    timesteps, sigmas: one for each step, for schedulers whose `set_timesteps` takes them; kept as tuples.
    eta:           how stochastic DDIM and TCD are, 0 to 1 (Song et al., https://arxiv.org/abs/2010.02502, equation 16);
                   other schedulers take none.
    denoising_end: the share of the run after which another model continues (SDXL's refiner); None: the whole run.
    mu:            how far a scheduler with dynamic shifting moves its noise levels; None: computed from the picture's size.

    Raises ValueError for anything else.
    """

    steps: int = 50
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    eta: float = 0.0
    denoising_end: float | None = None
    mu: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", checks.at_least_one("steps", self.steps))
        if self.timesteps is not None and self.sigmas is not None:
            raise ValueError("timesteps and sigmas cannot both be given")
        for name in ("timesteps", "sigmas"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, _numbers(name, given))
        checks.share("eta", self.eta)
        if self.denoising_end is not None and not (isinstance(self.denoising_end, float) and 0 < self.denoising_end < 1):
            raise ValueError(f"denoising_end must be a number between 0 and 1, got {self.denoising_end!r}")
        if self.mu is not None:
            object.__setattr__(self, "mu", checks.finite("mu", self.mu))

    def __str__(self) -> str:
        """Text for messages: "20 steps", followed by the other settings."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "steps"}
        own = self.timesteps is not None or self.sigmas is not None
        words = [] if own else [f"{self.steps} step{'s' if self.steps > 1 else ''}"]
        return ", ".join(words + [f"{name} {value}" for name, value in given.items() if value])


def _numbers(name: str, given: Sequence[float]) -> tuple[float, ...]:
    """The numbers as a tuple. Whole numbers stay ints, because some schedulers look them up in a table."""
    try:
        numbers = tuple(value.item() if hasattr(value, "item") else value for value in given)
        valid = bool((np.isfinite(numbers) & (np.asarray(numbers) >= 0)).all())
    except TypeError as error:
        raise ValueError(f"{name} must be a sequence of numbers, got {given!r}") from error
    if not numbers or not valid:
        raise ValueError(f"{name} must be at least one finite number, none below 0, got {given!r}")
    return numbers


def prepared(scheduler: Scheduler, schedule: Schedule, device: torch.device | str = "cpu") -> Scheduler:
    """A fresh copy of `scheduler`, set to `schedule` and to its first step, so that no step looks up its index on the device.

    Raises ValueError if the scheduler cannot take the schedule.
    """
    scheduler = copy.deepcopy(scheduler)
    timesteps: Any = None if schedule.timesteps is None else list(schedule.timesteps)  # ints or floats
    sigmas: Any = None if schedule.sigmas is None else np.asarray(schedule.sigmas)  # some schedulers multiply it
    shifted = {} if schedule.mu is None else {"mu": schedule.mu}
    if shifted and not scheduler.config.get("use_dynamic_shifting"):
        raise ValueError(
            f"mu is {schedule.mu:g}, but scheduler {type(scheduler).__name__} does not shift dynamically: leave it out"
        )
    if schedule.eta and "eta" not in _step_parameters(scheduler.__class__):
        raise ValueError(f"eta is {schedule.eta:g}, but scheduler {type(scheduler).__name__} takes none: leave it out")
    try:
        retrieve_timesteps(scheduler, schedule.steps, device, timesteps, sigmas, **shifted)
    except Exception as error:  # whatever a scheduler raises
        raise ValueError(f"scheduler {type(scheduler).__name__} cannot take {schedule}: {checks.line(error)}") from error
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True  # the loop scales by itself
    return scheduler


def scale_model_input(scheduler: Scheduler, latents: Tensor, timestep: Tensor) -> Tensor:
    """The network's input; flow-matching schedulers do not scale."""
    return scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents


@functools.cache
def _step_parameters(scheduler: Any) -> frozenset[str]:
    return frozenset(inspect.signature(scheduler.step).parameters)


def own_step(
    scheduler: Scheduler, guided: Tensor, timestep: Tensor, latents: Tensor, generators: list[torch.Generator], eta: float
) -> Tensor:
    """Return the latents of the scheduler's own `step`, called as diffusers' pipelines do, with noise from `generators`."""
    takes = _step_parameters(scheduler.__class__)
    given: Mapping[str, Any] = {"eta": eta, "generator": generators}
    if getattr(scheduler, "noise_sampler", 0) is None:  # a Brownian path for each sample, seeded as the sample is
        scheduler.noise_sampler_seed = [generator.initial_seed() for generator in generators]
    wanted = {name: value for name, value in given.items() if name in takes}
    return scheduler.step(guided, timestep, latents, return_dict=False, **wanted)[0]


def step_of_calls(scheduler: Scheduler) -> Tensor:
    """(K,) int64, the step of each network call of a prepared scheduler. Some schedulers have several calls a step."""
    calls = torch.arange(len(scheduler.timesteps))
    if getattr(scheduler, "prk_timesteps", None) is not None:  # PNDM: Runge-Kutta steps of four calls, or a first step of two
        runge_kutta = len(scheduler.prk_timesteps)
        if not runge_kutta:
            return (calls - 1).clamp(min=0)
        return torch.where(calls < runge_kutta, calls // 4, calls - runge_kutta + runge_kutta // 4)
    return calls // getattr(scheduler, "order", 1)


class NoiseLevels(NamedTuple):
    """The noise level of each call of a scheduler in two units, both (K,) float32 on the CPU.

    timestep: in 0..1000 of the training schedule. Flow: 1000 t. EDM: the timestep at which Stable Diffusion's schedule has the
              ratio sigma / sigma_data of noise to data.
    log_snr:  log(a^2 / s^2) of latents a * data + s * noise. Under EDM, data of standard deviation sigma_data count as data of
              standard deviation 1.
    """

    timestep: Tensor
    log_snr: Tensor


def noise_levels(scheduler: Scheduler) -> NoiseLevels | None:
    """The noise levels of a prepared scheduler; None if they are not known."""
    timesteps, own, formulation = scheduler.timesteps.float().cpu(), own_settings(scheduler), family(scheduler)
    sigmas: Any = getattr(scheduler, "sigmas", None)
    if formulation != "vp" and (sigmas is None or len(sigmas) - len(timesteps) not in (0, 1)):
        return None
    if sigmas is not None:
        sigmas = torch.as_tensor(sigmas)[: len(timesteps)].float().cpu()
    if formulation == "flow":
        noise = 1000 * (1 - sigmas if own.get("invert_sigmas") else sigmas)  # some models count t from 1 down
        return NoiseLevels(noise, 2 * ((1 - noise / 1000) / (noise / 1000)).log())
    if formulation == "edm":
        ratio = sigmas / own["sigma_data"]
        return NoiseLevels(timestep_of_ratio(ratio), -2 * ratio.log())
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    if own.get("timestep_type") == "continuous":
        return NoiseLevels(timestep_of_ratio(sigmas, scheduler.alphas_cumprod), -2 * sigmas.log())
    timesteps, whole = timesteps * (1000 / own["num_train_timesteps"]), own["num_train_timesteps"] / 1000
    return NoiseLevels(timesteps, vp_log_snr(scheduler.alphas_cumprod, timesteps * whole))


def vp_log_snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """The log SNR of a variance-preserving schedule at its own timesteps (...), interpolated between whole ones."""
    alphas = alphas_cumprod.double().cpu().numpy().clip(1e-12, 1 - 1e-12)
    known = np.log(alphas / (1 - alphas))
    return torch.from_numpy(np.interp(timesteps.double().cpu().numpy(), np.arange(len(known)), known)).float()


def timestep_of_ratio(ratio: Tensor, alphas_cumprod: Tensor | None = None) -> Tensor:
    """The timesteps in 0..1000 at which a variance-preserving schedule has these ratios of noise to data. alphas_cumprod: of
    the schedule; None: Stable Diffusion's."""
    if alphas_cumprod is None:
        alphas_cumprod = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0)
    alphas = alphas_cumprod.double().numpy()
    known = 0.5 * np.log((1 - alphas) / np.maximum(alphas, 1e-20))
    wanted = np.log(np.maximum(ratio.double().cpu().numpy(), 1e-20))
    return torch.from_numpy(np.interp(wanted, known, np.arange(len(alphas)))).float() * (1000 / len(alphas))
