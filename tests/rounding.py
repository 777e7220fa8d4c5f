"""How far float32 moves a sample by its rounding alone: what two right ways to the same sample may differ by.

No bound in absolute numbers holds on every processor: guidance and a random network amplify over the steps what they round.
"""

import copy
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map

NEAR = 5e-5  # so close that nobody need ask what rounding does there
LEEWAY = 8  # times the spread that a few draws show
DRAWS = 3


def spread(network, sample, expected):
    """How far what `sample` makes lies from `expected` while the network rounds at random: the most of a few draws."""
    off = []
    for seed in range(DRAWS):
        with rounded(network, seed):
            off.append((sample() - expected).nan_to_num().abs().max())
    return torch.stack(off).max()


@contextmanager
def rounded(network, seed=0):
    """The network's predictions moved at random by twice as much as its first one is off the same network's in float64."""
    exact = copy.deepcopy(network).double()
    rng, scale = torch.Generator().manual_seed(seed), None

    def move(module, given, named, result):
        nonlocal scale
        if scale is None:
            doubled = tree_map(lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, (given, named))
            scale = (result[0] - exact(*doubled[0], **doubled[1])[0]).std()
        return (result[0] + 2 * scale * torch.randn(result[0].shape, generator=rng)).to(result[0]), *result[1:]

    handle = network.register_forward_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def assert_same_but_for_rounding(found, expected, pipe, sample):
    """found, expected: a tensor or several, such as latents and noise gaps. sample(): the expected ones from `pipe`, again."""
    if torch.is_tensor(found):
        found, expected, again = (found,), (expected,), lambda: (sample(),)
    else:
        again = sample
    if all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(found, expected, strict=True)):
        return
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one.isnan(), other.isnan())
        off = (one - other).nan_to_num().abs().max()
        if off > NEAR:
            network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
            apart = spread(network, lambda i=i: again()[i], other)
            assert off <= LEEWAY * apart, f"{off:.2g} apart, where rounding accounts for {apart:.2g}"


def close(found, expected, own=0.0):
    """Whether they are equal but for the rounding of a few operations, or of what was compared with, `own`."""
    return (found - expected).abs().max() <= LEEWAY * max(own, NEAR * expected.abs().max())
