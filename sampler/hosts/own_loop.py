"""`Escape` guides a loop of your own, without a solver and without a model; `judge` judges the finished pictures.

state = Escape(Guidance.delayed(7.5, until=FirstMinimum()), timesteps, batch=2, device="cuda")
for t in timesteps:
    uncond, cond = network(latents, t)
    latents = anything(latents, t, state(uncond, cond))
state.transition_step, state.noise_gap
judge(network, scheduler, latents, seeds).suspect
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import gt
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .. import checks
from ..detection import basin_score
from ..detection.verdict import Verdict
from ..guidance.guard import PROBES, THRESHOLD, Guard
from ..guidance.guidance import Guidance, first_of_step, never_came
from ..kernels import guide_step
from ..kernels.operands import check_tensor, is_dense
from ..kernels.state import Latents, State, TransitionState, Workspace
from ..kernels.table import Column
from ..sampling.gap_statistics import GapStatistics
from ..sampling.step_table import branches, looks_for_transition, table_of
from ..types import Branch


class Escape:
    """The guidance of one run: call it once for each call of the network, in order.

    guidance:    of all samples, or a list of one a sample, all of one rule.
    timesteps:   of each step, falling, in 0..1000 of the training schedule; NaN where that is not known, for guidance that
                 needs none. Or the number of steps, if each call passes its own timestep.
    batch:       B, the number of samples.
    device:      of the predictions.
    step:        of each call of the network, counted from 0, for solvers that call it more than once a step: only the first
                 call of a step may show a transition. None: one call a step.
    log_snrs:    of each step, rising; needed by guidance that is delayed until a log SNR (`schedule.noise_levels` has them).

    Raises ValueError for arguments that are not as described, for timesteps that the guidance is not made for, and for a guard
    or restart sampling, which need a loop that can go back. It judges nothing: `judge` does.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        guidance: Guidance | Sequence[Guidance],
        timesteps: Sequence[float] | Tensor | int,
        batch: int,
        device: torch.device | str = "cpu",
        step: Sequence[int] | Tensor | None = None,
        log_snrs: Sequence[float] | Tensor | None = None,
    ):
        self.batch = checks.at_least_one("batch", batch)
        given = each(guidance, self.batch)
        self.device = torch.device(device)
        self.calls = 0
        count = checks.whole_number(timesteps)
        self._timed_by_call = count is not None  # in each call
        self.timesteps = _levels(timesteps) if count is None else [math.nan] * checks.at_least_one("timesteps", count)
        self.guidance = [one.over(self.timesteps, _log_snrs(log_snrs, len(self.timesteps))) for one in given]
        self._step = torch.arange(len(self.timesteps)) if step is None else torch.as_tensor(step, dtype=torch.int64).cpu()
        if self._step.unique_consecutive().tolist() != list(range(len(self.timesteps))):
            raise ValueError(f"step must count the {len(self.timesteps)} timesteps from 0, got {self._step.tolist()}")
        self._first = first_of_step(self._step)
        if not self._timed_by_call:
            self._check_timesteps(self.timesteps, begins=True)
        self._distinct = list(dict.fromkeys(self.guidance))
        self._finds = any(looks_for_transition(laid) for laid in self._columns())
        self._table = self._rows().to(self.device)
        until = [one.until for one in self._distinct]
        self._statistics = GapStatistics.of(until, [len(self._step)] * len(until), self.device)
        self._starts = torch.tensor([self._distinct.index(one) * len(self._step) for one in self.guidance], device=self.device)
        self._transition = TransitionState.empty(self.batch, len(self.timesteps), self.device)
        self._transition.restart(slice(None), self._starts, self._starts + len(self._step) - 1)
        self._state: State | None = None

    @torch.no_grad()
    def __call__(
        self, uncond: Tensor, cond: Tensor | None, timestep: float | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The guided prediction of the next call, (B, ...), in memory of its own.

        uncond, cond: (B, ...) float32, float16 or bfloat16, what the network itself returned. Where `branch` names one of
                      them, give that one first, and None as cond.
        timestep: of this step, where `timesteps` was a number. dtype: of the result; None: that of the predictions.

        Raises ValueError for predictions that do not match, a call too many, and a timestep that is missing.
        """
        check_tensor("uncond", uncond)
        check_tensor("cond", uncond if cond is None else cond)
        if len(uncond) != self.batch:
            raise ValueError(f"uncond has {len(uncond)} samples; the run was made for {self.batch}")
        if cond is None and self.branch(timestep) == "both":
            raise ValueError("cond is None, and this call needs both predictions")
        self._begin_call(timestep)
        if not (is_dense(uncond) and (cond is None or (is_dense(cond) and uncond.stride()[1:] == cond.stride()[1:]))):
            uncond, cond = uncond.contiguous(), None if cond is None else cond.contiguous()
        dtype = uncond.dtype if dtype is None else checks.dtype(dtype, uncond.device)
        if self._state is None or self._state.latents.x.dtype != dtype:
            self._state = self._beside(uncond, dtype)
        if cond is not None:
            self._statistics.ask(uncond, cond, self._table, self._transition)
        guided = guide_step(uncond, cond, self._table, self._state, self._finds, self.guidance[0].rule)
        self._transition.advance()
        self.calls += 1
        return guided

    def branch(self, timestep: float | None = None) -> Branch:
        """Return what the next call needs: "both", or the one prediction that all samples are sure to be guided by alone.

        timestep: as in that call. Raises ValueError where it is missing.
        """
        self._begin_call(timestep)
        needed = {branches(laid)[self.calls] for laid in self._columns()}
        return needed.pop() if len(needed) == 1 else "both"

    @property
    def done(self) -> bool:
        """Whether all calls of the run are made."""
        return self.calls == len(self._step)

    def seek(self, call: int) -> None:
        """Set which call is the next, and keep all that was noted so far: for hosts that tell the number of a call."""
        self.calls = call
        self._transition.row.copy_(self._starts + call)

    def mark(self) -> TransitionState:
        """Return a copy of what has been noted so far, for `forget`."""
        return self._transition.select(torch.arange(self.batch, device=self.device))

    def forget(self, mark: TransitionState) -> None:
        """Undo what was noted since `mark` was made."""
        for name, noted in vars(mark).items():
            getattr(self._transition, name).copy_(noted)

    @property
    def weight(self) -> Tensor:
        """(B,) float32 on the device: each sample's weight in the last call."""
        return self._transition.weight(self._table[self._starts + max(self.calls - 1, 0)])

    @property
    def transition_step(self) -> Tensor:
        """(B,) int64 on the CPU: the step at which each sample's guidance changed; -1 for none yet, 0 for plain guidance."""
        return self._transition.within(len(self.timesteps)).cpu()

    @property
    def noise_gap(self) -> Tensor:
        """(B, steps) float32 on the CPU: ||cond - uncond||_2 at each step, NaN where it was not computed."""
        return self._transition.gaps.cpu()

    def warnings(self) -> list[str]:
        """Return a finished run's warnings: of guidance whose transition changed nothing, or of samples that had none."""
        idle = [line for one in self._distinct if (line := one.idle(self.timesteps)) is not None]
        line = never_came(self.transition_step, len(self.timesteps))
        return idle or ([] if line is None else [line])

    def _rows(self) -> Tensor:
        """The rows of each distinct guidance, one after another: (K * distinct, len(Column)) float32 on the CPU."""
        return torch.cat([table_of(laid) for laid in self._columns()])

    def _columns(self) -> list[dict[Column, Tensor]]:
        """The columns of each distinct guidance, laid over the calls."""
        return [one.calls(self.timesteps, self._step, self._first) for one in self._distinct]

    def _begin_call(self, timestep: float | None) -> None:
        """Note the timestep of a step's first call, and lay the guidance over it. Raises ValueError if all calls are done."""
        if self.done:
            raise ValueError(f"the run has {self.calls} calls of the network, and all are done: make another Escape")
        k = int(self._step[self.calls])
        if not self._timed_by_call or not self._first[self.calls]:
            return
        level = math.nan if timestep is None else _levels([timestep])[0]
        if self.timesteps[k] == level:
            return
        self._check_timesteps([level], begins=k == 0)
        self.timesteps[k] = level
        if any(one.timed for one in self._distinct):
            self._table.copy_(self._rows())

    def _check_timesteps(self, levels: Sequence[float], begins: bool) -> None:
        """Raise ValueError where guidance asks for timesteps and these are not known, rise, or begin a run at 1 or below."""
        for one in self.guidance:
            if one.timed and any(map(math.isnan, levels)):
                raise ValueError(
                    f"guidance {one!r} asks for timesteps in 0..1000, and they are not known: give them, or use "
                    "FirstMinimum(), or a factor for each step"
                )
            if one.timed and (any(map(gt, levels[1:], levels)) or (begins and len(self.timesteps) > 1 and levels[0] <= 1)):
                raise ValueError(
                    f"guidance {one!r} asks for timesteps that fall, in 0..1000 (a flow's t times 1000), got {list(levels)}"
                )

    def _beside(self, uncond: Tensor, dtype: torch.dtype) -> State:
        """The buffers that a step works in, of the predictions' shape and layout."""
        with torch.inference_mode(False):
            doubled = torch.cat([torch.empty_like(uncond, dtype=dtype, device=self.device)] * 2)
            latents = Latents(doubled, torch.empty(2 * self.batch, device=self.device), None, None)
            return State(self._transition, latents, Workspace.beside(latents))


def each(guidance: Guidance | Guard | Sequence[Guidance | Guard], batch: int | None = None) -> list[Guidance]:
    """Return one guidance for each of `batch` samples. Without `batch`: the given list, or one of the guidance for all.

    Raises ValueError for anything but `Guidance`, for a list of another length, and for what a host cannot follow: a guard,
    restart sampling, and several rules.
    """
    if isinstance(guidance, Guard) or (isinstance(guidance, Sequence) and any(isinstance(one, Guard) for one in guidance)):
        raise ValueError(
            "a guard begins samples again, which this loop cannot: use Sampler or escape(pipe, guard), or plain guidance here "
            "and basinescape.hosts.own_loop.judge for the finished pictures"
        )
    given = [guidance] * (batch or 1) if isinstance(guidance, Guidance) else guidance
    found = [one for one in given if isinstance(one, Guidance)] if isinstance(given, Sequence) else []
    if not found or len(found) != len(given):
        raise ValueError(
            f"guidance must be a Guidance, such as Guidance.delayed(7.5, until=At(timestep=680)), or a list of one a sample; "
            f"got {guidance!r}"
        )
    if batch is not None and len(found) != batch:
        raise ValueError(f"guidance has {len(found)} entries for {batch} samples")
    for one in found:
        if one.restart:
            raise ValueError(f"restart={one.restart} goes back in the steps, which needs a loop that can: use Sampler")
        if one.rule != found[0].rule:
            raise ValueError(f"guidance must have one rule in a batch, got {one.rule!r} beside {found[0].rule!r}")
    return found


def _doubles(given: Any) -> Tensor:
    """In float64 on the CPU; some devices have no float64."""
    return torch.as_tensor(given.cpu() if isinstance(given, Tensor) else given, dtype=torch.float64)


def _levels(timesteps: Sequence[float] | Tensor | int) -> list[float]:
    """Return them as numbers. Raises ValueError for other things, for an empty list, and for numbers out of range."""
    try:
        found = _doubles(timesteps)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim != 1 or not len(found) or bool(((found < -1) | (found > 1001)).any()):
        raise ValueError(f"timesteps must be one or more numbers in 0..1000, or how many there are; got {timesteps!r}")
    return found.tolist()


def _log_snrs(given: Sequence[float] | Tensor | None, steps: int) -> list[float] | None:
    """Return them as numbers. Raises ValueError unless there is one for each step."""
    if given is None:
        return None
    found = _doubles(given)
    if found.shape != (steps,):
        raise ValueError(f"log_snrs must be one for each of {steps} steps, got {tuple(found.shape)}")
    return found.tolist()


@torch.no_grad()
def judge(
    predict: basin_score.Predict,
    scheduler: SchedulerMixin | basin_score.Probe,
    latents: Tensor,
    seeds: int | Sequence[int] = 0,
    threshold: float = THRESHOLD,
    probes: int = PROBES,
) -> Verdict:
    """Judge whether finished pictures look like copies of training images, by their basin scores; see `basin_score`.

    predict:   (latents (B, ...), timesteps (B,)) -> (uncond, cond), each (B, ...): what the network itself returns for noised
               pictures with their prompts. `latents` are what the scheduler's `scale_model_input` would return, timesteps
               count as `scheduler.timesteps` do.
    scheduler: of diffusers, with the noise levels and the prediction type that the network was trained for; or a `Probe`.
    latents:   (B, ...) of the pictures, before decoding.
    seeds:     of the noises that judge them: the seeds they were made with. One a picture, or the first one's, counted up.
    threshold: above which a picture is suspect. probes: noises a picture, each a call of `predict`.

    Raises ValueError for arguments that are not as described, and for a scheduler whose noise levels are not known.
    """
    check_tensor("latents", latents)
    if not latents.is_floating_point():
        raise ValueError(f"latents are {latents.dtype}; they must be numbers with a fraction, as before decoding")
    if not isinstance(scheduler, (SchedulerMixin, basin_score.Probe)):
        raise ValueError(f"scheduler must be a scheduler of diffusers or a Probe, got {scheduler!r}")
    seeds, threshold = checks.seeds(seeds, len(latents)), checks.finite("threshold", threshold)
    probe = scheduler if isinstance(scheduler, basin_score.Probe) else basin_score.Probe.of(scheduler)
    score = basin_score.scores(predict, probe, latents, seeds, checks.at_least_one("probes", probes))
    return Verdict(score, basin_score.suspects(score, threshold))
