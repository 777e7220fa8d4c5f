"""Callbacks of a sampler's call: what they find in the pipeline, what they may change, and what is refused."""

import pytest
import torch
from basinescape import Guidance, Sampler
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, SDCFGCutoffCallback

STEPS = 4


def sample(pipe, callback, scheduler="ddim", steps=STEPS):
    sampler = Sampler.from_pipeline(pipe, scheduler)
    told = {"callback_on_step_end": callback, "output": "latent", "progress": False}
    return sampler(["a cat"], [3], steps, Guidance.cfg(5.0), **told)


@pytest.mark.parametrize(("scheduler", "calls"), [("ddim", STEPS), ("heun", 2 * STEPS - 1), ("unipc", STEPS)])
def test_it_finds_what_the_stock_pipeline_has(small, scheduler, calls):
    seen, before = [], {name: value for name, value in vars(small).items() if name.startswith("_")}

    def look(pipe, index, timestep, tensors):
        seen.append((index, pipe.num_timesteps, pipe.guidance_scale, pipe.interrupt))
        return tensors

    sample(small, look, scheduler)
    assert seen == [(k, calls, 5.0, False) for k in range(calls)]
    assert {name: value for name, value in vars(small).items() if name.startswith("_")} == before


def test_an_adapters_scale_is_cut_where_it_says(small, monkeypatch):
    cut = []
    monkeypatch.setattr(type(small), "set_ip_adapter_scale", lambda pipe, scale: cut.append((len(calls), scale)))
    calls = []

    def counted(pipe, index, timestep, tensors):
        calls.append(index)
        return IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5)(pipe, index, timestep, tensors)

    sample(small, counted)
    assert cut == [(STEPS // 2 + 1, 0.0)]


@pytest.mark.parametrize("scheduler", ["ddim", "unipc"])
def test_an_interrupted_run_ends_there(small, scheduler):
    kept = []

    def stop(pipe, index, timestep, tensors):
        kept.append(tensors["latents"])
        pipe._interrupt = index == 1

    out = sample(small, stop, scheduler)
    assert len(kept) == 2 and torch.equal(out.latents, kept[-1])


def returns_text(pipe, index, timestep, tensors):
    return {**tensors, "prompt_embeds": torch.zeros(1)}


def sets_scale(pipe, index, timestep, tensors):
    pipe._guidance_scale = 1.0
    return tensors


@pytest.mark.parametrize(
    ("callback", "says", "calls"),
    [
        (SDCFGCutoffCallback(cutoff_step_ratio=0.5), "SDCFGCutoffCallback asks for prompt_embeds", 0),
        (MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=0.5)]), "asks for prompt_embeds", 0),
        (returns_text, "returned prompt_embeds, which the sampler cannot follow", 1),
        (
            lambda pipe, index, timestep, tensors: {"latents": tensors["latents"][:, :1]},
            r"latents of the shape .* got \(1, 1, ",
            1,
        ),
        (lambda *told: {"latents": None}, "latents of the shape .* got a NoneType", 1),
        (lambda *told: told[3]["latents"], "must return a dict or None, got a Tensor", 1),
        (sets_scale, "set the guidance scale to 1.0, which the sampler cannot follow", 1),
    ],
)
def test_what_cannot_be_followed_is_refused(small, callback, says, calls):
    """diffusers' own cut-offs before any work, others in the step in which they show."""
    seen = []
    handle = small.unet.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        with pytest.raises(ValueError, match=says):
            sample(small, callback)
    finally:
        handle.remove()
    assert len(seen) == calls
