"""If an update leaves a stable region, which is measured on ordinary prompts, the latents are put back into the region.

Huang et al., "Broken Memories: Detecting and Mitigating Memorization in Diffusion Models with Degraded Generations", KDD 2026,
https://arxiv.org/abs/2605.22050, algorithms 1 and 2 with their numbers for 50 steps; prompt and guidance stay as they are. With
x -> x' a step just taken, x0 its clean prediction, and z(v) the distance of |v| to the region's mean in standard deviations:

    flagged     from the first step with z(x' - x) > MILD and z(x0) > MILD on; strongly where z(x0) > STRONG in that step
    corrected   steps with z(x' - x) > MILD of a flagged sample; after the first EARLY ones only of a strongly flagged one
    correction  x0 gets the mean norm, x' += alpha' * (the change of x0); then |x' - x| (where strongly flagged) and |x'| are
                clamped to the region: the mean -+ WIDTH deviations

The rule is taken from other texts about the paper, because the paper itself was not at hand. Here x0 is the prediction with
which the step was taken, so no network call is added. The last update is not corrected, because no call follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from basinescape import Guidance, Sampler
from basinescape.kernels.state import per_sample
from basinescape.models import PromptedUNet
from basinescape.types import Branch, Network
from torch import Tensor

from .method import Batch, Method

MILD, STRONG, WIDTH, EARLY = 3.0, 14.0, 3.0, 10
NORMS = ("update", "latents", "clean")  # of x' - x, x' and x0
Stable = Mapping[str, Sequence[Sequence[float]]]  # name of a norm -> its (mean, standard deviation) in every step but the last
After = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (step, x, x0, x') -> the x' to go on from, all (B, C, h, w) float32


def method(scale: float, stable: Stable) -> Method:
    region = torch.tensor([stable[name] for name in NORMS])

    def suits(sampler: Sampler, steps: int) -> None:
        if region.shape != (len(NORMS), steps - 1, 2):
            raise ValueError(f"stable is measured over {region.shape[1] + 1} steps, but the sampler takes {steps}")
        alphas(sampler, steps)

    def wrap(network: PromptedUNet, batch: Batch) -> Network:
        suits(batch.sampler, batch.steps)
        correct = Correction(region.to(batch.sampler.pipe.device), alphas(batch.sampler, batch.steps), len(batch.seeds))
        return watched(network, batch, scale, correct)

    return Method(Guidance.cfg(scale), wrap=wrap, suits=suits)


def measured(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], steps: int, scale: float) -> Tensor:
    """The NORMS of every step but the last under plain guidance, (len(NORMS), steps - 1, B) float32."""
    found: list[Tensor] = []

    def after(k: int, before: Tensor, clean: Tensor, latents: Tensor) -> Tensor:
        found.append(torch.stack([lengths(latents - before), lengths(latents), lengths(clean)]))
        return latents

    plain = Method(Guidance.cfg(scale), wrap=lambda network, batch: watched(network, batch, scale, after))
    plain.sample(sampler, prompts, seeds, steps, output="latent")
    return torch.stack(found, dim=1)


def alphas(sampler: Sampler, steps: int) -> list[float]:
    """The factor of the clean latents in the noisy latents, sqrt(alphas_cumprod), for every step.

    Raises ValueError if the scheduler scales the network's input or its latents are not of unit variance, and for a prediction
    type other than epsilon and v_prediction.
    """
    solver, scheduler = sampler.solver(steps), sampler.scheduler
    kind = scheduler.config.get("prediction_type", "a flow")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"update-norm needs a network that predicts epsilon or v_prediction, got {kind!r}")
    if (solver.input_scale != 1).any() or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"update-norm needs a scheduler whose latents keep unit variance, got {type(scheduler).__name__}")
    return scheduler.alphas_cumprod[solver.timesteps.long()].sqrt().tolist()


def watched(network: PromptedUNet, batch: Batch, scale: float, after: After) -> Network:
    """Wrap `network`: `after` is called with every step but the last once it is taken, and may change its outcome.

    scale: that of the guidance. Raises what `alphas` raises.
    """
    signal, kind = alphas(batch.sampler, batch.steps), batch.sampler.scheduler.config.prediction_type
    k = 0
    last: tuple[Tensor, Tensor] | None = None  # the latents before the last step, and its clean prediction

    def predict(latents: Tensor, timesteps: Tensor, branch: Branch) -> Tensor:
        nonlocal k, last
        branches = latents.unflatten(0, (2 if branch == "both" else 1, -1))
        if last is not None:
            outcome = branches[0].to(torch.float32, copy=True)
            branches.copy_(after(k - 1, last[0], last[1], outcome))  # in place: these are the sampler's own latents
        predictions = network(latents, timesteps, branch)
        parts, here = predictions.float().view_as(branches), branches[0].float()
        guided = parts[0] + scale * (parts[-1] - parts[0])
        k, last = k + 1, (here.clone(), denoised(here, guided, signal[k], kind))
        return predictions

    return predict


def denoised(latents: Tensor, guided: Tensor, alpha: float, kind: str) -> Tensor:
    """The clean latents x0 that a prediction of the given `kind` implies."""
    sigma = (1 - alpha**2) ** 0.5
    return alpha * latents - sigma * guided if kind == "v_prediction" else (latents - sigma * guided) / alpha


class Correction:
    """The paper's rule, applied to the steps of one batch.

    region: (len(NORMS), steps - 1, 2) float32, mean and standard deviation. signal: `alphas`.
    """

    def __init__(self, region: Tensor, signal: Sequence[float], batch: int):
        self.region, self.signal = region, signal
        self.flagged = torch.zeros(batch, dtype=torch.bool, device=region.device)
        self.strongly = self.flagged.clone()

    def __call__(self, k: int, before: Tensor, clean: Tensor, latents: Tensor) -> Tensor:
        of_update, of_latents, of_clean = self.region[:, k]
        outside, far = distance(latents - before, of_update) > MILD, distance(clean, of_clean)
        first = outside & (far > MILD) & ~self.flagged
        self.flagged, self.strongly = self.flagged | first, self.strongly | (first & (far > STRONG))

        moved = latents + self.signal[k + 1] * (resized(clean, of_clean[0]) - clean)
        moved = torch.where(per_sample(self.strongly, moved), before + clamped(moved - before, of_update), moved)
        corrected = outside & (self.flagged if k < EARLY else self.strongly)
        return torch.where(per_sample(corrected, moved), clamped(moved, of_latents), latents)


def lengths(values: Tensor) -> Tensor:
    """(B,) the norms of `values` (B, ...)."""
    return values.flatten(1).norm(dim=1)


def distance(values: Tensor, stable: Tensor) -> Tensor:
    """(B,) distance of the norms of `values` (B, ...) from the mean, in deviations. stable: (2,), mean and deviation."""
    return (lengths(values) - stable[0]).abs() / stable[1]


def clamped(values: Tensor, stable: Tensor) -> Tensor:
    """`values` (B, ...) with norms at most WIDTH deviations from the mean. stable: (2,), mean and deviation."""
    mean, width = stable[0], WIDTH * stable[1]
    return resized(values, lengths(values).clamp(mean - width, mean + width))


def resized(values: Tensor, norm: Tensor) -> Tensor:
    """`values` (B, ...) with the norms `norm`, (B,) or ()."""
    return values * per_sample(norm / lengths(values), values)
