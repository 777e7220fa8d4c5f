"""`escape(pipe, guidance)` guides a stock diffusers pipeline, whose own code runs as it is.

`EscapeRun` gives the pipeline a class of its own, whose calls are `pipeline_call.PipelineCall`. There a forward hook on the
network replaces both predictions by the guided one, m, before the pipeline combines them as it always does: m + s (m - m) = m,
whatever its scale s. All else (LoRA, adapters, offload, schedulers, callbacks) stays the pipeline's.
Under a guard the whole pipeline is called again while any picture looks like a copy and attempts are left.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..detection.verdict import Verdict
from ..guidance.guard import PROBES, THRESHOLD, Guard
from ..guidance.guidance import Guidance
from ..models.fingerprint import another_model
from .known_pipelines import OFF, KnownPipeline, known_pipeline
from .own_loop import Escape, each
from .pipeline_call import PipelineCall
from .scheduler_steps import is_taken

log = logging.getLogger(__name__)


def escape(pipe: DiffusionPipeline, guidance: Guidance | Guard | Sequence[Guidance]) -> EscapeRun:
    """Guide every call of `pipe` by `guidance`, until the end of `with escape(...) as run:` or until `run.leave()`.

    guidance: of all samples, or a list of one a sample, all of one rule; or a guard. Its scale counts, and the call's may be
              left out: where a call gives another scale, the log says so, once for each.

    The call's `guidance_rescale` is followed, and a pipeline's own renormalisation for weights above 1. Steps count from the
    first that is taken (image to image takes the later ones of a schedule). Guidance that a callback cuts off stays off.
    Callbacks read 2 as `pipe.guidance_scale` where the call's would switch guidance off, and 0 as `pipe.guidance_rescale`.
    A pipeline that needs a negative prompt for guidance is given an empty one where the call has none.

    A guard judges what the pipeline made, and calls it again for all samples while any is suspect: with the same arguments and
    the next noise of the call's generators, but without `latents`, which are the first attempt's alone. Each sample is returned
    from the attempt that it passed, else from the last. Its generator's seed, or 0 without one, seeds the noises that judge it.
    A calibrated guard's early look is left out, because a batch is sampled as a whole; the log says so. The log also says where
    the calibration was made on another model. Each attempt calls the callbacks. If a later attempt fails, the pictures of the
    attempts before it are returned, the suspect ones stay marked, the log says so, and `run.error` holds the error.

    The log warns of samples that had no transition, and of a `with` that ends without a call of `pipe`.

    Raises ValueError for a pipeline that is not guided by two predictions or is inside another `escape`, and for guidance that
    needs a loop of its own. A call of `pipe` raises it for arguments that cannot be followed, for pictures that a guard cannot
    judge, while another such call uses the scheduler (threads may share a network, not a scheduler), for a copy of `pipe` that
    was made inside, and after the first step where the pipeline did not step with the guided prediction. Entering a run that
    was left raises it too. Leaving restores the pipeline, after errors too.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}: in another loop use Escape")
    if isinstance(pipe, _Escaping):
        raise ValueError(
            "pipe is inside another escape: leave that first (the end of its `with`, or run.leave()), or give a list of one "
            "guidance a sample"
        )
    known = known_pipeline(pipe)
    for one in [attempt.guidance for attempt in guidance.attempts] if isinstance(guidance, Guard) else [guidance]:
        each(one)
    if isinstance(guidance, Guard):
        _tell_calibrated(pipe, guidance)
    return EscapeRun(pipe, known, guidance)


def _tell_calibrated(pipe: DiffusionPipeline, guard: Guard) -> None:
    """Log what of a guard's calibration does not hold in this pipeline."""
    if guard.early is not None:
        log.warning(
            "the guard's early look is left out: in a pipeline the samples of a batch go on together, so that none is given up "
            "before it is finished; Sampler has it"
        )
    if other := another_model(guard.model or {}, pipe):
        log.warning(other)


class _Escaping:
    """Marks the class of a pipeline inside `escape`."""


