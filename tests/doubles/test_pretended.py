"""The pretended device keeps what a CUDA device keeps: where tensors are, what waits for the host, what a capture records."""

import copy

import pytest
import torch


def ramp(device="cuda"):
    return torch.arange(6.0, device=device).view(2, 3)


def test_operators_give_the_cpus_values_on_the_device(device):
    x = ramp()
    y = torch.nn.functional.linear(x, x[:1]).sigmoid()
    assert y.device == torch.device("cuda:0") and y.is_cuda
    assert torch.equal(y.cpu(), torch.nn.functional.linear(ramp("cpu"), ramp("cpu")[:1]).sigmoid())
    view = x[:, 1:]
    view.mul_(2)
    assert x.tolist() == [[0, 2, 4], [3, 8, 10]] and view.stride() == (3, 1) and view.storage_offset() == 1


def test_operands_on_two_devices_are_refused_but_for_copies_and_numbers(device):
    x = ramp()
    with pytest.raises(RuntimeError, match="same device"):
        x + ramp("cpu")
    assert (x + torch.tensor(1.0)).tolist() == (ramp("cpu") + 1).tolist()
    x.copy_(torch.ones(2, 3))
    assert x.tolist() == [[1, 1, 1]] * 2 and torch.ones(2, 3).to("cuda").is_cuda


@pytest.mark.parametrize(
    ("read", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 2], 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x.copy_(torch.ones(2, 3)), 1),
        (lambda x: torch.where(x > 2, x, 0.0) @ x.T, 0),
        (lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int64, device="cuda")), 0),
    ],
)
def test_what_makes_the_host_wait_is_counted_or_an_error(device, read, waits):
    x = ramp()
    before = device.waits
    read(x)
    assert device.waits == before + waits
    torch.cuda.set_sync_debug_mode("error")
    if waits:
        with pytest.raises(RuntimeError, match="makes the host wait"):
            read(x)
    else:
        read(x)
    torch.cuda.set_sync_debug_mode(0)
    read(x)


def test_a_captured_graph_computes_when_it_is_replayed_and_not_before(device):
    given, total = ramp(), torch.zeros(2, 3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = given * 2
        total.add_(made)
    assert made.isnan().all().item() and total.tolist() == [[0, 0, 0]] * 2  # nothing is computed, nothing written
    for times in (1, 2):
        graph.replay()
        assert made.tolist() == (2 * ramp("cpu")).tolist() and total.tolist() == (2 * times * ramp("cpu")).tolist()
    given.fill_(1)
    graph.replay()
    assert made.tolist() == [[2, 2, 2]] * 2 and total.tolist() == (4 * ramp("cpu") + 2).tolist()


def test_a_replay_runs_no_python(device):
    calls, x = [], ramp()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls.append(None)
        y = x + len(calls)
    graph.replay()
    graph.replay()
    assert len(calls) == 1 and y.tolist() == (ramp("cpu") + 1).tolist()


def test_a_capture_refuses_to_wait(device):
    x = ramp()
    with pytest.raises(RuntimeError, match="makes the host wait"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    assert not torch.cuda.is_current_stream_capturing()


def test_modules_move_and_are_copied(device):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    expected = module(ramp("cpu")).tolist()
    moved = copy.deepcopy(module).to("cuda")
    again = copy.deepcopy(moved)
    again.weight.data.zero_()
    with torch.no_grad():
        assert moved.weight.is_cuda and moved(ramp()).tolist() == expected != again(ramp()).tolist()


def test_it_is_gone_afterwards(guarded):
    from pretended import pretended

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pretended():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available() and (torch.ones(2) + 1).tolist() == [2, 2]
