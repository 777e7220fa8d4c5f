"""The guidance as ComfyUI's samplers call it: the CFG function of a model, and which step each of its calls belongs to."""

from __future__ import annotations

import math
from typing import Any

import torch
from basinescape.guidance import Guidance
from basinescape.hosts.escape import Escape
from basinescape.kernels.state import per_sample
from basinescape.schedulers import timestep_of_ratio
from basinescape.transitions import Rule
from torch import Tensor


class Steps:
    """Which step of a run each call of the model belongs to, from its noise level alone.

    A call at a sigma of the schedule is the first of its step; one between two of them is another call of the earlier step. A
    second call at the same sigma shows that the sampler looks ahead (Heun): the call before was the earlier step's, and from
    then on so is every other one.
    """

    def __init__(self, sigmas: list[float]):
        self.sigmas = sigmas
        self.step = -1
        self.ahead = False  # the sampler looks ahead
        self.looked = False  # ... and has in this step
        self.sigma = math.inf  # of the last first call

    def call(self, sigma: float) -> tuple[bool, bool]:
        """(whether the call is the first of `step`, whether what the last one noted was another step's)."""
        found = next((k for k, known in enumerate(self.sigmas) if math.isclose(known, sigma, rel_tol=1e-4)), None)
        if found is None or found < self.step:
            return self.step < 0, False
        if found == self.step:
            self.ahead, self.looked = True, False
            return True, True
        if self.ahead and not self.looked:
            self.looked = True
            return False, False
        self.step, self.looked, self.sigma = found, False, sigma
        return True, False


class CFGFunction:
    """ComfyUI's `sampler_cfg_function`, guided by delayed or opposite guidance: what the sampler is given as `cfg` is the scale
    after the transition. A run begins where the noise level rises. `run` is the last run's `Escape`."""

    def __init__(self, before: float, until: Rule | None, rule: str = "cfg"):
        self.before, self.until, self.rule = before, until, rule
        self.guidance(1.0)  # raises for what is not allowed
        self.run: Escape | None = None

    def guidance(self, scale: float) -> Guidance:
        """What the node stands for, at the sampler's scale."""
        return Guidance(scale, self.before, self.until, rule=self.rule)

    @torch.no_grad()
    def __call__(self, args: dict[str, Any]) -> Tensor:
        """x - denoised, (B, ...), from ComfyUI's arguments of a CFG function."""
        x, sigmas = args["input"], args["model_options"]["transformer_options"].get("sample_sigmas")
        if sigmas is None:
            raise ValueError("this ComfyUI does not tell a model the sampler's sigmas (sample_sigmas): update it")
        model, sigma = args["model"].model_sampling, args["sigma"].reshape(-1)
        level = float(sigma[0])
        taken = sigmas[:-1].tolist()
        if self.run is None or level > self.steps.sigma * (1 + 1e-4) or self.steps.sigmas != taken or self.run.batch != len(x):
            self._begin(float(args["cond_scale"]), taken, x, model)
        first, other = self.steps.call(level)
        if other:
            self.run.forget(self.mark)
        if first:
            self.mark = self.run.mark()
        self.run.seek(2 * max(self.steps.step, 0) + (not first))
        skip, out = (per_sample(scale, x) for scale in scalings(model, sigma.expand(len(x)).to(x)))
        raw = [(args[name] - skip * x) / out for name in ("uncond_denoised", "cond_denoised")]
        return x - (skip * x + out * self.run(*raw))

    def _begin(self, scale: float, sigmas: list[float], x: Tensor, model: Any) -> None:
        self.steps = Steps(sigmas)
        timesteps = [timestep(model, torch.tensor([sigma])) for sigma in sigmas]
        calls = [k // 2 for k in range(2 * len(sigmas))]  # the first of each step, and all others of it
        self.run = Escape(self.guidance(scale), timesteps, len(x), x.device, calls)
        self.mark = self.run.mark()


def scalings(model: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out), (B,) each, of denoised = c_skip x + c_out * (what the network returned), by ComfyUI's model sampling."""
    one, zero = torch.ones_like(sigma)[:, None], torch.zeros_like(sigma)[:, None]
    return tuple(model.calculate_denoised(sigma, *given).flatten() for given in ((zero, one), (one, zero)))


def timestep(model: Any, sigma: Tensor) -> float:
    """The timestep in 0..1000 of a noise level (1,): 1000 sigma for flow matching, the model's own where it has 1000, else that
    at which Stable Diffusion has the same ratio of noise to data."""
    clean = float(model.noise_scaling(sigma, torch.zeros(1), torch.ones(1)))
    if clean < 1:
        return 1000 * float(sigma)
    if getattr(model, "num_timesteps", None) == 1000:
        return float(model.timestep(sigma))
    return float(timestep_of_ratio(sigma / getattr(model, "sigma_data", 1.0)))
