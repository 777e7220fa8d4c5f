"""Runs of a small network under the node, on the stand-in of ComfyUI."""

import comfy
import torch
from basinescape.hosts.comfyui import node
from basinescape.hosts.guidance_widgets import WIDGETS

STEPS, BATCH, CFG = 8, 2, 4.0
SIGMAS = torch.cat([torch.linspace(10.0**0.2, 0.1**0.2, STEPS) ** 5, torch.zeros(1)])
DEFAULTS = {name: widget.options["default"] for name, widget in WIDGETS.items()}


def network(x, t, cond):
    return 0.3 * x + 0.1 * torch.sin(x + cond) + 0.3 * torch.cos(t / 100)[:, None] * cond


def given(shape=(BATCH, 12)):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng) for _ in range(3)]


def sampled(kd, name, patcher, sigmas=SIGMAS, cfg=CFG, rows=slice(None), **options):
    x, uncond, cond = (value[rows] for value in given())
    torch.manual_seed(0)
    guider = comfy.CFGGuider(patcher, cfg, positive=cond, negative=uncond)
    return guider.sample(getattr(kd[0], f"sample_{name}"), sigmas[0] * x, sigmas, **options)


def visits(order):
    """A sampler that calls the model at these places of the schedule: 2.5 is between its third sigma and its fourth."""

    def sampler(model, x, sigmas, extra_args, disable=None, called=lambda: None):
        for place in order:
            k = int(place)
            sigma = sigmas[k] if place == k else sigmas[k] + (place - k) * (sigmas[k + 1] - sigmas[k])
            x = x + 0.1 * (model(x, sigma * x.new_ones(len(x)), **extra_args) - x)
            called()
        return x

    return sampler


def function_of(patcher):
    return patcher.model_options["sampler_cfg_function"]


def state_of(patcher):
    return function_of(patcher).run.state


def weights_of(patcher, order, sigmas=SIGMAS, **options):
    """(calls, B): the weight of each call of a sampler that visits these places."""
    x, uncond, cond = given()
    found = []
    guider = comfy.CFGGuider(patcher, CFG, positive=cond, negative=uncond)
    guider.sample(visits(order), sigmas[0] * x, sigmas, called=lambda: found.append(state_of(patcher).weight), **options)
    return torch.stack(found)


def patched(sampling=comfy.EPS, **widgets):
    return node.patched(comfy.Patcher(network, sampling()), **DEFAULTS | widgets)
