"""What PyTorch knows of the kernels: well-formed operators, which survive compilation."""

import pytest
import torch
from basinescape.kernels import guide
from basinescape.kernels.state import buffers_of
from kernelruns import started

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("finds", [True, False])
def test_the_step_is_a_well_formed_operator(finds):
    state, table = started((2, 4, 8, 8), multistep=True)
    operands = (*torch.randn(2, 2, 4, 8, 8), table, finds, None, *buffers_of(state))
    torch.library.opcheck(torch.ops.basinescape.step.default, operands)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, -2.0])])
def test_guide_is_a_well_formed_operator(weights):
    uncond, cond = torch.randn(2, 2, 4, 8, 8)
    torch.library.opcheck(
        torch.ops.basinescape.guide.default, (uncond, cond, weights, 1.5, torch.empty_like(uncond), torch.empty(2))
    )


@pytest.mark.parametrize("name", ["guide", "step"])
@pytest.mark.parametrize("device", ["CPU", "CUDA", "MPS", "XPU"])
def test_operators_run_on_every_device(name, device):
    """As `backend` says: in PyTorch operators where there is no kernel."""
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"basinescape::{name}", device)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_guide_survives_compilation_whole(dynamic, memory_format):
    def scaled(uncond, cond):
        guided, gap = guide(uncond * 2, cond * 2, 7.5)
        return guided + 1, gap

    uncond, cond = (x.to(memory_format=memory_format) for x in torch.randn(2, 2, 4, 8, 8))
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for found, expected in zip(compiled(uncond, cond), scaled(uncond, cond), strict=True):
        torch.testing.assert_close(found, expected)
