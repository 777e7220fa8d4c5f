"""The guidance as ComfyUI calls it: around a run, to make the predictions of a call, and to combine them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from basinescape.hosts.guidance_widgets import Settings
from basinescape.hosts.sampler_run import SamplerRun
from basinescape.hosts.step_of_sigma import StepOfSigma, evaluates_twice
from torch import Tensor

logger = logging.getLogger(__name__)
CFG_FUNCTION = "sampler_cfg_function"  # the model option
WATCHERS = ("sampler_pre_cfg_function", "sampler_post_cfg_function")  # functions of other nodes that get both predictions
PLAIN = {"positive", "negative"}  # the conditionings of a guider that leaves combining them to the CFG function


class Guided:
    """Delayed or opposite guidance of a model in ComfyUI: what the sampler is given as `cfg` is the scale after the transition.

    ComfyUI calls `sampled` around a run, `predicted` to make both predictions, and itself as the CFG function. `run` is the
    last run's; None where nothing was guided in it. `unfinished` are the last run's latents, if it left noise in them.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.run: SamplerRun | None = None
        self.unfinished: Tensor | None = None
        self._begin: Callable[[dict[str, Any]], SamplerRun] | None = None  # while a sampler runs
        self._begun = False  # whether `_begin_call` was called for the predictions that are combined next
        self._uncond_alone = False  # whether the unconditional prediction was made alone

    def __deepcopy__(self, memo: dict) -> Guided:
        """Return itself: ComfyUI's clone of a model copies the options deeply, but keeps the same wrappers around a run."""
        return self

    def sampled(self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *rest: Any, **named: Any):
        """ComfyUI's wrapper `outer_sample`: a run begins here, whatever became of the last one. The log tells what it did."""
        guider, steps = executor.class_obj, StepOfSigma(sigmas[:-1].tolist(), evaluates_twice(sampler))
        for doubt in self.doubts(guider):
            logger.warning(f"Basin Escape: {doubt}")

        def begin(args: dict[str, Any]) -> SamplerRun:
            model = args["model"].model_sampling
            goes_on = not noise.any() and steps.sigmas[0] < float(model.sigma_max) * (1 - 1e-4)
            return SamplerRun(self.settings, steps, model, args["input"], float(guider.cfg), goes_on)

        self.run, self._begin, self._begun, self._uncond_alone = None, begin, False, False
        try:
            latents = executor(noise, latent, sampler, sigmas, *rest, **named)
        finally:
            self._begin = None
        finished = float(sigmas[-1]) == 0
        self.unfinished = None if finished else latents
        if self.run is not None:
            self.run.report(finished)
        elif steps.sigmas:
            logger.warning(f"Basin Escape: {type(guider).__name__} did not call it, and nothing was guided by it")
        return latents

    def doubts(self, guider: Any) -> list[str]:
        """Return what keeps a guider's run from being guided as a whole, a sentence each."""
        found, name = [], type(guider).__name__
        if guider.model_options.get(CFG_FUNCTION) is not self:
            found.append("a node after it has set a CFG function of its own, which takes its place: use one of the two")
        if others := sorted(set(guider.conds) - PLAIN):
            found.append(f"{name} combines {', '.join(others)} by itself, and that is not held back: use CFGGuider")
        return found

    def predicted(self, args: dict[str, Any]) -> list[Tensor]:
        """ComfyUI's `sampler_calc_cond_batch_function`: [cond, uncond], (B, ...) each; zeros for one that is not needed."""
        from comfy.samplers import calc_cond_batch  # ComfyUI's

        conds, options = args["conds"], args["model_options"]
        if options.get(CFG_FUNCTION) is self:
            self._uncond_alone = not self._begin_call(args, conds[1]).needs_cond and not any(
                options.get(name) for name in WATCHERS
            )
            conds = [None if self._uncond_alone else conds[0], *conds[1:]]
        return calc_cond_batch(args["model"], conds, args["input"], args["sigma"], options)

    @torch.no_grad()
    def __call__(self, args: dict[str, Any]) -> Tensor:
        """ComfyUI's `sampler_cfg_function`: x - denoised, (B, ...).

        Raises ValueError without a negative conditioning, and where no sampler runs.
        """
        run = self.run if self._begun else None
        if run is None:  # another node has made the predictions
            run = self._begin_call(args, args["input_uncond"])
        self._begun = False
        x, uncond, cond = (args[name] for name in ("input", "uncond_denoised", "cond_denoised"))
        return x - run.guided(x, args["sigma"], uncond, None if self._uncond_alone else cond, float(args["cond_scale"]))

    def _begin_call(self, args: dict[str, Any], negative: Any) -> SamplerRun:
        """Go to the next call of the model."""
        if negative is None:
            raise ValueError("Basin Escape needs a negative conditioning, which may be empty: use CFGGuider, not BasicGuider")
        if self._begin is None:
            raise ValueError("Basin Escape was called outside the run of a guider, which it cannot follow")
        self.run = self.run or self._begin(args)
        self.run.begin_call(args["sigma"])
        self._begun = True
        return self.run
