"""diffusers' modular pipelines: the guidance as a guider, `pipe.update_components(guider=BasinEscapeGuidance(...))`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from ..detection.verdict import Verdict
from ..guidance.guard import PROBES, THRESHOLD
from ..guidance.guidance import Guidance
from ..kernels.state import per_sample
from ..types import Branch
from .network_call import NetworkCall, seen, sign_of, stacked
from .own_loop import Escape, each, judge

log = logging.getLogger(__name__)
CONTINUOUS = 2.0  # a schedule that begins below this timestep does not count in 0..1000


class BasinEscapeGuidance(BaseGuidance):
    """A guider for delayed, opposite and plain guidance, see `Guidance` (Jain et al., CVPR 2025, https://arxiv.org/abs/2411.16738).

    guidance: of all samples, or a list of one a sample, all of one rule; or the same as plain data (`Guidance.to_dict`), as
              `save_pretrained` writes it.
    enabled:  False: the conditional prediction alone.

    A step that needs one prediction makes that one alone. After a run `run`, an `Escape`, holds `transition_step`, `noise_gap`
    and `calls`. A run starts at step 0. Timesteps count in 0..1000, as those of diffusion and flow-matching schedulers do. A
    guider cannot begin a sample again: `judge` tells which finished pictures look like copies. Give a pipeline with two guiders
    (Wan 2.2: `guider` and `guider_2`, for the earlier and the later steps) the same object as both.

    The log warns of samples that had no transition, and of a run that did not take all its steps with this guider.

    Raises ValueError for guidance that needs a loop that can go back; in a run, for schedulers that call the network more than
    once a step, and for guidance by timesteps where the scheduler's do not count in 0..1000: use `Sampler` there.
    """

    _input_predictions: Any = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (diffusers wants a list)

    def __init__(self, guidance: Guidance | Mapping | Sequence[Guidance | Mapping], enabled: bool = True):
        super().__init__(enabled=enabled)
        self._shared = not isinstance(guidance, Sequence)
        given: list[Any] = list(guidance) if isinstance(guidance, Sequence) else [guidance]
        self.guidance = each([Guidance.from_dict(one) if isinstance(one, Mapping) else one for one in given])
        for one in self.guidance:
            one.over([], None)  # raises for a transition by log SNR, which a guider is not told
        plain = [one.to_dict() for one in self.guidance]
        self.register_to_config(guidance=plain[0] if self._shared else plain, enabled=enabled)
        self._branch: Branch = "both"
        self._hooks = ExitStack()
        self._network_calls: dict[str, NetworkCall] = {}  # the first call of the network for each prediction
        self._raw: dict[str, Tensor] = {}  # what it returned there
        self._sign = 1.0  # -1 where the pipeline hands over the opposite
        self.run: Escape | None = None
        self._expected = 0  # the steps of that run

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Note which step is the next. Raises ValueError for steps that cannot be followed."""
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
            if self.run is not None and 0 < self.run.calls < self._expected:
                log.warning(
                    f"the last run took {self.run.calls} of its {self._expected} steps with this guider: it was stopped, or "
                    "went on with another one (Wan 2.2 has a guider_2: give it the same object as both)"
                )
            self._expected = num_inference_steps
            self.run, self._network_calls = self._begin(len(self.guidance), "cpu"), {}
        elif self.run is None:
            raise ValueError(
                f"a run starts at step 0, and this one at {step}: use Escape in a loop of your own; where a pipeline has two "
                "guiders (Wan 2.2), give it the same object as both"
            )
        elif step >= num_inference_steps or level == float(last):
            raise ValueError("the scheduler calls the network more than once a step, which a guider cannot see: use Sampler")
        self._branch = self.run.branch(level)

    def prepare_models(self, denoiser: Any) -> None:
        super().prepare_models(denoiser)
        self._hooks.close()  # still open if the network failed
        name = self._needed()[self._count_prepared - 1][1]
        if self._enabled and name not in self._network_calls:
            self._hooks.enter_context(seen(denoiser, partial(self._keep, name)))

    def _keep(self, name: str, call: NetworkCall, output: Any) -> Any:
        """Keep the network's next call alone, also where the one that was prepared has failed."""
        self._hooks.close()
        self._network_calls[name] = call.kept(float(self._timestep))
        self._raw[name] = stacked(output[0]).clone()
        return output

    def judge(
        self,
        latents: Tensor,
        scheduler: SchedulerMixin,
        seeds: int | Sequence[int] = 0,
        threshold: float = THRESHOLD,
        probes: int = PROBES,
    ) -> Verdict:
        """Judge whether the pictures of the last run look like copies; see `own_loop.judge`.

        latents: (B, ...) of the pictures, as the network takes them (packed, if it packs them). scheduler: the pipeline's.

        Raises ValueError for latents of another shape, and where a run has not asked for both predictions.
        """
        missing = set(self._input_predictions) - self._network_calls.keys()
        if missing:
            raise ValueError(f"the last run never asked for {' and '.join(sorted(missing))}: its pictures cannot be judged")

        noisiest = next(iter(self._network_calls.values())).network  # the first step's, where a pipeline has two

        def predict(x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
            calls = (replace(self._network_calls[name], network=noisiest) for name in ("pred_uncond", "pred_cond"))
            uncond, cond = (self._sign * call.repeated(x, float(timesteps[0])).reshape(x.shape) for call in calls)
            return uncond, cond

        return judge(predict, scheduler, latents, seeds, threshold, probes)

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [self._prepare_batch(data, i, name) for i, name in self._needed()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in self._needed()]

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """Combine a step's predictions. The stock method counts them by `num_conditions`, which is what a run needs."""
        return self.forward(**{getattr(one, self._identifier_key): one.noise_pred for one in data})

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction, from those (B, ...) that the step needs."""
        if not self._enabled:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        first, second = (pred_cond, None) if pred_uncond is None else (pred_uncond, pred_cond)
        if first is None or self.run is None:
            raise ValueError("a guider is given predictions after set_state(0, ...): use Escape in a loop of your own")
        if self.run.calls == 0 and (self.run.batch != len(first) or self.run.device != first.device):
            self.run = self._begin(len(first), first.device)
        pred = self.run(first, second, timestep=float(self._timestep))
        for line in self.run.warnings() if self.run.done else ():
            log.warning(line)
        for name, own in (("pred_cond", pred_cond), ("pred_uncond", pred_uncond)):
            raw = self._raw.pop(name, None)
            if raw is not None and own is not None and raw.numel() == own.numel():
                self._sign = sign_of(raw.flatten(), own.flatten())
        # Some pipelines give the guided prediction the conditional one's norm: as everywhere, for weights above 1 alone.
        norm = pred if pred_cond is None else torch.where(per_sample(self.run.weight, pred) > 1, pred_cond, pred)
        return GuiderOutput(pred=pred, pred_cond=norm, pred_uncond=pred_uncond)

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
