"""The captured step: on a pretended device, and where nothing can be captured."""

import copy
import logging
from unittest.mock import patch

import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, Sampler
from basinescape.models import adapt
from basinescape.sampling.cuda_graphs import Graphs, Session
from mean_fallen import MeanFallen
from rounding import assert_same_but_for_rounding
from smallguards import guarded

STEPS = 5
CALLS = [
    (["a picture of a cat", "a picture of a frog"], Guidance.delayed(7.5, until=FirstMinimum())),
    (["a picture of a fish", "a picture of a crab"], Guidance.delayed(5.0, until=FirstMinimum())),
    (["a picture of a fish", "a picture of a crab"], Guidance.opposite(2.0, scale=7.5, until=At(500))),
    (["a picture of a cat"], Guidance.cfg(7.5)),
    (["a picture of a cat signed by arno"], Guidance.delayed(7.5, until=At(500), restart=(300, 500, 1))),
    (["a picture of a cat"], guarded(Guidance.opposite(2.0, scale=7.5, until=FirstMinimum()))),
    (["a picture of a fish", "a picture of a frog"], Guidance.opposite(2.0, scale=5.0, until=At(850))),
    (["a picture of a fish", "a picture of a frog"], Guidance.delayed(5.0, until=FirstMinimum(latest=2))),
    (["a picture of a fish", "a picture of a frog"], Guidance.delayed(7.5, until=FirstMinimum(latest=2))),
]


@pytest.fixture(scope="module")
def pipe(small):
    return small


def call(sampler, prompts, guidance, seeds=7, steps=STEPS):
    """Interpreted on the pretended device, eager on the CPU."""
    with patch("basinescape.kernels.dispatch.INTERPRETED", sampler.model.device.type == "cuda"):
        return sampler(prompts, seeds, steps, guidance, output="latent", progress=False)


def assert_same(found, plain, prompts, guidance, steps=STEPS):
    """found: what a sampler gave where `plain`, on the CPU, gives what is right."""

    def sample():
        out = call(plain, prompts, guidance, steps=steps)
        return out.latents, out.noise_gap

    assert_same_but_for_rounding((found.latents.cpu(), found.noise_gap), sample(), plain.pipe, sample)


def on_device(pipe):
    return copy.deepcopy(pipe).to("cuda")


def test_what_runs_on_two_devices_or_waits_in_a_capture_is_refused(device):
    """The pretended device itself: its refusals, and a graph that is values in, values out."""
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        y = x * 2
        with pytest.raises(RuntimeError, match="makes the host wait"):
            y.sum().item()
    assert x.tolist() == [1, 1, 1] and y.isnan().all()
    for expected in (4, 6):
        graph.replay()
        assert y.tolist() == [expected] * 3
    with pytest.raises(RuntimeError, match="makes the host wait"):
        torch.cuda.set_sync_debug_mode("error")
        x[0].item()


