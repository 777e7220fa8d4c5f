"""vLLM-Omni: a plugin of its server, by which each request names its own guidance.

A request names it in its sampling parameters' `extra_args`, as plain data (`Guidance.to_dict`):

    extra_args={"basinescape": {"guidance": {"scale": 4.0, "until": {"rule": "At", "timestep": 680}}}}

A request that names none is sampled as the server always does, also in a batch with others. Under `--step-execution` each
request keeps its own step, and so its own place in its guidance. The log says from which step on each picture had full
guidance. A guard is refused: nothing in the server begins a request again.

Requests of one batch must have equal `true_cfg_scale`, `guidance_scale`, `guidance_scale_2`, `guidance_rescale` and
`cfg_normalize`. Two places demand it: the scheduler's batch keys (`diffusion/sched/interface.py`) and, step by step,
`_prepare_cfg_scalars` (`diffusion/worker/input_batch.py`), which raises. Both exist because `combine_cfg_noise` is given one
scale for the whole batch. A guidance's own scale is in neither, so requests may differ in that.

Written against vllm-omni 0.30.0: `diffusion/distributed/cfg_parallel.py`, `diffusion/worker/input_batch.py` and
`diffusion_model_runner.py`. The server finds `register` by the entry point group `vllm_omni.general_plugins`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..guidance.guidance import Guidance
from ..kernels.state import per_sample
from ..types import Branch
from .own_loop import Escape, each
from .request_guidance import KEY, RequestGuidance, check_one_scale
from .scheduler_steps import steps_taken

log = logging.getLogger(__name__)


@dataclass
class Request:
    """A request of the batch that is being denoised: its guidance (None: the server's own), and its run once it has begun.

    rows: how many rows of the batch are its own; None: an equal share.
    """

    id: str
    guidance: Guidance | None
    rows: int | None = None
    run: Escape | None = None

    @classmethod
    def of(cls, id: str, sampling: Any, rows: int | None = None) -> Request:
        """Return the request of this id and these sampling parameters. Raises ValueError for what cannot be followed."""
        named = (sampling.extra_args or {}).get(KEY)
        if named is None:
            return cls(id, None, rows)
        asked = RequestGuidance.by(named)
        (guidance,) = each(asked.guidance, 1)
        if asked.judge:
            raise ValueError("judge is not known here: the server does not hand over finished latents; use basinescape judge")
        check_one_scale(sampling)
        return cls(id, guidance, rows)

    def begin(self, scheduler: Any, timesteps: Any, rows: int, device: torch.device) -> None:
        """Lay the guidance over the steps, once."""
        if self.guidance is not None and self.run is None:
            levels, noise, step = steps_taken(scheduler, torch.as_tensor(timesteps))
            self.run = Escape(self.guidance, levels, rows, device, step, noise)

    @property
    def branch(self) -> Branch:
        """The predictions that its next step needs."""
        return "both" if self.run is None else self.run.branch()

    def guided(self, uncond: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """The guided prediction of its rows, and their weights (rows,)."""
        if self.run is None:
            raise ValueError(f"request {self.id} names no guidance")
        guided = self.run(uncond, cond)
        if self.run.done:
            log.info(f"basinescape: request {self.id}: guided from step {self.run.transition_step.tolist()} on; -1: never")
            for line in self.run.warnings():
                log.warning(f"basinescape: request {self.id}: {line}")
        return guided, self.run.weight

    def warn(self) -> None:
        """Log that nothing was guided, where the request has named guidance."""
        if self.guidance is not None and (self.run is None or not self.run.calls):
            log.warning(
                f"basinescape: request {self.id} named guidance, and nothing was guided by it: its model does not combine "
                "predictions by the shared function (or this is not the last rank of a pipeline)"
            )


class Denoising:
    """What is wrapped around vLLM-Omni's own functions. `requests` are those of the batch that is being denoised."""

    def __init__(self, combine: Callable[..., Any]):
        self.requests: list[Request] = []
        self._combine = combine  # CFGParallelMixin's own
        self._counted = False  # a cache tells the two predictions apart by counting the network's calls

    def stepped(self, original: Callable[..., Any], cls: type, states: Sequence[Any], *given: Any, **named: Any) -> Any:
        """Around `InputBatch.make_batch`, called for each step: every request is at a step of its own."""
        batch, self.requests = original(cls, states, *given, **named), []
        for state in batch.states:
            if KEY not in state.extra:
                state.extra[KEY] = Request.of(state.request_id, state.sampling, len(state.latents))
            request = state.extra[KEY]
            if state.step_index == 1:
                request.warn()
            request.begin(state.scheduler, state.timesteps, len(state.latents), state.latents.device)
            if request.run is not None:
                request.run.seek(state.step_index)
            self.requests.append(request)
        return batch

    def listed(self, original: Callable[..., Any], runner: Any, reqs: Sequence[Any], **named: Any) -> Any:
        """Around `DiffusionModelRunner._execute_request_list`: requests that are denoised from the first step to the last."""
        self.requests = [Request.of(one.request_id, one.sampling_params) for one in reqs]
        self._counted = runner.od_config.cache_backend not in (None, "none")
        try:
            made = original(runner, reqs, **named)
            for one in self.requests:
                one.warn()
            return made
        finally:
            self.requests, self._counted = [], False

    def predicted(
        self,
        original: Callable[..., Any],
        pipeline: Any,
        do_true_cfg: bool,
        true_cfg_scale: float,
        positive_kwargs: dict[str, Any],
        negative_kwargs: dict[str, Any] | None,
        *given: Any,
        **named: Any,
    ) -> Any:
        """Around `predict_noise_maybe_with_cfg`: a prediction that no request needs is not made, unless a cache counts them."""
        if not any(one.guidance for one in self.requests):
            return original(pipeline, do_true_cfg, true_cfg_scale, positive_kwargs, negative_kwargs, *given, **named)
        if not do_true_cfg:
            raise ValueError(f"{KEY} guides by two predictions: give a negative_prompt and a true_cfg_scale above 1")
        if getattr(type(pipeline).combine_cfg_noise, "__wrapped__", None) is not self._combine:
            raise ValueError(f"{type(pipeline).__name__} combines predictions by a function of its own: {KEY} cannot guide it")
        branches = {one.branch for one in self.requests} if all(one.run for one in self.requests) else {"both"}
        if self._counted or branches not in ({"uncond"}, {"cond"}):
            return original(pipeline, True, true_cfg_scale, positive_kwargs, negative_kwargs, *given, **named)
        own = positive_kwargs if branches == {"cond"} else negative_kwargs
        alone = original(pipeline, False, true_cfg_scale, own, None, *given, **named)
        return torch.cat([one.guided(alone[rows], None)[0] for one, rows in self._rows(len(alone))])

    def combined(
        self,
        original: Callable[..., Any],
        pipeline: Any,
        positive_noise_pred: Any,
        negative_noise_pred: Any,
        true_cfg_scale: float,
        cfg_normalize: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Around `combine_cfg_noise`: the rows of each request by its own guidance, in its own step."""
        if not any(one.guidance for one in self.requests):
            return original(pipeline, positive_noise_pred, negative_noise_pred, true_cfg_scale, cfg_normalize, kwargs)
        cond, uncond = (
            one[0] if isinstance(one, tuple) and len(one) == 1 else one for one in (positive_noise_pred, negative_noise_pred)
        )
        if isinstance(cond, tuple):
            raise ValueError(f"{type(pipeline).__name__} makes {len(cond)} predictions at once: {KEY} guides one")
        made = []
        for one, rows in self._rows(len(cond)):
            c, u = cond[rows], uncond[rows]
            if one.guidance is None:
                made.append(original(pipeline, c, u, true_cfg_scale, cfg_normalize, kwargs))
                continue
            if one.run is None:  # denoised from the first step to the last
                one.begin(pipeline.scheduler, pipeline.scheduler.timesteps, len(c), c.device)
            guided, weight = one.guided(u, c)
            if cfg_normalize:
                guided = torch.where(per_sample(weight, guided) > 1, pipeline.cfg_normalize_function(c, guided), guided)
            made.append(guided)
        return torch.cat(made)

    def _rows(self, count: int) -> list[tuple[Request, slice]]:
        """Return each request with its rows of the batch."""
        found, start = [], 0
        for one in self.requests:
            end = start + (one.rows or count // len(self.requests))
            found.append((one, slice(start, end)))
            start = end
        return found


def admitted(original: Callable[..., str], scheduler: Any, request_id: str, request: Any) -> str:
    """Around `BaseScheduler._add_request_with_request_id`: what is wrong in a request fails it before it shares a batch."""
    Request.of(request_id, request.sampling_params)
    return original(scheduler, request_id, request)


def register() -> None:
    """The plugin: what the server calls in each of its processes, once or more."""
    from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
    from vllm_omni.diffusion.sched.base_scheduler import BaseScheduler
    from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner
    from vllm_omni.diffusion.worker.input_batch import InputBatch

    combine = CFGParallelMixin.combine_cfg_noise
    if hasattr(combine, "__wrapped__"):
        return
    around = Denoising(combine)
    _wrap(CFGParallelMixin, "combine_cfg_noise", around.combined)
    _wrap(CFGParallelMixin, "predict_noise_maybe_with_cfg", around.predicted)
    _wrap(BaseScheduler, "_add_request_with_request_id", admitted)
    _wrap(DiffusionModelRunner, "_execute_request_list", around.listed)
    make_batch = InputBatch.make_batch.__func__
    InputBatch.make_batch = classmethod(functools.wraps(make_batch)(functools.partial(around.stepped, make_batch)))


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    own = getattr(owner, name)

    @functools.wraps(own)
    def wrapper(*given: Any, **named: Any) -> Any:
        return around(own, *given, **named)

    setattr(owner, name, wrapper)
