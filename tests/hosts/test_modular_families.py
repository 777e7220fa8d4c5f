"""`BasinEscapeGuidance` in modular Flux.2 Klein, Qwen-Image and Wan: against the definition, diffusers' guider and pipeline."""

import math

import pytest
import torch
from basinescape import At, FirstMinimum, Guidance, escape
from basinescape.hosts.modular import BasinEscapeGuidance
from basinescape.kernels import definition
from basinescape.kernels.rules import columns_of
from components import PIPELINES, build, call, prompts
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein_base import Flux2KleinBaseCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from rounding import close

STEPS, SCALE = 6, 4.0
BLOCKS = {
    "Flux2KleinPipeline": Flux2KleinBaseCoreDenoiseStep,
    "QwenImagePipeline": QwenImageCoreDenoiseStep,
    "WanPipeline": WanCoreDenoiseStep,
}
GUIDANCE = [
    Guidance.delayed(SCALE, until=At(timestep=900)),
    Guidance.opposite(1.5, scale=3.0, until=At(timestep=900)),
    Guidance.delayed(SCALE, until=FirstMinimum(latest=4), before=1.5),
    Guidance.cfg(SCALE, rule="apg"),
]


class Noted(BasinEscapeGuidance):
    """Keeps what it was given, and what it made of that."""

    def forward(self, pred_cond=None, pred_uncond=None):
        made = super().forward(pred_cond, pred_uncond)
        self.__dict__.setdefault("noted", []).append((pred_uncond, pred_cond, made.pred))
        return made


@pytest.fixture(scope="module", params=BLOCKS)
def denoised(request):
    """A function that runs the denoising part of a modular pipeline under a guider: (guider) -> latents as its network has."""
    name = request.param
    stock, pipe = build(name), BLOCKS[name]().init_pipeline()
    pipe.update_components(transformer=stock.transformer, scheduler=stock.scheduler)
    pipe.set_progress_bar_config(disable=True)

    def run(guider, rows=slice(None)):
        pipe.update_components(guider=guider)
        given = {part: value[rows] for part, value in prompts(name).items()}
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)][rows]
        if name == "WanPipeline":  # which does not ask the network for its channels
            given["latents"] = torch.cat([torch.randn((1, 4, 2, 4, 4), generator=rng) for rng in generators])
        made = pipe(**given, **PIPELINES[name].call, generator=generators, num_inference_steps=STEPS, output="latents")
        if name == "QwenImagePipeline":
            return stock._pack_latents(made[:, :, 0], len(made), *made.shape[1:2], *made.shape[3:])
        return made.flatten(2).transpose(1, 2) if name == "Flux2KleinPipeline" else made

    run.pipe, run.stock, run.name = pipe, stock, name
    return run


def test_constant_guidance_is_diffusers_own_guiders(denoised):
    found = denoised(BasinEscapeGuidance(Guidance.cfg(SCALE)))
    assert torch.equal(found, denoised(ClassifierFreeGuidance(guidance_scale=SCALE)))


@pytest.mark.parametrize("guidance", GUIDANCE, ids=repr)
def test_each_step_is_what_the_definition_says(denoised, guidance):
    guider = Noted(guidance)
    denoised(guider)
    levels = guider.run.timesteps
    criteria = [None] * STEPS if guidance.until is None else guidance.until.criteria(levels)
    for i in range(2):
        gaps, left = [], -1
        for k, (uncond, cond, made) in enumerate(guider.noted):
            both = uncond is not None and cond is not None
            gap = definition.noise_gap(uncond[i], cond[i]) if both else math.nan
            if left < 0 and (guidance.until is None or definition.leaves(gap, gaps, *criteria[k][:3])):
                left = k
            gaps.append(gap)
            weight = guidance.weights(levels)[k][0 <= left <= k]
            if both:
                options = columns_of(dict(guidance.options))
                expected = definition.guided(uncond[i], cond[i], weight, guidance.rule, options)
            else:
                assert weight == (0 if cond is None else 1)
                expected = (uncond if cond is None else cond)[i].double()
            assert close(made[i].double(), expected)
        assert guider.run.transition_step[i] == left and len(gaps) == STEPS
        found = guider.run.noise_gap[i]
        assert torch.allclose(found.nan_to_num(), torch.tensor(gaps).nan_to_num(), rtol=1e-4)


@pytest.mark.parametrize("guidance", GUIDANCE, ids=repr)
def test_it_agrees_with_the_stock_pipeline(denoised, guidance):
    guider = BasinEscapeGuidance(guidance)
    latents = denoised(guider)
    with escape(denoised.stock, guidance) as run:
        call(denoised.name, denoised.stock, steps=STEPS)
    found, stock = guider.judge(latents, denoised.pipe.scheduler, [0, 1]), run.judge()
    if denoised.name != "WanPipeline":  # whose stock pipeline alone tells its network whole timesteps
        assert torch.equal(guider.run.transition_step, run.transition_step)
        known = guider.run.noise_gap.isfinite()
        assert torch.allclose(guider.run.noise_gap[known], run.noise_gap[known], rtol=1e-3)
    assert found.score.isfinite().all()
    assert torch.allclose(found.score, stock.score, rtol=1e-2, atol=4e-3 if denoised.name == "WanPipeline" else 1e-5)


def test_samples_of_a_batch_go_their_own_ways_and_runs_begin_anew(denoised):
    guidance = GUIDANCE[:2]
    together = BasinEscapeGuidance(guidance)
    found = denoised(together)
    for i, one in enumerate(guidance):
        alone = BasinEscapeGuidance(one)
        assert close(denoised(alone, slice(i, i + 1))[0], found[i], 1e-3 * float(found[i].abs().max()))
    assert torch.equal(denoised(together), found)
