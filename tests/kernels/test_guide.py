"""guide and noise_gap: the kernel (on a GPU, or in Triton's interpreter) against the float64 definition."""

import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
from basinescape.kernels import backend, guide, guide_eager, noise_gap, noise_gap_eager
from basinescape.kernels.tiles import Tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelruns import assert_defined
from tiled import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.interpreter
module = importlib.import_module("basinescape.kernels.guide")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 7, 1024, 3000, 16384, 16385)  # odd, one program a sample, several


def predictions(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))


@st.composite
def operands(draw):
    """(uncond, cond, weight) of any accepted shape, dtype, layout and kind of weight."""
    batch = draw(st.integers(0, 3))
    sample = draw(st.lists(st.integers(1, 9), max_size=3) | st.sampled_from([(16384,), (5, 3300), (4, 64, 65)]))
    dtype = draw(st.sampled_from(DTYPES))
    order = draw(st.permutations(range(len(sample))))  # of the dimensions in memory, slowest first
    layout = draw(st.sampled_from(["apart", "halves of the batch", "halves of the channels", "off alignment"]))
    stored = [sample[i] for i in order]
    seed = draw(st.integers(0, 99))
    if layout == "halves of the batch":
        pair = torch.cat(predictions(batch, *stored, dtype=dtype, seed=seed)).chunk(2)
    elif layout == "halves of the channels" and sample:
        pair = torch.cat(predictions(batch, *stored, dtype=dtype, seed=seed), dim=1).chunk(2, dim=1)
    elif layout == "off alignment":
        count = batch * math.prod(sample)
        pair = [x[1:].view(batch, *stored) for x in predictions(count + 1, dtype=dtype, seed=seed)]
    else:
        pair = predictions(batch, *stored, dtype=dtype, seed=seed)
    back = [0, *(1 + order.index(i) for i in range(len(sample)))]
    uncond, cond = (x.permute(back) for x in pair)
    number = st.floats(-20, 20, width=32)
    if draw(st.booleans()):
        return uncond, cond, draw(number)
    weights = torch.tensor(draw(st.lists(number, min_size=batch, max_size=batch)), dtype=torch.float32, device=DEVICE)
    strided = torch.stack([weights, weights + 1], dim=1)[:, 0]  # a column of a table of weights
    return uncond, cond, draw(st.sampled_from([weights, strided, weights.double()]))