def said_by_graphs(caplog):
    """The warnings of capturing, among those of what is captured."""
    return [
        record.message
        for record in caplog.records
        if record.name.endswith(".cuda_graphs") and record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize(("scheduler", "compile"), [("dpmsolver++", False), ("euler", True)])
def test_a_captured_step_is_the_step(pipe, device, scheduler, compile, monkeypatch, caplog):
    """Other prompts, seeds, weights and methods come by data: nothing that a capture saw stays in its graph."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)  # no compiler for a device that is not there
    plain = Sampler.from_pipeline(pipe, scheduler)
    captured = Sampler.from_pipeline(on_device(pipe), scheduler, capture=True, compile=compile)
    for i, (prompts, guidance) in enumerate(CALLS[2:4] if compile else CALLS[1:6]):
        steps = STEPS - i % 2
        expected, found = call(plain, prompts, guidance, steps=steps), call(captured, prompts, guidance, steps=steps)
        assert found.latents.device.type == "cuda"
        assert_same(found, plain, prompts, guidance, steps)
        assert found.transition_step.tolist() == expected.transition_step.tolist()
    sessions = captured.graphs._sessions.values()
    assert not said_by_graphs(caplog) and all(session.graphs for session in sessions)
    # One of a shape and branch, whatever the guidance and the number of steps: batches of 2 and 1, and no branch "cond" here.
    assert len(sessions) == 2 and all(set(session.graphs) <= {"both", "uncond"} for session in sessions)
    captured.close()
    assert not captured.graphs._sessions


def test_a_step_is_captured_on_the_device_of_the_pipeline(pipe, device):
    """Torch records work on its current device alone."""
    prompts, guidance = CALLS[0]
    plain, captured = Sampler.from_pipeline(pipe), Sampler.from_pipeline(on_device(pipe), capture=True)
    with torch.cuda.device(1):
        assert_same(call(captured, prompts, guidance), plain, prompts, guidance)
    assert captured.graphs.failure is None


OWN = Guidance.delayed(7.5, until=MeanFallen(0.98), before=1.5)  # a rule with a statistic of its own is not captured


@pytest.mark.parametrize(("guidance", "capture"), [(CALLS[0][1], True), (CALLS[2][1], False), (OWN, True)], ids=repr)
def test_a_call_waits_as_often_however_many_steps_it_takes(pipe, device, guidance, capture):
    sampler = Sampler.from_pipeline(on_device(pipe), "dpmsolver++", capture=capture)
    waits = {}
    for steps in (4, 9):
        call(sampler, ["a picture of a cat"], guidance, steps=steps)
        before = device.waits
        call(sampler, ["a picture of a frog"], guidance, steps=steps)
        waits[steps] = device.waits - before
    assert waits[4] == waits[9]


def test_sdxl_is_captured(random_pipeline, device):
    pipe = random_pipeline("sdxl", 8, "epsilon")
    guidance = Guidance.opposite(2.0, scale=5.0, until=FirstMinimum())
    plain, captured = Sampler.from_pipeline(pipe), Sampler.from_pipeline(on_device(pipe), capture=True)
    for prompts in (["a picture of a cat", "a frog"], ["a picture of a fish", "a crab"]):
        assert_same(call(captured, prompts, guidance), plain, prompts, guidance)
    assert captured.graphs.failure is None


def test_a_network_that_reads_runs_uncaptured(pipe, device, caplog):
    plain, reading = Sampler.from_pipeline(pipe, "dpmsolver++"), on_device(pipe)
    reading.unet.conv_out.register_forward_hook(lambda module, given, result: result * float(result.isfinite().all()))
    sampler = Sampler.from_pipeline(reading, "dpmsolver++", capture=True)
    for prompts, guidance in CALLS[:2]:
        assert_same(call(sampler, prompts, guidance), plain, prompts, guidance)
    (said,) = said_by_graphs(caplog)
    assert "cannot be captured" in said and "makes the host wait" in said


@pytest.mark.slow
def test_a_step_that_cannot_be_captured_runs_uncaptured(pipe, caplog):
    plain, captured = Sampler.from_pipeline(pipe, "dpmsolver++"), Sampler.from_pipeline(pipe, "dpmsolver++")
    plain.model = captured.model = adapt(pipe, lean=True)
    captured.graphs = Graphs()
    for prompts, guidance in CALLS:
        expected, found = call(plain, prompts, guidance), call(captured, prompts, guidance)
        assert torch.equal(found.latents, expected.latents)
        assert found.transition_step.tolist() == expected.transition_step.tolist()
    assert [said.startswith("the step cannot be captured") for said in said_by_graphs(caplog)] == [True]


def test_an_output_outlives_the_next_call(pipe):
    sampler = Sampler.from_pipeline(pipe, "ddim")
    sampler.model, sampler.graphs = adapt(pipe, lean=True), Graphs()
    first = call(sampler, ["a picture of a cat"], Guidance.cfg(7.5), 1)
    kept = first.latents.clone()
    call(sampler, ["a picture of a frog"], Guidance.cfg(7.5), 2)
    assert torch.equal(first.latents, kept) and torch.equal(first.images, kept)
    sampler.close()
    assert not sampler.graphs._sessions


def test_a_batch_without_memory_for_a_capture_keeps_no_other_from_it(pipe, device, monkeypatch):
    sampler, capture = Sampler.from_pipeline(on_device(pipe), capture=True), Session.capture

    def full(session, *arguments):
        raise torch.OutOfMemoryError("the GPU is full")

    monkeypatch.setattr(Session, "capture", full)
    prompts, guidance = CALLS[0]
    plain = Sampler.from_pipeline(pipe)
    assert_same(call(sampler, prompts, guidance), plain, prompts, guidance)
    assert isinstance(sampler.graphs.failure, torch.OutOfMemoryError) and not sampler.graphs._sessions
    monkeypatch.setattr(Session, "capture", capture)
    call(sampler, *CALLS[3])
    assert sampler.graphs.failure is None and len(sampler.graphs._sessions) == 1


def test_only_the_shapes_used_last_stay_captured(pipe, device, monkeypatch):
    monkeypatch.setattr("basinescape.sampling.cuda_graphs.SESSIONS", 1)
    sampler = Sampler.from_pipeline(on_device(pipe), capture=True)
    for prompts, guidance in (CALLS[0], CALLS[3]):
        call(sampler, prompts, guidance, steps=2)
        assert [key[0][0] for key in sampler.graphs._sessions] == [len(prompts)]


def test_a_captured_sampler_refuses_a_call_inside_its_own(pipe, device):
    sampler = Sampler.from_pipeline(on_device(pipe), capture=True)

    def callback(*arguments):
        return {"latents": sampler("a picture of a cat", 1, 2, output="latent", progress=False).latents}

    with patch("basinescape.kernels.dispatch.INTERPRETED", True), pytest.raises(ValueError, match="during another call"):
        sampler("a picture of a cat", 1, 2, output="latent", progress=False, callback_on_step_end=callback)
    call(sampler, *CALLS[3], steps=2)
