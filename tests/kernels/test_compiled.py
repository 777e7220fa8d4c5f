"""Every kernel as Triton compiles it, run on the CPU against the definition in float64: `make sanitize`.

A launch that reads or writes outside its tensors, or in which two programs touch what one of them writes, ends its test; memory
that nobody wrote holds NaN.
"""

import math
from itertools import product

import pytest
import torch
from basinescape.kernels import definition, guide_eager
from basinescape.kernels.dispatch import INTERPRETED, recorded
from basinescape.kernels.guide import launch_guide
from basinescape.kernels.operands import empty_guided
from basinescape.kernels.rules import RULES, columns_of, options_of
from basinescape.kernels.state import State
from basinescape.kernels.step import launch_step
from basinescape.kernels.table import Column
from basinescape.kernels.tiles import Tiles
from kernelruns import RUN, STEPS, assert_defined, check_run, laid_out, table_of
from mutants import mutant
from ruleruns import COMBINING, check, follow
from tiled import SMALL

sanitize = pytest.importorskip("ttsem.sanitize")
from compiled import compiled, step, touched  # noqa: E402 (needs ttsem)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiled kernels run where TRITON_INTERPRET is 0")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "chunked")
TILED = ((3, 10, 11), (4, 8, 9), (3, 17, 29))  # 6, 5 and 24 small tiles, the last one never whole


def cases(first, *shapes):
    """(shape, dtype, layout): all dtypes in all layouts of the first shape, and each of them once of the others."""
    return [*product([first], DTYPES, LAYOUTS), *((s, d, x) for s in shapes for d, x in zip(DTYPES, LAYOUTS, strict=True))]


KNOWN = {"earliest": STEPS, "latest": 3}  # nobody looks at a gap


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(Tiles, "of", SMALL.of)


def run(**changes):
    """A run of compiled kernels: every call a step, the second one with one prediction. Returns the number of launches."""
    with compiled() as session:
        check_run(RUN | changes, {1}, "cuda", step)
    return session.launches


@pytest.mark.parametrize(("shape", "dtype", "layout"), cases((3, 5, 7), (1, 1, 1), (4, 8, 8), (4, 40, 40), (4, 64, 64)))
def test_a_step_of_one_program_a_sample(shape, dtype, layout):
    for changes in ({}, KNOWN, {"multistep": False, "scaled": False}, {"channels_last": True, "fall": 0.5, "wait": 2}):
        assert run(shape=(2, *shape), dtype=dtype, layout=layout, **changes) == STEPS


@pytest.mark.parametrize(("shape", "dtype", "layout"), cases(*TILED))
def test_a_step_of_several_tiles(small, shape, dtype, layout):
    """Two launches where the weight is known, three where it depends on the gap; two for one prediction."""
    same = {"shape": (2, *shape), "dtype": dtype, "layout": layout}
    assert run(**same) == run(**same, channels_last=True, limited=True) == 3 * (STEPS - 1) + 2
    assert run(**same, **KNOWN) == run(**same, **KNOWN, multistep=False, scaled=False) == 2 * STEPS


def test_tiles_of_the_usual_size():
    assert run(shape=(2, 3, 80, 81), dtype=torch.float16) == 3 * (STEPS - 1) + 2


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rule", COMBINING)
def test_a_step_under_every_rule(monkeypatch, rule, tiles):
    monkeypatch.setattr(Tiles, "of", SMALL.of)
    for finds in (True, False):
        with compiled() as session:
            follow(rule, finds, (4, 8, 9) if tiles else (4, 8, 8), "cuda", step)
        assert session.launches == (3 if tiles else 1) * 4


