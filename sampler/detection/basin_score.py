"""The basin score: does a finished picture lie at the bottom of its caption's basin?

The basin of attraction of a memorized training image is the set of noisy latents from which guided denoising ends at that image
(Jain et al., https://arxiv.org/abs/2411.16738).

A picture x0 is noised until almost nothing of it is left, and the network predicts once with its prompt and once without:

    x     = signal * x0 + noise * eps
    score = mean over noises of  ln( || target - uncond || / || target - cond || )

target: the prediction from which exactly this picture follows. The noised latents say hardly anything about the picture.
Nor does the caption of an ordinary picture, so the conditional prediction is hardly nearer to the target than the unconditional
one. For a copy, the caption alone leads straight to it. So the score judges the picture, not the caption.
Related: one-step synthesis (Webster, https://arxiv.org/abs/2305.08694), the conditional likelihood discrepancy (CLiD, NeurIPS
2024, https://arxiv.org/abs/2405.14800).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import noise_gap
from ..schedulers.schedule import family, own_settings, vp_log_snr
from ..types import Network, Scheduler

LOG_SNR = -4.0  # of a noised picture, one for all models
NEAR = 1.5  # the largest distance from it at which a network's level may be
OWN = 0x5BA51  # mixed into the seed of these noises, so that they differ from the sample's own

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # latents (B, ...), timesteps (B,) -> uncond and cond


@dataclass(frozen=True)
class Probe:
    """The network call that judges a picture with latents x0.

    timestep: passed to the network. log_snr: the noise level of its input.
    given:    (signal, noise): the network's input is signal * x0 + noise * eps.
    target:   (signal, noise): its ideal prediction is signal * x0 + noise * eps.
    """

    timestep: float
    log_snr: float
    given: tuple[float, float]
    target: tuple[float, float]

    @classmethod
    def of(cls, scheduler: Scheduler, log_snr: float = LOG_SNR) -> Probe:
        """Make a probe at the level of `scheduler`'s training schedule that is nearest to `log_snr`.

        Raises ValueError if the schedule is not known, or has no level near LOG_SNR.
        """
        own, formulation = own_settings(scheduler), family(scheduler)
        if formulation == "flow":
            noise = 1 / (1 + math.exp(log_snr / 2))
            timestep = (1 - noise if own.get("invert_sigmas") else noise) * own.get("num_train_timesteps", 1000)
        elif formulation == "edm":
            timestep = float(scheduler.precondition_noise(torch.tensor(own["sigma_data"] * math.exp(-log_snr / 2))))
        elif hasattr(scheduler, "alphas_cumprod"):
            levels = vp_log_snr(scheduler.alphas_cumprod, torch.arange(len(scheduler.alphas_cumprod)))
            timestep = int((levels - log_snr).abs().argmin())
            log_snr = levels[timestep].item()
            if own.get("timestep_type") == "continuous":  # the timestep of such a network is log(sigma) / 4
                timestep = -log_snr / 8
        else:
            raise ValueError(f"scheduler {type(scheduler).__name__} has no known noise levels, so pictures cannot be judged")
        return cls.at(scheduler, float(timestep), log_snr)

    @classmethod
    def at(cls, scheduler: Scheduler, timestep: float, log_snr: float) -> Probe:
        """Make a probe at the noise level with this timestep and log SNR.

        Raises ValueError if it is not near LOG_SNR, or for an unknown prediction type.
        """
        if not abs(log_snr - LOG_SNR) <= NEAR:
            raise ValueError(
                f"pictures are judged near log SNR {LOG_SNR:g}, and the nearest level here is {log_snr:.2f}: take a whole run, "
                "from noise on"
            )
        own, formulation = own_settings(scheduler), family(scheduler)
        if formulation == "flow":
            noise = 1 / (1 + math.exp(log_snr / 2))
            return cls(timestep, log_snr, (1 - noise, noise), (-1.0, 1.0))
        if formulation == "edm":
            return cls(timestep, log_snr, *_edm(scheduler, own["sigma_data"] * math.exp(-log_snr / 2)))
        signal, noise = (1 / math.sqrt(1 + math.exp(sign * log_snr)) for sign in (-1, 1))
        targets = {"epsilon": (0.0, 1.0), "v_prediction": (-noise, signal), "sample": (1.0, 0.0)}
        prediction = own.get("prediction_type", "epsilon")
        if prediction not in targets:
            raise ValueError(f"scheduler predicts {prediction!r}; pictures are judged by {', '.join(targets)} and flow")
        return cls(timestep, log_snr, (signal, noise), targets[prediction])

    def question(self, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(the network's input, the target), both (B, ...) float32, for latents of pictures and noises (B, ...)."""
        signal, share = self.given
        clean, drawn = self.target
        x, noise = latents.float(), noise.to(latents.device, torch.float32)
        return signal * x + share * noise, clean * x + drawn * noise

    def cleaned(self, given: Tensor, predicted: Tensor) -> Tensor:
        """The latents x0 that follow from a prediction: (B, ...) float32. given, predicted: (B, ...), its input and output."""
        (signal, share), (clean, drawn) = self.given, self.target
        return (drawn * given.float() - share * predicted.float()) / (signal * drawn - share * clean)


def _edm(scheduler: Scheduler, sigma: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """`given` and `target` under EDM's preconditioning (Karras et al., https://arxiv.org/abs/2206.00364, table 1)."""
    one, level = torch.ones(1), torch.tensor(sigma)
    scale = float(scheduler.precondition_inputs(one, level))
    skip, out = (float(scheduler.precondition_outputs(x, y, level)) for x, y in ((one, 0 * one), (0 * one, one)))
    return (scale, scale * sigma), ((1 - skip) / out, -skip * sigma / out)


def noises(seed: int, shape: Sequence[int]) -> Iterator[Tensor]:
    """Yield the noises (*shape) that judge a sample with this seed, float32 on the CPU, without end."""
    generator = torch.Generator("cpu").manual_seed(seed ^ OWN)
    while True:
        yield torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def nearer(target: Tensor, uncond: Tensor, cond: Tensor) -> Tensor:
    """`definition.basin_score` of each sample: (B, ...) -> (B,) float32."""
    target, uncond, cond = (x.float().contiguous() for x in (target, uncond, cond))
    return (noise_gap(target, uncond) / noise_gap(target, cond)).log()


def scores(predict: Predict, probe: Probe, latents: Tensor, seeds: Sequence[int], probes: int) -> Tensor:
    """The basin score of each picture: latents (B, ...) -> (B,) float32 on the CPU.

    NaN for a picture whose latents or predictions are not finite.
    """
    drawn = [noises(seed, latents.shape[1:]) for seed in seeds]
    timesteps, found = torch.full((len(latents),), probe.timestep, device=latents.device), []
    for _ in range(probes):
        given, target = probe.question(latents, torch.stack([next(one) for one in drawn]))
        found.append(nearer(target, *predict(given.to(latents.dtype), timesteps)))
    return torch.stack(found).mean(dim=0).cpu()


def both(network: Network, given: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """(uncond, cond) of one call of `network`, at the timesteps (B,)."""
    uncond, cond = network(torch.cat([given, given]), torch.cat([timesteps, timesteps]), "both").chunk(2)
    return uncond, cond


def suspects(scores: Any, threshold: float) -> Any:
    """Whether pictures look like copies: the score is above the threshold, or NaN. A tensor gives a bool tensor."""
    return ~(scores <= threshold) if isinstance(scores, Tensor) else not scores <= threshold
