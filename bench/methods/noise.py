"""The initial noise moved to where the prompt pulls less sharply, and the first steps left unguided.

Han et al., "Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion Models", NeurIPS 2025,
https://arxiv.org/abs/2510.08625, the batch-wise adjustment (algorithm 1) with the numbers of its authors' scripts. With
e = cond - uncond at the first timestep, each sample by itself, ITERATIONS times

    x <- x - RATE (e(x + RHO e(x) / |e(x)|) - e(x))

then no guidance for a tenth of the steps (5 of 50). It costs two pairs of predictions more an iteration. Their RHO of 50 is for
latents of 4 x 64 x 64 numbers; for others it is as large beside the noise, whose norm is the root of their number.
"""

from __future__ import annotations

from basinescape.kernels.state import per_sample
from torch import Tensor

from .method import Method, starting_at
from .stepwise import Predict

RHO, RATE, ITERATIONS = 50.0, 0.7, 2
SIZE = 4 * 64 * 64  # numbers in the latents that RHO is for


def adjusted(predict: Predict, noise: Tensor) -> Tensor:
    """The noise (B, ...) to begin from, of that which was drawn."""
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
