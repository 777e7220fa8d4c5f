"""What the kernels make of random predictions, compared with the definition in float64."""

import math
from dataclasses import replace

import torch
from basinescape.kernels import definition, guide_eager, step
from basinescape.kernels.state import State
from basinescape.kernels.table import Column
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernel runs, compiled or interpreted
STEPS = 7
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def laid_out(x, layout):
    """`x` (B, C, H, W) with the same values in another layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "chunked":
        return torch.stack([x, x], dim=1)[:, 0]
    return x


LATENTS = ((1, 1, 1), (4, 8, 8), (3, 5, 7), (4, 40, 40), (4, 64, 64), (3, 80, 81))


@st.composite
def runs(draw, shapes=LATENTS):
    shape = draw(st.sampled_from(shapes))
    return {
        "shape": (draw(st.integers(1, 4)), *shape),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "layout": draw(st.sampled_from(["contiguous", "channels_last", "chunked"])),
        "channels_last": draw(st.booleans()),
        "multistep": draw(st.booleans()),
        "scaled": draw(st.booleans()),
        "earliest": draw(st.sampled_from([2, 3, 4, STEPS])),
        "drop": draw(st.sampled_from([0.0, 0.3])),
        "limited": draw(st.booleans()),
        "fall": draw(st.sampled_from([0.0, 0.0, 0.5])),
        "latest": draw(st.sampled_from([0, 2, 5, STEPS])),
        "wait": draw(st.sampled_from([0, 0, 2, (3, 0)])),
        "calls": draw(st.sampled_from([1, 1, 2])),
        "begins": draw(st.integers(0, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }


def table_of(
    rng, steps=STEPS, calls=1, multistep=True, scaled=True, earliest=2, drop=0.0, limits=None, fall=0, latest=None, wait=0
):
    """Random steps of `calls` calls each, in which samples find their first minimum, or come down to a limit or a share
    of their peak, or `latest`. wait: one for all steps, or one for the steps before `latest` and one for those from it on."""
    table = torch.rand((steps * calls, len(Column)), generator=rng) * 2 - 1
    call = torch.arange(len(table))
    table[:, Column.STEP], table[:, Column.FIRST] = call // calls, (call % calls == 0).float()
    first, k = table[:, Column.FIRST] > 0, table[:, Column.STEP]
    table[:, Column.KEEP] = (1 - drop) * torch.ones(len(table)).where(first & (k >= earliest), torch.inf * torch.tensor(-1.0))
    limits = torch.full((len(table),), -math.inf) if limits is None else limits[call // calls]
    limits = limits.where(k < (steps if latest is None else latest), torch.tensor(math.inf))
    table[:, Column.LIMIT] = limits.where(first, torch.tensor(-math.inf))
    before, after = wait if isinstance(wait, tuple) else (wait, wait)
    table[:, Column.FALL], table[:, Column.WAIT] = fall * first, torch.where(table[:, Column.LIMIT] == math.inf, after, before)
    if not multistep:
        table[:, [Column.P, Column.Q]] = 0
    if not scaled:
        table[:, Column.INPUT_SCALE] = 1
    return table


def begin(run, device="cpu"):
    """(state at its first step on `device`, table, noise, generator) of a run."""
    rng = torch.Generator().manual_seed(run["seed"])
    shape, dtype = run["shape"], run["dtype"]
    usual = 0.5 * math.prod(shape[1:]) ** 0.5  # of the gaps below
    limits = usual * torch.rand(STEPS, generator=rng) if run["limited"] else None
    options = {name: run[name] for name in ("calls", "multistep", "scaled", "earliest", "drop", "fall", "latest", "wait")}
    table = table_of(rng, limits=limits, **options)
    layout = torch.channels_last if run["channels_last"] else torch.contiguous_format
    state = State.empty(shape, STEPS, dtype, device, run["multistep"], run["scaled"], layout)
    noise = torch.randn(shape, generator=rng).to(dtype)
    return state.start(noise.to(device), table.to(device)), table, noise, rng


def finds(table):
    """Whether any row asks for the gap."""
    keep, limit, fall = table[:, Column.KEEP : Column.WAIT].unbind(1)
    return bool(((keep > -math.inf) | (limit.abs() < math.inf) | (fall > 0)).any())


def predictions(run, rng):
    """uncond and cond of one step; the gaps of successive steps go up and down."""
    shape, dtype = run["shape"], run["dtype"]
    sizes = torch.rand((shape[0], 1, 1, 1), generator=rng) + 0.1
    uncond = laid_out(torch.randn(shape, generator=rng).to(dtype), run["layout"])
    return uncond, laid_out((uncond.float() + sizes * torch.randn(shape, generator=rng)).to(dtype), run["layout"])


# A run as `check_run` takes it; tests change what they are about.
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
    "latest": STEPS,
    "wait": 0,
    "calls": 1,
    "begins": 1,
    "seed": 3,
}


def check_run(run, alone=(), device="cpu", take=step):
    """Take a state from the first to the last row and past it, and compare it with its samples after each call.

    alone: calls that need one prediction. take: what takes the step.
    """
    state, table, noise, rng = begin(run, device)
    rows = table.to(device)
    batch, tolerance = run["shape"][0], TOLERANCE[run["dtype"]]
    begins = torch.randint(0, run["begins"] + 1, (batch,), generator=rng)
    lasts = len(table) - 1 - torch.arange(batch) % 2  # each ends where its neighbours do not
    state.start(noise.to(device), rows, begins.to(device), lasts.to(device))
    unknown = (math.nan,) * STEPS
    samples = [definition.Sample(noise[i], unknown, int(begins[i]), int(lasts[i])) for i in range(batch)]
    for call in range(len(table)):
        uncond, cond = predictions(run, rng)
        cond = None if call in alone else cond
        take(uncond.to(device), None if cond is None else cond.to(device), rows, state, finds(table))
        for i, sample in enumerate(samples):
            after = definition.step(sample, uncond[i], None if cond is None else cond[i], table)
            x = state.latents.x[i].cpu()
            torch.testing.assert_close(x.double(), after.latents.double(), atol=tolerance, rtol=tolerance)
            samples[i] = replace(after, latents=x.clone())  # roundings do not add up
            scale = table[min(after.row, after.last), Column.INPUT_SCALE]
            for half in state.latents.model_input.unflatten(0, (2, batch)):
                torch.testing.assert_close(half[i].cpu().float(), x.float() * scale, atol=tolerance, rtol=tolerance)
            if run["multistep"]:
                history = torch.as_tensor(after.history).expand(x.shape).double()
                torch.testing.assert_close(state.latents.history[i].cpu().double(), history, atol=1e-4, rtol=1e-4)
            gaps = torch.tensor(after.gaps)
            torch.testing.assert_close(state.transition.gaps[i].cpu(), gaps, equal_nan=True, rtol=1e-5, atol=1e-6)
        assert state.transition.at.tolist() == [sample.transition for sample in samples]
        assert state.transition.row.tolist() == [sample.row for sample in samples]
        told = torch.stack([table[min(sample.row, sample.last), Column.TIMESTEP] for sample in samples])
        assert torch.equal(state.latents.timestep.cpu(), told.repeat(2))


def contents(state):
    """All that a step leaves for the next."""
    written = (*vars(state.transition).values(), *vars(state.latents).values())
    return [buffer.nan_to_num(-1).clone() for buffer in written if buffer is not None]


def started(shape, steps=STEPS, dtype=torch.float32, multistep=False):
    torch.manual_seed(0)
    table = table_of(torch.Generator().manual_seed(0), steps, multistep=multistep)
    return State.empty(shape, steps, dtype, "cpu", multistep).start(torch.randn(shape).to(dtype), table), table


def assert_defined(uncond, cond, weight, guided, gap):
    """`guided` and `gap` are those of the float64 definition, up to float32 arithmetic and one rounding at the store."""
    u, c = uncond.double(), cond.double()
    w = weight.double() if isinstance(weight, torch.Tensor) else weight
    expected, expected_gap = guide_eager(u, c, w)
    size = w.abs().view(-1, *[1] * (u.ndim - 1)) if isinstance(w, torch.Tensor) else abs(w)
    bound = (
        4 * torch.finfo(torch.float32).eps * (u.abs() + size * (u.abs() + c.abs()))
        + torch.finfo(uncond.dtype).eps * expected.abs()
        + torch.finfo(uncond.dtype).smallest_normal
    )
    assert guided.dtype == uncond.dtype
    assert guided.shape == uncond.shape
    assert ((guided.double() - expected).abs() <= bound).all()
    assert gap.dtype == torch.float32
    torch.testing.assert_close(gap.double(), expected_gap, rtol=1e-5, atol=1e-30)
