"""Move the initial noise to where the prompt's pull is less sharp, and leave the first steps unguided.

Han et al., "Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion Models", NeurIPS 2025,
https://arxiv.org/abs/2510.08625, the batch-wise adjustment (algorithm 1) with the numbers of its authors' scripts. With
e = cond - uncond at the first timestep, for each sample by itself, ITERATIONS times

    x <- x - RATE (e(x + RHO e(x) / |e(x)|) - e(x))

then no guidance for a tenth of the steps (5 of 50). Each iteration costs two more pairs of predictions. The authors' RHO of 50
is for latents of 4 x 64 x 64 elements. For n elements it is scaled with sqrt(n), which is the norm of the noise.
"""

from __future__ import annotations

from basinescape.kernels.state import per_sample
from torch import Tensor

from .method import Method, starting_at
from .stepwise import Predict

RHO, RATE, ITERATIONS = 50.0, 0.7, 2
SIZE = 4 * 64 * 64  # elements of the latents for which RHO was chosen


def adjusted(predict: Predict, noise: Tensor) -> Tensor:
    """The initial noise (B, ...), made from the drawn `noise` (B, ...)."""
    rho = RHO * (noise[0].numel() / SIZE) ** 0.5

    def pull(x: Tensor) -> Tensor:
        uncond, cond = predict(x)
        return cond - uncond

    for _ in range(ITERATIONS):
        here = pull(noise)
        ahead = pull(noise + here * per_sample(rho / here.flatten(1).norm(dim=1), here))
        noise = noise - RATE * (ahead - here)
    return noise


def method(scale: float, steps: int) -> Method:
    return Method(starting_at(max(1, steps // 10), scale, steps), noise=adjusted)
