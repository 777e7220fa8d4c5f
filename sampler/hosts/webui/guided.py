"""The guidance in the webuis: around their denoiser, and in the place of what combines the predictions.

To combine them, Forge calls the model's CFG function, as ComfyUI does (`backend/sampling/sampling_function.py`), and
AUTOMATIC1111 `CFGDenoiser.combine_denoised` (`modules/sd_samplers_cfg_denoiser.py`). Neither passes the sampler's noise levels,
so these are read from its `get_sigmas`. A webui skips a script that raises, so the denoiser's first call raises instead.

Read in November 2026: AUTOMATIC1111 of February 2025, Forge of June 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..guidance_widgets import Settings
from ..noise_levels import UNEVEN
from ..sampler_run import SamplerRun
from ..step_of_sigma import StepOfSigma

NAME = "Basin Escape"
COMBINED = "another extension combines the predictions: switch one of the two off"


def guide(p: Any, refused: str | None = None, **sliders: Any) -> None:
    """Guide the next sampling of the job `p` by the sliders. refused: why its first call is to raise ValueError instead."""
    try:
        refused, settings = refused or _unfit(p), Settings(**sliders)
    except ValueError as error:
        refused = refused or str(error)
    if refused:
        p.sampler.model_wrap_cfg.forward = partial(_refuse, refused)
    else:
        Guided(p, settings).install()


def _unfit(p: Any) -> str | None:
    """Return why a job cannot be followed; None if it can."""
    sampler = p.sampler
    if getattr(p.sd_model, "cond_stage_key", None) == "edit" and getattr(p, "image_cfg_scale", None) not in (None, 1.0):
        return "InstructPix2Pix combines three predictions: set its image CFG scale to 1"
    if not hasattr(sampler, "get_sigmas"):
        return "the samplers DDIM, PLMS and UniPC, which go by timesteps, are not followed: use one of the others"
    if getattr(sampler, "funcname", None) in UNEVEN:
        return f"{sampler.funcname} chooses its noise levels by itself: use another sampler"
    if hasattr(p.sd_model, "forge_objects"):
        combines = p.sd_model.forge_objects.unet.model_options.get("sampler_cfg_function")
        if combines is not None and not isinstance(getattr(combines, "__self__", None), Guided):
            return COMBINED
        if getattr(p, "refiner_checkpoint_info", None) is not None:
            return "the refiner is another model, which is not followed in Forge: switch it off"
    else:
        denoiser = sampler.model_wrap_cfg.inner_model
        if not hasattr(denoiser, "get_scalings"):
            return f"{type(denoiser).__name__} is not a denoiser of Stable Diffusion 1, 2 or XL: use Forge"
    return None


def _refuse(reason: str, *given: Any, **named: Any) -> None:
    raise ValueError(f"{NAME}: {reason}")


class Guided:
    """The guidance of one sampling of a webui's job `p`: of all its pictures, each with a transition of its own.

    settings: of the sliders. The CFG scale is the webui's.

    `install` changes the job's sampler and model. The webui makes these anew, or restores them, for the next sampling.
    """

    def __init__(self, p: Any, settings: Settings):
        self.p, self.settings = p, settings
        self.run: SamplerRun | None = None
        self._sigmas: list[float] = []
        self._now: tuple[Tensor, Tensor] | None = None  # the latents and noise levels of the current call
        self._weight = 1.0  # the sum of the weights of a prompt's parts, in Forge

    def __deepcopy__(self, memo: dict) -> Guided:
        """Return itself: Forge copies a model's options deeply to clone the model."""
        return self

    def install(self) -> None:
        """Guide the sampling that is about to begin."""
        sampler = self.p.sampler
        denoiser = sampler.model_wrap_cfg
        denoiser.forward = partial(self._called, denoiser.forward)
        sampler.get_sigmas = partial(self._scheduled, sampler.get_sigmas)
        if self.forge:
            unet = self.p.sd_model.forge_objects.unet.clone()
            unet.set_model_sampler_cfg_function(self.in_forge, disable_cfg1_optimization=True)
            unet.set_model_sampler_pre_cfg_function(self._weighted)
            self.p.sd_model.forge_objects.unet = unet
        else:
            denoiser.combine_denoised = partial(self.in_a1111, denoiser)
        self.p.extra_generation_params.update({f"{NAME} {name}": value for name, value in vars(self.settings).items()})
        self._shown_steps = self.p.extra_generation_params.setdefault(self._key, [None] * (self.p.n_iter * self.p.batch_size))

    @property
    def forge(self) -> bool:
        """Whether the webui is Forge."""
        return hasattr(self.p.sd_model, "forge_objects")

    @property
    def _key(self) -> str:
        again = " hires" if getattr(self.p, "is_hr_pass", False) else ""
        return f"{NAME}{again} full guidance from step"

    def _called(self, forward: Callable[..., Tensor], x: Tensor, sigma: Tensor, *given: Any, **named: Any) -> Tensor:
        """Note what the denoiser is given, and call it. Raises ValueError for what cannot be followed."""
        if float(named.get("s_min_uncond") or 0) > 0:
            raise ValueError(f"{NAME}: negative guidance minimum sigma leaves predictions out: set it to 0")
        if named.get("uncond", True) is None:
            raise ValueError(f"{NAME}: guidance needs a negative prompt, which may be empty, and a CFG scale other than 1")
        if self.forge:
            function = self.p.sd_model.forge_objects.unet.model_options.get("sampler_cfg_function")
            if getattr(function, "__self__", None) is not self:
                raise ValueError(f"{NAME}: {COMBINED}")
        self._now = x, sigma
        return forward(x, sigma, *given, **named)

    def _scheduled(self, get_sigmas: Callable[[Any, int], Tensor], p: Any, steps: int) -> Tensor:
        """Note the noise levels that the sampler's `get_sigmas` returns."""
        sigmas = get_sigmas(p, steps)
        self._sigmas, self.run = sigmas.tolist(), None
        return sigmas

    def _weighted(self, model: Any, cond: Any, uncond: Any, x: Tensor, sigma: Tensor, options: dict) -> tuple:
        """Note the weights of a prompt's parts, before Forge's predictions: their sum multiplies the CFG scale."""
        self._weight = sum(part.get("strength", 1.0) for part in cond)
        return model, cond, uncond, x, sigma, options

    def in_forge(self, args: dict[str, Any]) -> Tensor:
        """Forge's `sampler_cfg_function`: x - denoised, (B, ...)."""
        uncond, cond = args["uncond_denoised"], args["cond_denoised"]
        scale = float(args["cond_scale"]) * self._weight
        return args["input"] - self._guided(args["input"], args["sigma"], uncond, cond, scale, args["model"].predictor)

    def in_a1111(self, denoiser: Any, x_out: Tensor, conds_list: Sequence, uncond: Any, cond_scale: float) -> Tensor:
        """AUTOMATIC1111's `combine_denoised`: the guided prediction, (B, ...).

        x_out: the denoised predictions, those of the B negative prompts last. conds_list: for each picture, (row, weight) of
        each part of its prompt; its parts together make one conditional prediction.
        """
        if self._now is None:
            raise ValueError(f"{NAME}: predictions are combined outside the denoiser's call")
        x, sigma = self._now
        without = x_out[-len(x) :]
        parts = [
            sum(weight * (x_out[row] - one) for row, weight in rows) for rows, one in zip(conds_list, without, strict=True)
        ]
        cond = without + torch.stack(parts)
        return self._guided(x, sigma, without, cond, float(cond_scale), denoiser.inner_model)

    def _guided(self, x: Tensor, sigma: Tensor, uncond: Tensor, cond: Tensor, scale: float, model: Any) -> Tensor:
        """Return the guided prediction of a call at noise level sigma (B,), and note the pictures' transition steps."""
        if self.run is None:
            self.run = SamplerRun(self.settings, StepOfSigma(self._from(float(sigma.max()))), model, x, scale)
        self.run.begin_call(sigma)
        made = self.run.guided(x, sigma, uncond, cond, scale).to(uncond.dtype)
        first = getattr(self.p, "iteration", 0) * self.p.batch_size
        self._shown_steps[first : first + len(x)] = [
            "none" if step < 0 else step for step in self.run.state.transition_step.tolist()
        ]
        return made

    def _from(self, sigma: float) -> list[float]:
        """Return the noise levels of a run that begins at `sigma`: image to image takes the later ones of a schedule."""
        levels = [level for level in self._sigmas if level > 0 and level <= sigma * (1 + 1e-4)]
        return levels or [sigma]
