"""The checks bite: what is broken by hand here is found by a check that otherwise passes."""

import copy
from functools import partial

import pytest
import torch
from basinescape import FirstMinimum, Guidance, Sampler
from basinescape.kernels import noise_gap, noise_gap_eager
from basinescape.kernels.dispatch import INTERPRETED
from basinescape.kernels.tiles import Tiles
from kernelruns import RUN, check_run
from mutants import host_mutant, mutant
from tiled import SMALL

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(not INTERPRETED, reason="mutants of kernels are interpreted")]


def steps(**changes):
    """A run in tiles."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Tiles, "of", SMALL.of)
        check_run(RUN | changes)


def gaps():
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Tiles, "of", SMALL.of)
        uncond, cond = torch.randn((2, 2, 4, 8, 9), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(noise_gap(uncond, cond), noise_gap_eager(uncond, cond))


KNOWN, WAITING, FALLEN = partial(steps, latest=0), partial(steps, wait=2), partial(steps, earliest=7, fall=0.6)
MUTANTS = {
    "a sum is not stored": (steps, "sums", "sums_kernel", "tl.store(partials + sample * tiles + tile,", "(0,"),
    "a tile's sum is not stored": (gaps, "guide", "guide_kernel", "tl.store(partials + sample * tiles + tile,", "(0,"),
    "the last tiles are not added": (gaps, "sums", "total", "mask=lanes < tiles - start", "mask=lanes < tiles - start - 1"),
    "the state is not recorded": (KNOWN, "weight_decision", "record", "tl.store(row + sample, k + 1, mask=active)", "pass"),
    "the gap of two steps ago is the last one": (
        steps,
        "weight_decision",
        "find_transition",
        "tl.load(own - 2",
        "tl.load(own - 1",
    ),
    "the minimum may be at its end": (steps, "rules", "transition", "(last < gap)", "(last > gap)"),
    "a gap has fallen where it is above": (FALLEN, "rules", "transition", "(gap < fall * peak)", "(gap > fall * peak)"),
    "the wait is not kept": (WAITING, "rules", "transition", "step + wait.to(tl.int64)", "step"),
    "a sample that is done goes on": (steps, "weight_decision", "place", "active = k <= end", "active = k >= 0"),
    "a sample goes past its own last row": (steps, "weight_decision", "place", "tl.load(last + sample)", "tl.load(last)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_is_found(name):
    check, *broken = MUTANTS[name]
    with mutant(*broken), pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", [steps, KNOWN, WAITING, FALLEN, gaps])
def test_the_whole_kernel_passes(check):
    with mutant("weight_decision", "place", "active = k <= end", "active = k <= end"):
        check()


def captured(pipe):
    """Two prompts and guidances, one after the other, from one captured step and from none."""
    samplers = Sampler.from_pipeline(pipe), Sampler.from_pipeline(copy.deepcopy(pipe).to("cuda"), capture=True)
    for animal, guidance in (("cat", Guidance.delayed(7.5, until=FirstMinimum())), ("frog", Guidance.cfg(3.0))):
        found = (
            s([f"a picture of a {animal}"], 7, 4, guidance, output="latent", progress=False).latents.cpu() for s in samplers
        )
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("owner", "name", "old"),
    [
        ("Graphs", "open_batch", "session.table[: len(plan.table)].copy_(plan.table)"),
        ("Graphs", "open_batch", "session.network.load(network)"),
        ("Session", "start", "self.state.start(noise, self.table, last=plan.last)"),
    ],
)
def test_what_a_graph_is_not_given_is_missed(pipe, device, owner, name, old):
    with host_mutant("sampling.cuda_graphs", owner, name, old, "pass"), pytest.raises(AssertionError):
        captured(pipe)
