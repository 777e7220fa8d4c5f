"""The checks bite: what is broken by hand here is found by a check that otherwise passes."""

import copy
from functools import partial

import pytest
import torch
from basinescape import FirstMinimum, Guidance, Sampler
from basinescape.kernels import noise_gap, noise_gap_eager
from basinescape.kernels.dispatch import INTERPRETED
from basinescape.kernels.tiles import Tiles
from interleaving import SMALL, interleaved
from mutants import host_mutant, module, mutant
from stepruns import check_run

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(not INTERPRETED, reason="mutants of kernels are interpreted")]

RUN = {
    "shape": (2, 4, 8, 9),
    "dtype": torch.float32,
    "layout": "contiguous",
    "channels_last": False,
    "multistep": True,
    "scaled": True,
    "earliest": 2,
    "drop": 0.0,
    "limited": False,
    "fall": 0.0,
    "latest": 7,
    "wait": 0,
    "calls": 1,
    "begins": 1,
    "seed": 3,
}


def steps(resident, **changes):
    """Some orders in which the programs of the samples of a run may go on; `resident` of them may wait for each other."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Tiles, "of", SMALL.of)
        patches.setattr(Tiles, "resident", lambda tiles, device: resident)
        for seed in range(2):
            with interleaved(seed):
                check_run(RUN | changes)


def gaps():
    """Two launches in one stream."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Tiles, "of", SMALL.of)
        kept = torch.zeros(2, dtype=torch.int32)
        patches.setattr(module("kernels.guide"), "_arrival_counters", lambda *_: kept)
        for seed in range(2):
            uncond, cond = torch.randn((2, 2, 4, 8, 9), generator=torch.Generator().manual_seed(seed))
            with interleaved(seed):
                torch.testing.assert_close(noise_gap(uncond, cond), noise_gap_eager(uncond, cond))


MEET, STRANGERS, AFTER = partial(steps, 1000), partial(steps, 0, latest=0), partial(steps, 1000, wait=2)
FALLEN = partial(steps, 1000, earliest=7, fall=0.6)
MUTANTS = {
    "no wait for the other programs": (MEET, "step", "step_kernel", "while seen < goal:", "while seen < 0:"),
    "one program too few is waited for": (MEET, "step", "step_kernel", "while seen < goal:", "while seen < goal - 1:"),
    "the goal of the first launch": (MEET, "step", "step_kernel", "(arrived // tiles + 1) * tiles", "tiles"),
    "a sum is not stored": (MEET, "tiles", "arrive", "tl.store(partials + sample * tiles + tile, squares)", "pass"),
    "the first to arrive keeps the books": (STRANGERS, "step", "step_kernel", "% tiles == tiles - 1", "% tiles == 0"),
    "counters are not put back": (gaps, "guide", "guide_kernel", "tl.store(arrivals + sample, 0)", "pass"),
    "the gap of two steps ago is the last one": (MEET, "step", "step_kernel", "tl.load(own - 2", "tl.load(own - 1"),
    "the minimum may be at its end": (MEET, "rules", "transition", "(last < gap)", "(last > gap)"),
    "a gap has fallen where it is above": (FALLEN, "rules", "transition", "(gap < fall * peak)", "(gap > fall * peak)"),
    "the wait is not kept": (AFTER, "rules", "transition", "step + wait.to(tl.int64)", "step"),
    "a sample that is done goes on": (MEET, "step", "step_kernel", "goes = k <= end", "goes = k >= 0"),
    "a sample goes past its own last row": (MEET, "step", "step_kernel", "end = tl.load(last + sample)", "end = tl.load(last)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_is_found(name):
    check, *broken = MUTANTS[name]
    with mutant(*broken), pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", [MEET, STRANGERS, AFTER, FALLEN, gaps])
def test_the_whole_kernel_passes(check):
    with mutant("step", "step_kernel", "while seen < goal:", "while seen < goal:"):
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
        ("Graphs", "lane", "session.table[: len(plan.table)].copy_(plan.table)"),
        ("Graphs", "lane", "session.network.load(network)"),
        ("Session", "start", "self.state.start(noise, self.table, last=plan.last)"),
    ],
)
def test_what_a_graph_is_not_given_is_missed(pipe, device, owner, name, old):
    with host_mutant("sampling.graphs", owner, name, old, "pass"), pytest.raises(AssertionError):
        captured(pipe)
