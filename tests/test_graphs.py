"""The captured step where nothing can be captured: it warns once and samples all the same, in memory that is used again."""

import logging

import torch
from basinescape import At, FirstMinimum, Guidance, Sampler
from basinescape.graphs import Graphs

CALLS = [
    (["a picture of a cat", "a picture of a frog"], Guidance.delayed(7.5, until=FirstMinimum())),
    (["a picture of a fish", "a picture of a crab"], Guidance.delayed(5.0, until=FirstMinimum())),
    (["a picture of a fish", "a picture of a crab"], Guidance.opposite(2.0, scale=7.5, until=At(500))),
    (["a picture of a cat"], Guidance.cfg(7.5)),
    (["a picture of a cat signed by arno"], Guidance.guard(Guidance.delayed(7.5, until=At(500)), 1.5, 2)),
    (["a picture of a cat"], Guidance.guard(Guidance.opposite(2.0, scale=7.5, until=FirstMinimum()), 1.5, 2)),
]


def test_a_step_that_cannot_be_captured_runs_uncaptured(pipe, caplog):
    plain, captured = Sampler.from_pipeline(pipe, "dpmsolver++"), Sampler.from_pipeline(pipe, "dpmsolver++")
    captured._graphs = Graphs()
    with caplog.at_level(logging.WARNING, "basinescape.graphs"):
        for prompts, guidance in CALLS:
            settings = {"steps": 5, "guidance": guidance, "output": "latent", "progress": False}
            expected, found = plain(prompts, 7, **settings), captured(prompts, 7, **settings)
            assert torch.equal(found.latents, expected.latents)
            assert found.transition_step.tolist() == expected.transition_step.tolist()
    assert [record.message.startswith("the step cannot be captured") for record in caplog.records] == [True]


def test_an_output_outlives_the_next_call(pipe):
    sampler = Sampler.from_pipeline(pipe, "ddim")
    sampler._graphs = Graphs()
    first = sampler(["a picture of a cat"], 1, 3, output="latent", progress=False)
    kept = first.latents.clone()
    sampler(["a picture of a frog"], 2, 3, output="latent", progress=False)
    assert torch.equal(first.latents, kept) and torch.equal(first.images, kept)
    sampler.close()
    assert not sampler._graphs._sessions
