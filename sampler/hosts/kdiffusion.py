"""k-diffusion: a denoiser for its samplers, `sample_euler(EscapeDenoiser(model, guidance), x, sigmas, extra_args=...)`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import checks
from ..detection.verdict import Verdict
from ..guidance.guard import PROBES, THRESHOLD
from ..guidance.guidance import Guidance
from ..guidance.transitions import At, Settled
from ..kernels.state import per_sample
from .noise_levels import UNEVEN, denoiser_probe, scalings, timestep
from .own_loop import Escape, each, judge

# How often a sampler of k-diffusion calls the model in a step.
CALLS = dict.fromkeys(
    ("sample_heun", "sample_dpm_2", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral", "sample_dpmpp_sde"), 2
)
CALLS |= dict.fromkeys(("sample_euler", "sample_euler_ancestral", "sample_lms", "sample_dpmpp_2m", "sample_dpmpp_2m_sde"), 1)
CALLS |= {"sample_dpmpp_3m_sde": 1}
MOST_STEPS = 1000  # of a run whose number of steps is not given

Scalings = Callable[[Tensor], Sequence[Tensor]]


class EscapeDenoiser:
    """`denoiser(x, sigma, cond=..., uncond=...) -> denoised`, guided as `Guidance` says.

    model:    (x (B, ...), sigma (B,), cond=...) -> denoised (B, ...), such as k-diffusion's own wrappers of a network.
    guidance: of all samples, or a list of one a sample, all of one rule.
    steps:    of a run; needed by guidance that counts them (`Settled`, a factor for each step).
    order:    how often the sampler calls the model in a step: 2 for heun, dpm_2, dpmpp_2s_ancestral and dpmpp_sde, else 1.
    scalings: sigma (B,) -> (c_skip, c_out), (B,) each, of denoised = c_skip x + c_out * (what the network returned). None: the
              model's own `get_scalings`, and without one those of a noise prediction, (1, -sigma).

    Guidance combines what the network returned, so that noise gaps and thresholds are those of every other host; timesteps are
    the model's own (`sigma_to_t`), or those at which Stable Diffusion has the same ratio of noise to data (a flow model needs
    `sigma_to_t`). A run begins with the first call and wherever sigma does not fall, except where a sampler of k-diffusion adds
    noise in the middle of a run (s_churn with s_tmax). `run` is the last run's `Escape`; set it to None after a run that was
    stopped. A denoiser does not see where a run ends, so it does not warn of samples that had no transition: their
    `transition_step` is -1. It cannot begin a sample again: `judge` tells which finished pictures look like copies.

    Raises ValueError for arguments that are not as described and for guidance that needs a loop that can go back; in a run of
    k-diffusion's, for a sampler of another order, and for dpm_fast and dpm_adaptive, whose steps differ in their calls.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        guidance: Guidance | Sequence[Guidance],
        steps: int | None = None,
        order: int = 1,
        scalings: Scalings | None = None,
    ):
        counted = [one for one in each(guidance) if isinstance(one.shape, tuple) or isinstance(one.until, Settled)]
        if steps is None and counted:
            raise ValueError(f"guidance {counted[0]!r} counts the steps of a run: give steps")
        self.inner_model, self.scalings = model, scalings
        self.guidance = self._over(guidance) if isinstance(guidance, Guidance) else [self._over(one) for one in guidance]
        self.order = checks.at_least_one("order", order)
        self.steps = MOST_STEPS if steps is None else checks.at_least_one("steps", steps)
        self.run: Escape | None = None
        self._sigma = 0.0

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, cond: Any, uncond: Any, **model_kwargs: Any) -> Tensor:
        """The denoised prediction (B, ...) of x (B, ...) at sigma (B,), the same for all samples.

        cond, uncond: what the model takes as `cond`. Where both are tensors (B, ...) of one shape, or lists or dicts of such,
                      and nothing else is passed, the model is called once, on both.
        """
        low, high = torch.stack(sigma.aminmax()).tolist()
        if low != high:
            raise ValueError(f"sigma must be the same for all samples, got {low:g} to {high:g}")
        if "cond_scale" in model_kwargs:
            raise ValueError(f"cond_scale is {model_kwargs['cond_scale']!r}, and the guidance has its own scale: leave it out")
        if self.run is None or self.run.batch != len(x) or (high >= self._sigma and not _adds_noise()):
            self._check_sampler()
            step = [k // self.order for k in range(self.steps * self.order)]
            self.run = Escape(self.guidance, self.steps, len(x), x.device, step)
        if self.run.calls % self.order == 0:  # a step's other calls may lie anywhere below
            self._sigma = high
        level = timestep(self.inner_model, high)
        branch, second = self.run.branch(level), None
        if branch == "both":
            first, second = self._both(x, sigma, uncond, cond, model_kwargs)
        else:
            first = self.inner_model(x, sigma, cond=cond if branch == "cond" else uncond, **model_kwargs)
        found = scalings(self.inner_model, sigma) if self.scalings is None else self.scalings(sigma)
        skip, out = (per_sample(torch.as_tensor(scale).to(sigma).expand(len(x)), x) for scale in found)
        guided = self.run((first - skip * x) / out, None if second is None else (second - skip * x) / out, timestep=level)
        return skip * x + out * guided

    def _check_sampler(self) -> None:
        """Raise ValueError where the sampler of k-diffusion has another order, or calls the model unevenly."""
        for name in [call.function for call in inspect.stack(context=0)]:
            if name in UNEVEN:
                raise ValueError(f"{name} differs in its calls from step to step: use a sampler that does not")
            if CALLS.get(name, self.order) != self.order:
                raise ValueError(
                    f"order is {self.order}, and {name} calls the model {CALLS[name]} times a step: give order={CALLS[name]}"
                )

    @torch.no_grad()
    def judge(
        self,
        x0: Tensor,
        cond: Any,
        uncond: Any,
        seeds: int | Sequence[int] = 0,
        threshold: float = THRESHOLD,
        probes: int = PROBES,
        flow: bool = False,
        **model_kwargs: Any,
    ) -> Verdict:
        """Judge whether finished latents x0 (B, ...), as a sampler returned them, look like copies; see `own_loop.judge`.

        cond, uncond, model_kwargs: as in a call. flow: the model denoises (1 - sigma) x0 + sigma noise, not x0 + sigma noise.
        """

        def predict(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
            return self._both(x, time.to(x), uncond, cond, model_kwargs)

        return judge(predict, denoiser_probe(self.inner_model, flow), x0, seeds, threshold, probes)

    @property
    def transition_step(self) -> Tensor:
        """(B,) int64 on the CPU, as `Escape` has it."""
        return self._known("transition_step").transition_step

    @property
    def noise_gap(self) -> Tensor:
        """(B, steps taken) float32 on the CPU, as `Escape` has it."""
        run = self._known("noise_gap")
        return run.noise_gap[:, : -(-run.calls // self.order)]

    def _known(self, name: str) -> Escape:
        if self.run is None:
            raise ValueError(f"{name} is known when the denoiser has been called")
        return self.run

    def _both(self, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, model_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(unconditional, conditional) denoised predictions."""
        (first, form), (second, other) = tree_flatten(uncond), tree_flatten(cond)
        if model_kwargs or form != other or not all(map(partial(_of_samples, len(x)), first, second)):
            without, made = (self.inner_model(x, sigma, cond=one, **model_kwargs) for one in (uncond, cond))
            return without, made
        doubled = tree_unflatten([torch.cat(pair) for pair in zip(first, second, strict=True)], form)
        denoised = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=doubled)
        return denoised[: len(x)], denoised[len(x) :]

    def _over(self, guidance: Guidance) -> Guidance:
        """Return the guidance with the timestep of its transition in the place of a log SNR."""
        until = guidance.until
        if not isinstance(until, At) or until.log_snr is None:
            return guidance
        sigma = math.exp(-until.log_snr / 2) * getattr(self.inner_model, "sigma_data", 1.0)
        return replace(guidance, until=At(timestep=min(timestep(self.inner_model, sigma), 1000.0)))


def _of_samples(count: int, one: Any, other: Any) -> bool:
    """Whether both are tensors (count, ...) of one shape."""
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and one.shape[:1] == (count,)


def _adds_noise() -> bool:
    """Whether a sampler of k-diffusion that calls the model has just added noise (its `gamma`) after its first step (`i`)."""
    samplers = [call.frame.f_locals for call in inspect.stack(context=0) if call.function in CALLS]
    return any(own.get("gamma", 0.0) > 0 and own.get("i", 0) > 0 for own in samplers)