def pair(shape, dtype, layout):
    """uncond and cond of three samples."""
    each = torch.randn((2, 3, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    return (laid_out(x, layout) for x in each)


WEIGHTS = (7.5, torch.tensor([7.5, 0.0, -2.0]), torch.tensor([[7.5, 9.0], [1.0, 9.0], [-2.0, 9.0]], dtype=torch.float64)[:, 0])


@pytest.mark.parametrize(("shape", "dtype", "layout"), cases((3, 5, 7), (1, 1, 1), (4, 8, 8), *TILED))
def test_guide_and_noise_gap(small, shape, dtype, layout):
    uncond, cond = pair(shape, dtype, layout)
    for weight in WEIGHTS:
        with compiled() as session:
            guided, gap, alone = empty_guided(uncond), *torch.empty((2, 3))
            launch_guide(uncond, cond, weight, guided, gap)
            launch_guide(uncond, cond, 0.0, None, alone)
        assert session.launches == (2 if SMALL.of(math.prod(shape))[2] == 1 else 4)
        assert_defined(uncond, cond, weight, guided, gap)
        assert torch.equal(alone, gap)


@pytest.mark.parametrize("rule", COMBINING)
@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_guide_under_every_rule(small, shape, dtype, rule):
    uncond, cond = pair(shape, dtype, "chunked")
    with compiled() as session:
        guided, gap = empty_guided(uncond), torch.empty(3)
        launch_guide(uncond, cond, WEIGHTS[1], guided, gap, RULES[rule], columns_of(options_of(rule, {})))
    assert session.launches == (1 if shape == (4, 8, 8) else 2)
    check(guided, uncond, cond, WEIGHTS[1], rule)
    torch.testing.assert_close(gap, guide_eager(uncond, cond, 1.0)[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 9)])
def test_the_guided_prediction_alone(small, shape):
    table, noise = table_of(torch.Generator().manual_seed(0)), torch.zeros(3, *shape)
    uncond, cond = pair(shape, torch.float32, "contiguous")
    with compiled():
        state = State.empty((3, *shape), STEPS, torch.float32, "cuda", True).start(noise, table)
        guided = torch.empty_like(state.latents.x)
        launch_step(uncond, cond, table, True, guided, state)
        assert state.transition.row.tolist() == [0] * 3 and torch.equal(state.latents.x, noise)
    expected = [definition.guided(u, c, table[0, Column.BEFORE].item()) for u, c in zip(uncond, cond, strict=True)]
    torch.testing.assert_close(guided.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


BEYOND = 1100, (16, 21, 60, 104)  # samples, and the shape of one: 2.3e9 elements


@pytest.mark.parametrize("shape", [BEYOND, (140_000, (4, 64, 64))])
def test_addresses_beyond_32_bits(shape):
    """The last program of each launch touches the last elements, and no others."""
    batch, shape = shape
    size = math.prod(shape)
    uncond, cond = torch.empty((2 * batch, *shape), dtype=torch.float16, device="meta").chunk(2)
    state = State.empty((batch, *shape), STEPS, torch.float16, "meta", multistep=True)
    gap, table = torch.empty(batch, device="meta"), torch.empty((STEPS, len(Column)), device="meta")
    with recorded() as launches:
        launch_step(uncond, cond, table, True, None, state)
        launch_guide(uncond, cond, 7.5, torch.empty_like(uncond), gap)
    edge = (batch * size - (size % 4096 or 4096) if size > 16384 else batch * size - size), batch * size - 1
    assert edge[1] > 2**31
    for launch in launches:
        found = touched(launch, launch.programs - 1)
        whole = {"uncond", "cond", "model_input"} & found.keys()  # what the halves of a batch lie in
        assert {found[name] for name in whole} <= {(edge[0], 2 * batch * size - 1)}
        assert {found[name] for name in {"unscaled", "history", "guided"} & found.keys()} <= {edge}
        assert whole or launch.kernel.__name__ in ("record_kernel", "gap_kernel")


STRIDED = {"layout": "chunked"}
MUTANTS = {  # what is broken, what it is found by, the run that finds it, and the line
    "a mask is left out": ("oob_read", {}, "sums", "sums_kernel", "mask = lanes < size - start", "mask = lanes < BLOCK"),
    "a store without a mask": (
        "oob_write",
        {},
        "step",
        "finish",
        "tl.store(second + lanes, fed, mask=mask)",
        "tl.store(second + lanes, fed)",
    ),
    "a stride is dropped": (None, STRIDED, "step", "tile_kernel", "sample * uncond_stride", "sample * size"),
    "a tile stores where another does": ("race", {}, "step", "tile_kernel", "by = sample * size + start", "by = sample * size"),
    "a sum is stored where another is": (
        "race",
        {},
        "sums",
        "sums_kernel",
        "sample * tiles + tile, tl.sum",
        "sample * tiles, tl.sum",
    ),
    "a sum is not stored": (None, {}, "sums", "sums_kernel", "tl.store(partials + sample * tiles + tile, tl.sum", "(0, tl.sum"),
    "tiles record the state": (
        "race",
        {},
        "step",
        "tile_kernel",
        "    by = sample",
        "    tl.store(at + sample, left)\n    by = sample",
    ),
    "the state of the next sample is recorded": (
        "oob_write",
        {},
        "weight_decision",
        "record",
        "tl.store(at + sample",
        "tl.store(at + 2 * batch + sample + 1",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_is_found(small, name):
    kind, changes, *broken = MUTANTS[name]
    with mutant(*broken), pytest.raises((AssertionError, sanitize.KernelFault)) as found:
        run(**changes)
    assert getattr(getattr(found.value, "fault", None), "kind", None) == kind


def test_an_address_of_32_bits_is_found():
    broken = mutant("tiles", "tile_of", "(tl.program_id(0) // tiles).to(tl.int64)", "tl.program_id(0) // tiles")
    with broken, pytest.raises(AssertionError):
        test_addresses_beyond_32_bits(BEYOND)
