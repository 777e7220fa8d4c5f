"""The guidance as an extension of InvokeAI's denoising: it replaces the combined prediction."""

from __future__ import annotations

from typing import Any

from invokeai.backend.stable_diffusion.diffusion.conditioning_data import ConditioningMode
from invokeai.backend.stable_diffusion.diffusion_backend import StableDiffusionBackend
from invokeai.backend.stable_diffusion.extension_callback_type import ExtensionCallbackType
from invokeai.backend.stable_diffusion.extensions.base import ExtensionBase, callback
from torch import Tensor

from ...detection.basin_score import Probe
from ...detection.verdict import Verdict
from ..guidance_widgets import Settings
from ..own_loop import Escape, judge
from ..scheduler_steps import steps_taken

FIRST = -1000  # before other extensions change what was combined


class BasinEscapeExtension(ExtensionBase):
    """Delayed or opposite guidance of one denoising. Its CFG scale, or the list of one a step, is that after the transition.

    settings: of the widgets. judges: whether finished latents are judged.

    `state` is the run's `Escape`, None before it begins; `verdict` that on its pictures, None where they were not judged.
    """

    def __init__(self, settings: Settings, judges: bool = True):
        super().__init__()
        self.settings, self.judges = settings, judges
        self.manager: Any = None  # the ExtensionsManager that it was added to
        self.state: Escape | None = None
        self.verdict: Verdict | None = None

    @callback(ExtensionCallbackType.PRE_DENOISE_LOOP, order=FIRST)
    def begin(self, ctx: Any) -> None:
        """Lay the guidance over the steps. Raises ValueError for what cannot be followed."""
        timesteps, noise, step = steps_taken(ctx.scheduler, ctx.inputs.timesteps)
        scale: Any = ctx.inputs.conditioning_data.guidance_scale
        shape: Any = "static"
        if isinstance(scale, list):
            if len(timesteps) < len(step):
                raise ValueError(
                    "cfg_scale is a list, and the scheduler calls the network more than once a step: give a number"
                )
            scale, shape = 1.0, tuple(scale[: len(timesteps)])
        guidance = self.settings.guidance(scale, [float(one) for one in timesteps], ctx.inputs.noise is None, shape)
        if self.judges:
            Probe.of(ctx.scheduler)
        self.state = Escape(guidance, timesteps, len(ctx.latents), ctx.latents.device, step, noise)

    @callback(ExtensionCallbackType.POST_COMBINE_NOISE_PREDS, order=FIRST)
    def guide(self, ctx: Any) -> None:
        """Put the guided prediction in the place of the combined one."""
        if self.state is None:
            raise ValueError("a prediction was combined before the denoising began, which Basin Escape cannot follow")
        ctx.noise_pred = self.state(ctx.negative_noise_pred, ctx.positive_noise_pred)

    @callback(ExtensionCallbackType.POST_DENOISE_LOOP, order=-FIRST)
    def finish(self, ctx: Any) -> None:
        """Judge the pictures: the network is asked with all that the other extensions hand to it."""
        if not self.judges:
            return
        backend = StableDiffusionBackend(ctx.unet, ctx.scheduler)

        def predict(x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
            ctx.step_index, ctx.timestep, ctx.latent_model_input = 0, timesteps[0], x
            uncond, cond = backend.run_unet(ctx, self.manager, ConditioningMode.Both).chunk(2)
            return uncond, cond

        self.verdict = judge(predict, ctx.scheduler, ctx.latents, ctx.inputs.seed)
        ctx.latent_model_input = None