@settings(max_examples=120, deadline=None)
@given(operands())
def test_kernel_is_the_definition(given_operands):
    uncond, cond, weight = given_operands
    guided, gap = guide(uncond, cond, weight)
    assert_defined(uncond, cond, weight, guided, gap)
    assert torch.equal(noise_gap(uncond, cond), gap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_are_the_definition(monkeypatch, dtype):
    monkeypatch.setattr(Tiles, "of", SMALL.of)
    uncond, cond = predictions(3, 4, 8, 9, dtype=dtype)
    guided, gap = guide(uncond, cond, -2.0)
    assert_defined(uncond, cond, -2.0, guided, gap)
    assert torch.equal(noise_gap(uncond, cond), gap)


@settings(max_examples=120, deadline=None)
@given(operands())
def test_eager_in_the_inputs_dtype_is_the_definition(given_operands):
    uncond, cond, weight = given_operands
    guided, gap = guide_eager(uncond, cond, weight)
    assert_defined(uncond, cond, weight, guided, gap)
    assert torch.equal(noise_gap_eager(uncond, cond), gap)


@pytest.mark.parametrize(
    "change", [lambda x: x.transpose(0, 1), lambda x: x.as_strided((3, 2, 4), (2, 4, 1)), lambda x: x[:1].expand(4, 3, 8)]
)
def test_the_definition_takes_samples_that_lie_across_each_other(change):
    uncond, cond = (change(torch.randn((4, 3, 8), generator=torch.Generator().manual_seed(seed))) for seed in (0, 1))
    expected = torch.stack([(c - u).double().norm() for u, c in zip(uncond, cond, strict=True)])
    torch.testing.assert_close(noise_gap_eager(uncond, cond).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(guide_eager(uncond, cond, 2.0)[1].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", [guide, guide_eager])
def test_known_numbers(function):
    uncond = torch.tensor([[1.0, 2.0], [1.0, 2.0]], device=DEVICE)
    cond = torch.tensor([[4.0, 6.0], [1.0, 2.0]], device=DEVICE)
    for weight, first in ((0.0, [1.0, 2.0]), (1.0, [4.0, 6.0]), (7.5, [23.5, 32.0]), (-2, [-5.0, -6.0])):
        guided, gap = function(uncond, cond, weight)
        assert guided.tolist() == [first, [1.0, 2.0]]
        assert gap.tolist() == [5.0, 0.0]
    guided, _ = function(uncond, cond, torch.tensor([-2.0, 3.0], device=DEVICE))
    assert guided.tolist() == [[-5.0, -6.0], [1.0, 2.0]]


@pytest.mark.parametrize("function", [guide, guide_eager])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_sample_has_the_same_bits_in_any_batch(function, dtype, size):
    uncond, cond = torch.cat(predictions(4, size, dtype=dtype)).chunk(2)
    weight = torch.tensor([7.5, -2.0, 0.0, 1.0], device=DEVICE)
    guided, gap = function(uncond, cond, weight)
    for chosen in ([0], [3], [2, 1], [3, 3, 0, 1, 2]):
        some_guided, some_gap = function(uncond[chosen], cond[chosen], weight[chosen])
        assert torch.equal(some_guided, guided[chosen])
        assert torch.equal(some_gap, gap[chosen])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [30, 16385])
@pytest.mark.parametrize("operand", ["uncond", "cond", "weight"])
def test_not_a_number_stays_in_its_sample(operand, size, bad):
    uncond, cond = predictions(3, size)
    weight = torch.tensor([7.5, 2.0, -2.0], device=DEVICE)
    clean_guided, clean_gap = guide(uncond, cond, weight)
    {"uncond": uncond, "cond": cond, "weight": weight.view(3, 1)}[operand][1, -1] = bad
    guided, gap = guide(uncond, cond, weight)
    expected_guided, expected_gap = guide_eager(uncond, cond, weight)
    for sample in (0, 2):
        assert torch.equal(guided[sample], clean_guided[sample])
        assert gap[sample] == clean_gap[sample]
    torch.testing.assert_close(guided[1], expected_guided[1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gap, expected_gap, rtol=1e-5, atol=0, equal_nan=True)
    assert not guided[1, -1].isfinite()


def test_many_rounds_of_partial_sums(monkeypatch):
    """A sample of more tiles than a tile has elements, the last one ragged."""
    monkeypatch.setattr(Tiles, "of", Tiles(blocks=(), tile=(16, 1)).of)
    uncond, cond = predictions(2, 16 * 40 + 5)
    assert_defined(uncond, cond, 3.0, *guide(uncond, cond, 3.0))


class Ops(TorchDispatchMode):
    """Every PyTorch operation that runs inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Launches(list):
    """Stands in for a kernel and keeps each launch's arguments."""

    def __getitem__(self, grid):
        return lambda *args, **options: self.append(args)


@pytest.mark.skipif(backend(DEVICE) == "eager", reason="nothing is launched without Triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_halves_of_a_batch_take_one_launch_and_no_copy(monkeypatch, memory_format, dtype):
    both = torch.cat(predictions(2, 4, 8, 6, dtype=dtype)).to(memory_format=memory_format)
    uncond, cond = both.chunk(2)
    weight = torch.tensor([[7.5, 0.0], [-2.0, 0.0]], device=DEVICE)[:, 0]
    guided, gap = guide(uncond, cond, weight)
    assert guided.stride() == uncond.stride()
    assert_defined(uncond, cond, weight, guided, gap)

    launches = Launches()
    monkeypatch.setattr(module, "guide_kernel", launches)
    with Ops() as ops:
        guided, gap = guide(uncond, cond, weight)
    assert ops.names <= {"chunk", "detach", "empty_strided", "new_empty", "empty", "guide"}  # allocations and the launch
    (arguments,) = launches
    assert [x.data_ptr() for x in arguments[:5]] == [x.data_ptr() for x in (uncond, cond, weight, guided, gap)]


def test_halves_of_the_channels_give_a_packed_output():
    uncond, cond = torch.cat(predictions(2, 4, 8, 6), dim=1).to(memory_format=torch.contiguous_format).chunk(2, dim=1)
    guided, gap = guide(uncond, cond, 7.5)
    assert guided.is_contiguous()
    assert_defined(uncond, cond, 7.5, guided, gap)


@pytest.mark.parametrize("size", SIZES)
def test_out_is_written_in_place(size):
    uncond, cond = predictions(2, size)
    expected, expected_gap = guide(uncond, cond, -7.5)
    storage = torch.full((2, 2 * size), 9.0, device=DEVICE)
    gaps = torch.zeros(3, 2, device=DEVICE)
    out = storage[:, :size], gaps[1]
    guided, gap = guide(uncond, cond, -7.5, out=out)
    assert guided is out[0]
    assert gap is out[1]
    assert torch.equal(storage, torch.cat([expected, torch.full_like(expected, 9.0)], dim=1))
    assert torch.equal(gaps, torch.stack([torch.zeros(2, device=DEVICE), expected_gap, torch.zeros(2, device=DEVICE)]))
    assert noise_gap(uncond, cond, out=gaps[2]) is not None
    assert torch.equal(gaps[2], expected_gap)
    guide(uncond, cond, -7.5, out=(uncond, gap))
    assert torch.equal(uncond, expected)


def test_no_samples_and_no_elements():
    for shape in ((0, 4, 8, 8), (0,), (2, 0, 3)):
        guided, gap = guide(*predictions(*shape), 7.5)
        assert guided.shape == shape
        assert gap.tolist() == [0.0] * shape[0]


def test_no_gradient_flows():
    uncond, cond = (x.requires_grad_() for x in predictions(2, 5))
    guided, gap = guide(uncond, cond, 7.5)
    assert not guided.requires_grad
    assert not gap.requires_grad


U, C = predictions(2, 3, 4)


@pytest.mark.parametrize(
    "uncond, cond, weight, message",
    [
        (U, C[:1], 1.0, r"cond has shape .*\[1, 3, 4\].*\[2, 3, 4\]"),
        (U, C.half(), 1.0, r"cond has dtype torch\.float16.*torch\.float32"),
        (U, C.to("meta"), 1.0, r"cond has device meta"),
        (U, C.transpose(1, 2).contiguous().transpose(1, 2), 1.0, r"cond has strides \(12, 1, 3\).*\(12, 4, 1\)"),
        (U[..., ::2], C[..., ::2], 1.0, r"uncond has strides \(12, 4, 2\).*dense"),
        (U.transpose(0, 1), C.transpose(0, 1), 1.0, r"uncond has strides \(4, 12, 1\).*dense"),
        (U[:, :1].expand(2, 3, 4), C, 1.0, r"uncond has strides \(12, 0, 1\).*dense"),
        (U.double(), C.double(), 1.0, r"uncond has dtype torch\.float64.*float32, float16, bfloat16"),
        (U.int(), C.int(), 1.0, r"uncond has dtype torch\.int32"),
        (U[0, 0, 0], C[0, 0, 0], 1.0, r"uncond has no dimension"),
        (U.tolist(), C, 1.0, r"uncond is a list; it must be a torch\.Tensor"),
        (U, None, 1.0, r"cond is a NoneType; it must be a torch\.Tensor"),
        (U, C, math.nan, r"weight is nan; .*finite"),
        (U, C, -math.inf, r"weight is -inf; .*finite"),
        (U, C, 1e39, r"weight is 1e\+39; .*finite"),
        (U, C, [1.0, 2.0], r"weight is \[1\.0, 2\.0\]; allowed"),
        (U, C, torch.ones(3, device=DEVICE), r"weight has shape \(3,\); .*\(2,\)"),
        (U, C, torch.ones((), device=DEVICE), r"weight has shape \(\); .*\(2,\)"),
        (U, C, torch.ones(2, 1, device=DEVICE), r"weight has shape \(2, 1\)"),
        (U, C, torch.ones(2, dtype=torch.int64, device=DEVICE), r"weight has dtype torch\.int64"),
        (U, C, torch.ones(2, device="meta"), r"weight is on meta"),
    ],
)
def test_operands_that_do_not_match(uncond, cond, weight, message):
    with pytest.raises(ValueError, match=message):
        guide(uncond, cond, weight)
    if message.startswith(("uncond", "cond")):
        with pytest.raises(ValueError, match=message):
            noise_gap(uncond, cond)


@pytest.mark.parametrize(
    "guided, gap, message",
    [
        (U[:1], C[:, 0, 0].clone(), r"out guided has shape"),
        (U.half(), C[:, 0, 0].clone(), r"out guided has dtype torch\.float16"),
        (U.mT.contiguous().mT, C[:, 0, 0].clone(), r"out guided has strides \(12, 1, 3\)"),
        (U[:1].expand(2, 3, 4), C[:, 0, 0].clone(), r"out guided has strides \(0, 4, 1\).*overlap"),
        (None, C[:, 0, 0].clone(), r"out guided is a NoneType; it must be a torch\.Tensor"),
        (U.clone(), 2.0, r"out gap is a float; it must be a torch\.Tensor"),
        (U.clone(), torch.empty(3, device=DEVICE), r"out gap is \(3,\).*\(2,\)"),
        (U.clone(), torch.empty(2, device=DEVICE).half(), r"out gap is \(2,\) torch\.float16.*torch\.float32"),
        (U.clone(), C[:, 0, 0], r"out gap .*strides \(12,\).*contiguous"),
        (U.clone(), torch.empty(2, device="meta"), r"out gap .*on meta"),
    ],
)
def test_outputs_that_do_not_match(guided, gap, message):
    with pytest.raises(ValueError, match=message):
        guide(U, C, 1.0, out=(guided, gap))


@pytest.mark.process
@pytest.mark.parametrize(
    "setting, expected",
    [("0", "eager triton"), ("1", "triton-interpreter triton-interpreter"), ("no triton", "eager eager")],
)
def test_backend_says_what_runs(setting, expected):
    """In processes of their own: the choice is made at import. Without Triton the package imports and works."""
    if setting != "no triton":
        pytest.importorskip("triton")
    hide = "import sys; sys.modules['triton'] = None\n" if setting == "no triton" else ""
    script = (
        hide
        + """
import torch
from basinescape.kernels import backend, guide
print(backend("cpu"), backend("cuda"))
assert guide(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), 2.0)[1].tolist() == [5.0]
"""
    )
    environment = os.environ | {"TRITON_INTERPRET": setting if not hide else "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected.split()


@pytest.mark.skipif(backend(DEVICE) != "triton", reason="needs a GPU")
def test_streams_and_graphs_do_not_share_counters():
    """Launches of several streams, and replays of a graph beside them, give the bits of a launch alone."""
    uncond, cond = predictions(4, 1 << 20, dtype=torch.float16)
    expected = noise_gap(uncond, cond)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = noise_gap(uncond, cond)
    streams = [torch.cuda.Stream() for _ in range(4)]
    gaps = []
    torch.cuda.synchronize()
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                gaps.append(noise_gap(uncond, cond))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    assert all(torch.equal(gap, expected) for gap in gaps)
