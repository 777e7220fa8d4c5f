"""diffusers' modular pipelines: the guidance as a guider, `pipe.update_components(guider=BasinEscapeGuidance(...))`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.modular_pipelines import BlockState
from torch import Tensor

from ..guidance import Branch, Guidance
from .escape import Escape, each

CONTINUOUS = 2.0  # a schedule that begins below this timestep does not count in 0..1000


class BasinEscapeGuidance(BaseGuidance):
    """Delayed, opposite and plain guidance as `Guidance` says it (Jain et al., CVPR 2025, https://arxiv.org/abs/2411.16738).

    guidance: of all samples, or a list of one a sample, all of one rule; or the same as plain data (`Guidance.to_dict`), as
              `save_pretrained` writes it.
    enabled:  False: the conditional prediction alone.

    A step that needs one prediction alone makes that one. After a run `run`, an `Escape`, holds `transition_step`, `noise_gap`
    and `calls`. A run starts at step 0. Timesteps count in 0..1000, as those of diffusion and flow-matching schedulers do.

    Raises ValueError for guidance that needs a loop that can go back, and in a run for schedulers that call the network more
    than once a step or whose timesteps count otherwise than the guidance asks: use `Sampler` there.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (diffusers wants a list)

    def __init__(self, guidance: Guidance | Mapping | Sequence[Guidance | Mapping], enabled: bool = True):
        super().__init__(enabled=enabled)
        shared = isinstance(guidance, (Guidance, Mapping))
        given = [guidance] if shared else list(guidance)
        self.guidance = each([Guidance.from_dict(one) if isinstance(one, Mapping) else one for one in given])
        plain = [one.to_dict() for one in self.guidance]
        self.register_to_config(guidance=plain[0] if shared else plain, enabled=enabled)
        self._shared = shared
        self._branch: Branch = "both"
        self.run: Escape | None = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Stand before a step. Raises ValueError for steps that cannot be followed."""
        last = self._timestep
        super().set_state(step, num_inference_steps, timestep)
        if not self._enabled:
            return
        level = float(timestep)
        if step == 0:
            timed = any(one.timed for one in self.guidance)
            if timed and num_inference_steps > 1 and level < CONTINUOUS:
                raise ValueError(
                    f"guidance asks for timesteps in 0..1000, and the scheduler's begin at {level:g}: use FirstMinimum(), a "
                    "factor for each step, or another scheduler"
                )
            self.run = self._begin(len(self.guidance), "cpu")
        elif step >= num_inference_steps or level == float(last):
            raise ValueError("the scheduler calls the network more than once a step, which a guider cannot see: use Sampler")
        self._branch = self.run.branch(level)

    def prepare_inputs(self, data: dict[str, Any]) -> list[BlockState]:
        return [self._prepare_batch(data, i, name) for i, name in self._needed()]

    def prepare_inputs_from_block_state(self, data: BlockState, input_fields: dict[str, Any]) -> list[BlockState]:
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in self._needed()]

    def __call__(self, data: list[BlockState]) -> GuiderOutput:
        """The stock one counts predictions by `num_conditions`, which says what a run needs, not a step."""
        return self.forward(**{getattr(one, self._identifier_key): one.noise_pred for one in data})

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction, from those (B, ...) that the step needs."""
        if not self._enabled:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        first, second = (pred_cond, None) if pred_uncond is None else (pred_uncond, pred_cond)
        level = float(self._timestep)
        if self.run.calls == 0 and (self.run.batch != len(first) or self.run.device != first.device):
            self.run = self._begin(len(first), first.device)
        pred = self.run(first, second, timestep=level)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the prediction that is being made is the conditional one."""
        return self._needed()[max(self._count_prepared, 1) - 1][1] == "pred_cond"

    @property
    def num_conditions(self) -> int:
        """How many predictions a run needs; asked when the prompts are encoded, so it is the same in every step."""
        return 2 if self._enabled else 1

    def _begin(self, batch: int, device: torch.device | str) -> Escape:
        guidance = self.guidance[0] if self._shared else self.guidance
        return Escape(guidance, self._num_inference_steps, batch, device)

    def _needed(self) -> list[tuple[int, str]]:
        """(index into (conditional, unconditional) inputs, name) of each prediction of this step."""
        branch = self._branch if self._enabled else "cond"
        return [(i, name) for i, name in enumerate(self._input_predictions) if branch in ("both", name.removeprefix("pred_"))]
