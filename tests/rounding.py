"""How far float32 moves a sample by its rounding alone: what two right ways to the same sample may differ by.

No bound in absolute numbers holds on every processor: guidance and a random network amplify over the steps what they round.
"""

import copy
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map


@contextmanager
def rounded(unet):
    """The UNet's predictions moved at random by twice as much as its first one is off the same network's in float64."""
    exact = copy.deepcopy(unet).double()
    rng, scale = torch.Generator().manual_seed(0), None

    def move(module, given, named, result):
        nonlocal scale
        if scale is None:
            doubled = tree_map(lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, (given, named))
            scale = (result[0] - exact(*doubled[0], **doubled[1])[0]).std()
        return (result[0] + 2 * scale * torch.randn(result[0].shape, generator=rng)).to(result[0]), *result[1:]

    handle = unet.register_forward_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def assert_same_but_for_rounding(found, expected, pipe, sample):
    """found, expected: latents or pixels. sample(): makes what is expected from `pipe` again."""
    off = (found - expected).abs().max()
    if off == 0:
        return
    with rounded(pipe.unet):
        spread = (sample() - expected).abs().max()
    assert off <= 4 * spread, f"{off:.2g} apart, where rounding accounts for {spread:.2g}"
