"""The node that judges: do finished latents look like copies, and what became of each sample's guidance?"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from basinescape.guidance.guard import PROBES, THRESHOLD
from basinescape.hosts.guidance_widgets import Widget
from basinescape.hosts.noise_levels import denoiser_probe, is_flow
from basinescape.hosts.own_loop import judge
from torch import Tensor

from .described import Node, Output
from .guided import CFG_FUNCTION, Guided
from .node import ID, OUTER_SAMPLE

CALC = "sampler_calc_cond_batch_function"
WIDGETS = {
    "seed": Widget(
        "Int", {"default": 0, "min": 0, "max": 2**63 - 1}, "Of the noises that the pictures are judged by: the sampler's."
    ),
    "threshold": Widget(
        "Float",
        {"default": THRESHOLD, "min": -10.0, "max": 10.0, "step": 0.01},
        "The basin score above which a picture is suspect: about 0.1 is ordinary, copies have 0.5 and more.",
    ),
    "probes": Widget(
        "Int", {"default": PROBES, "min": 1, "max": 64}, "Noises a picture; each is a call of the model for both prompts."
    ),
}
OUTPUTS = (
    Output("latent", "Latent"),
    Output("score", "Float", listed=True),
    Output("suspect", "Boolean", listed=True),
    Output("transition step", "Int", listed=True),
    Output("noise gaps", "String", listed=True),
)


def judged(model: Any, latent: dict, positive: Any, negative: Any, seed: int, threshold: float, probes: int) -> tuple:
    """Return (latent, scores, suspects, transition steps, noise gaps), lists of one a sample.

    model: the sampler's. Where no Basin Escape node has guided its last run, transition steps are -1 and gaps "".
    latent: finished, {"samples": (B, ...)}. positive, negative: the sampler's conditionings.

    Raises ValueError for widgets out of range, and for latents in which the model's last run left noise.
    """
    from comfy.samplers import KSAMPLER, CFGGuider  # ComfyUI's

    found: list = []

    def sample(denoiser: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, *given: Any, **named: Any) -> Tensor:
        """What ComfyUI calls as a sampler. x: the latents as the model takes them, scaled as at the noise level sigmas[0]."""

        def predict(noised: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
            denoiser(noised.to(x.dtype), time.to(x), **(extra_args or {}))
            return seen["uncond"], seen["cond"]

        found.append(judge(predict, probe, x.float() / probe.given[0], seed, threshold, probes))
        return x

    def combine(args: dict[str, Any]) -> Tensor:
        """ComfyUI's `sampler_cfg_function`: keep both predictions. What it returns is not used."""
        seen.update(uncond=args["uncond_denoised"], cond=args["cond_denoised"])
        return args["cond"]

    seen: dict[str, Tensor] = {}
    asked, samples = model.clone(), latent["samples"]
    left = getattr(model.model_options.get(CFG_FUNCTION), "unfinished", None)
    if left is not None and left.shape == samples.shape and torch.equal(left.to(samples), samples):
        raise ValueError(
            "latent is from a sampler that left noise in it (end_at_step, return_with_leftover_noise, or split sigmas): judge "
            "that of the sampler that takes the last steps"
        )
    asked.remove_wrappers_with_key(OUTER_SAMPLE, ID)
    for name in (CALC, CFG_FUNCTION, "sampler_pre_cfg_function", "sampler_post_cfg_function"):
        asked.model_options.pop(name, None)
    asked.set_model_sampler_cfg_function(combine, disable_cfg1_optimization=True)
    sampling = model.get_model_object("model_sampling")  # that of a ModelSampling node, where there is one
    probe = denoiser_probe(sampling, is_flow(sampling))
    guider = CFGGuider(asked)
    guider.set_conds(positive, negative)
    guider.set_cfg(1.0)
    guider.sample(torch.zeros_like(samples), samples, KSAMPLER(sample), torch.tensor([probe.timestep, 0.0]), seed=seed)
    (verdict,) = found
    steps, gaps = became(model, len(samples))
    return latent, verdict.score.tolist(), verdict.suspect.tolist(), steps, gaps


def became(model: Any, batch: int) -> tuple[list[int], list[str]]:
    """Return each sample's transition step in the model's last run, and its noise gaps as JSON, null if not computed."""
    guided = model.model_options.get(CFG_FUNCTION)
    run = guided.run if isinstance(guided, Guided) else None
    if run is None or run.state.batch != batch:
        return [-1] * batch, [""] * batch
    gaps = [[None if math.isnan(gap) else gap for gap in row] for row in run.state.noise_gap.tolist()]
    return run.state.transition_step.tolist(), [json.dumps(row) for row in gaps]


NODE = Node(
    "BasinEscapeJudge",
    "Basin Escape: does it look like a copy?",
    "Judges finished latents by their basin scores: whether they look like copies of training images. Connect the sampler's "
    "model, conditionings and latent. Also tells from which step on each sample had full guidance, and its noise gaps.",
    {"model": "Model", "latent": "Latent", "positive": "Conditioning", "negative": "Conditioning"},
    WIDGETS,
    OUTPUTS,
    judged,
)