class EscapeRun:
    """A pipeline inside `escape`, and the results of its last call: for each of B samples those of its own attempt."""

    def __init__(self, pipe: DiffusionPipeline, known: KnownPipeline, guidance: Guidance | Guard | Sequence[Guidance]):
        self._pipe: Any = pipe
        self._known_pipeline, self._host = known, type(pipe)
        self._guidance = guidance if isinstance(guidance, (Guidance, Guard)) else list(guidance)
        self._told: set[str] = set()  # of the calls' own scales
        self._called = False
        self._forget()
        scales = {f"_{name}" for name in (known.scale, known.capped, "guidance_rescale")}
        self._before = {name: value for name, value in vars(pipe).items() if name in scales}

        @functools.wraps(self._host.__call__)
        def call(own: DiffusionPipeline, *given: Any, **named: Any) -> Any:
            if own is not pipe:
                raise ValueError("pipe is a copy of one inside escape: copy it outside, and guide the copy by itself")
            if is_taken(self._pipe.scheduler):
                raise ValueError(
                    "pipe's scheduler is in the middle of another call inside escape, in another thread or in a callback: give "
                    "each pipeline a scheduler of its own (their networks may be shared), or make one call after another"
                )
            bound = inspect.signature(self._host.__call__).bind(own, *given, **named)
            self._called = True
            self._tell_scale(bound.arguments.get(known.scale))
            bound.apply_defaults()
            return self._run(bound.arguments)

        own = {"__call__": call, "__module__": self._host.__module__}
        self._class = pipe.__class__ = type(self._host.__name__, (_Escaping, self._host), own)

    def __enter__(self) -> EscapeRun:
        if type(self._pipe) is not self._class:
            raise ValueError("this run has been left, and guides nothing any more: call escape again")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.leave()
        if kind is None and not self._called:
            log.warning(
                f"this {self._host.__name__} was not called inside escape, so nothing was guided: another pipeline, even of "
                "the same parts, needs an escape of its own"
            )

    def leave(self) -> None:
        """Restore the pipeline to what it was before `escape`. The results of its last call are kept."""
        if type(self._pipe) is self._class:
            self._pipe.__class__ = self._host
            vars(self._pipe).update(self._before)

    def _forget(self) -> None:
        """Clear the results of the last call."""
        self._calls: list[PipelineCall] = []  # one for each attempt
        self._taken: Tensor | None = None  # (B,) int64, the index in _calls of each sample's attempt
        self._latents: Tensor | None = None
        self._verdict: Verdict | None = None
        self.error: Exception | None = None  # what ended a later attempt of the guard

    @property
    def transition_step(self) -> Tensor:
        """(B,) int64 on the CPU, as `Escape` has it."""
        return self._of_each("transition_step")

    @property
    def noise_gap(self) -> Tensor:
        """(B, steps) float32 on the CPU, as `Escape` has it."""
        return self._of_each("noise_gap")

    @property
    def weight(self) -> Tensor:
        """(B,) float32 on the device: each sample's weight in the last step."""
        return self._of_each("weight")

    @property
    def timesteps(self) -> list[float]:
        """The timestep of each step, in 0..1000; NaN where they are not known."""
        return self._known("timesteps")[-1].timesteps

    @property
    def calls(self) -> int:
        """The number of guided predictions in all attempts together, without those that judge."""
        return sum(state.calls for state in self._known("calls"))

    @property
    def attempts(self) -> Tensor | None:
        """(B,) int64 on the CPU: which attempt of a guard each sample is from, counted from 1. None without a guard."""
        self._known("attempts")
        return self._taken + 1 if isinstance(self._guidance, Guard) and self._taken is not None else None

    @property
    def score(self) -> Tensor | None:
        """(B,) float32 on the CPU: the basin score of each picture, see `basin_score`. None without a guard, until `judge`."""
        self._known("score")
        return None if self._verdict is None else self._verdict.score

    @property
    def suspect(self) -> Tensor | None:
        """(B,) bool on the CPU: the pictures that look like copies. None without a guard, until `judge`."""
        self._known("suspect")
        return None if self._verdict is None else self._verdict.suspect

    def judge(self, threshold: float = THRESHOLD, probes: int = PROBES) -> Verdict:
        """Judge the pictures of the last call: `score` and `suspect` are this verdict's then. See `own_loop.judge`.

        Raises ValueError before a call, after one that was stopped or failed, and for pictures that cannot be judged.
        """
        self._known("judge")
        self._verdict = self._calls[-1].judge(threshold, probes, self._latents)
        return self._verdict

    def _known(self, name: str) -> list[Escape]:
        """The guidance of each call that has taken a step."""
        begun = [call.state for call in self._calls if call.state is not None]
        if not begun:
            raise ValueError(f"{name} is known when the pipeline has been called inside escape(...)")
        return begun

    def _of_each(self, name: str) -> Tensor:
        """Of each sample what its own call says."""
        found = torch.stack([getattr(state, name) for state in self._known(name)])
        taken = torch.zeros(found.shape[1], dtype=torch.int64) if self._taken is None else self._taken
        return found[taken.to(found.device), torch.arange(found.shape[1], device=found.device)]

    def _tell_scale(self, named: float | None) -> None:
        """Log that the call's scale does not count, where the guidance has another. named: that scale; None: not given."""
        if named is None:
            return
        given, weight = float(named), self._known_pipeline.weight(float(named))
        guided = self._guidance if isinstance(self._guidance, list) else [self._guidance]
        scales = dict.fromkeys(one.scale for one in guided)
        if scales.keys() == {weight}:
            return
        means = "switches guidance off" if weight <= OFF else f"is weight {weight:g}" if weight != given else ""
        line = f"{self._known_pipeline.scale}={given:g} in the call of {self._host.__name__}{means and f' {means} there, and'}"
        line += f" does not count: the guidance's own scale does, {', '.join(f'{scale:g}' for scale in scales)}"
        if line not in self._told:
            self._told.add(line)
            log.warning(line)

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        """A call of the pipeline, or as many as a guard asks for."""
        self._forget()
        guard = self._guidance if isinstance(self._guidance, Guard) else None
        plain = self._guidance.plain if isinstance(self._guidance, Guard) else self._guidance
        call = PipelineCall(self._pipe, self._known_pipeline, plain, arguments)
        if guard:
            call.check()
        self._calls = [call]  # known even if it fails
        made = call.run(self._host.__call__)
        self._taken, self._latents = torch.zeros(call.begun.batch, dtype=torch.int64), call.latents
        if guard is None or call.interrupted:
            return made
        self._verdict = call.judge(guard.attempts[0].threshold, guard.attempts[0].probes, call.latents)
        arguments = {name: None if name == "latents" else value for name, value in arguments.items()}
        for number, attempt in enumerate(guard.attempts[1:], start=2):
            again = self._verdict.suspect.clone()
            if not again.any():
                break
            try:
                call = PipelineCall(self._pipe, self._known_pipeline, attempt.guidance, arguments)
                following = call.run(self._host.__call__)
                if call.interrupted:
                    break
                verdict = call.judge(attempt.threshold, attempt.probes, call.latents)
            except Exception as error:
                self.error = error
                log.exception(
                    f"attempt {number} of the guard failed: {int(again.sum())} of {len(again)} samples stay suspect, and are "
                    "returned as the attempts before it made them"
                )
                break
            made, self._verdict = chosen(made, following, again), chosen(self._verdict, verdict, again)
            self._latents = chosen(self._latents, call.latents, again)
            self._calls[-1].forget()
            self._taken = self._taken.masked_fill(again, len(self._calls))
            self._calls.append(call)
        return made


def chosen(old: Any, new: Any, again: Tensor) -> Any:
    """Return a pipeline's output for a batch, with the samples `again` (B,) from `new` and the others from `old`.

    Raises ValueError for what is not by sample.
    """
    if old is None or new is None:
        return new
    if is_dataclass(old) and not isinstance(old, type):  # diffusers' outputs, and a `Verdict`
        names = [field.name for field in fields(old)]
        return type(old)(**{name: chosen(getattr(old, name), getattr(new, name), again) for name in names})
    if isinstance(old, tuple):
        return tuple(chosen(one, other, again) for one, other in zip(old, new, strict=True))
    if isinstance(old, (Tensor, np.ndarray, list)) and len(old) == len(new) == len(again):
        samples = [new[i] if other else old[i] for i, other in enumerate(again.tolist())]
        return samples if isinstance(old, list) else torch.stack(samples) if isinstance(old, Tensor) else np.stack(samples)
    raise ValueError(
        f"the pipeline returns {type(old).__name__}, which is not by sample: a guard cannot choose from it; use Sampler"
    )
