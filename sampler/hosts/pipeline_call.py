"""One call of a known pipeline, guided: what its networks return, what its scheduler steps with, what its callback changes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..detection.basin_score import LOG_SNR, Probe
from ..detection.verdict import Verdict
from ..guidance.guidance import Guidance, never_came
from ..kernels.state import per_sample
from .known_pipelines import OFF, KnownPipeline, network_of
from .network_call import NetworkCall, seen, sign_of, stacked
from .own_loop import Escape, judge
from .scheduler_steps import stepping, steps_taken

log = logging.getLogger(__name__)
ON = 2.0  # a scale at which every pipeline asks for both predictions; it multiplies zero
SEEDS = 2**63 - 1


class PipelineCall:
    """A call of the pipeline `pipe` under `guidance`: one for all samples, or one a sample.

    known: what is known of such pipelines. arguments: of the call. state: the guidance's, None before the first step. latents:
    those after the last step taken.

    Raises ValueError for arguments that cannot be followed.
    """

    def __init__(self, pipe: Any, known: KnownPipeline, guidance: Guidance | list[Guidance], arguments: Mapping[str, Any]):
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.known, self.arguments = known, dict(arguments)
        for name, allowed in known.fixed:
            if self.arguments[name] != allowed:
                raise ValueError(
                    f"{name} is {self.arguments[name]!r}, which escape cannot follow: leave it at {allowed!r}; guidance that "
                    "varies over time is Guidance's shape and interval"
                )
        network = network_of(pipe, known)
        if network.dtype == torch.float64:
            raise ValueError(
                f"pipe's {type(network).__name__} is in {network.dtype}, and guidance computes in float32: use "
                "pipe.to(torch.float32)"
            )
        self.state: Escape | None = None
        self.latents: Tensor | None = None
        self._finished = False
        self._kept: list[NetworkCall] = []  # the network's call that a picture is judged by, or both of a pair
        self._nearest = 0  # the call whose noise level is nearest to that of a judged picture, of those taken
        self._sign = 1.0  # -1 where the pipeline steps with the opposite of what its network predicts
        self._first: Tensor | None = None  # prediction of a pair, in the memory that the pipeline holds
        self._guided: Tensor | None = None  # prediction of the step that is being taken
        self._verified = self._cut_off = False
        self._changed: dict[str, tuple[Any, Any]] = {}  # name: (what the pipeline gets, what was given)
        self._guidance = self._followed(guidance)
        self._watch_callback()

    def run(self, method: Callable[..., Any]) -> Any:
        """Make the call, and return what the pipeline's `__call__` returns.

        The pipeline is left as its own call leaves it, after errors too.
        """
        bound = inspect.BoundArguments(inspect.signature(method), self.arguments)
        own, networks = vars(self.pipe), (getattr(self.pipe, name, None) for name in self.known.networks)
        counted = own.pop("_num_timesteps", None)  # the pipeline counts its steps anew
        with ExitStack() as stack:
            for network in (network for network in networks if network is not None):
                stack.enter_context(seen(network, self._predicted))
            stack.enter_context(stepping(self.scheduler, self._step))
            try:
                made = method(*bound.args, **bound.kwargs)
            finally:
                if counted is not None:  # a call that failed before it counted
                    own.setdefault("_num_timesteps", counted)
                for name, (ours, given) in self._changed.items():
                    if own.get("_" + name) == ours:
                        own["_" + name] = given
        self._finished = not self.interrupted
        self._tell_who_waits()
        return made

    def _tell_who_waits(self) -> None:
        """Warn of samples that had no transition, in a finished run whose guidance could have changed."""
        state = self.begun
        line = never_came(state.transition_step, len(state.timesteps))
        if self._finished and line is not None and not any(one.idle(state.timesteps) for one in state.guidance):
            log.warning(line)

    @property
    def begun(self) -> Escape:
        """The guidance's state. Raises ValueError before the first step."""
        if self.state is None:
            raise ValueError(f"{self._name} has not asked for two predictions: escape cannot follow")
        return self.state

    @property
    def interrupted(self) -> bool:
        """Whether a callback has stopped the pipeline."""
        return bool(vars(self.pipe).get("_interrupt", False))

    def judge(self, threshold: float, probes: int, latents: Tensor | None) -> Verdict:
        """The verdict on these latents (B, ...), made by this call or one with the same prompts; see `own_loop.judge`.

        Raises ValueError where the pictures cannot be judged.
        """
        self.check()
        if not self._finished or not self._kept or latents is None:
            what = "never asked for both predictions in" if self._finished else "was stopped in"
            raise ValueError(f"{self._name} {what} its last call: its pictures cannot be judged")
        given = self.arguments.get("generator")
        one_each = given if isinstance(given, Sequence) else [given] * self.begun.batch
        seeds = [0 if one is None else one.initial_seed() & SEEDS for one in one_each]
        verdict = judge(self._predict, self.scheduler, latents, seeds, threshold, probes)
        self.pipe.maybe_free_model_hooks()
        return verdict

    def forget(self) -> None:
        """Free what only `judge` needs."""
        self._kept, self.latents = [], None

    def check(self) -> None:
        """Raise ValueError where the pictures of such a call cannot be judged."""
        Probe.of(self.scheduler)
        if 0 < (self.arguments.get("denoising_end") or 0) < 1:
            raise ValueError(
                f"{self._name} leaves its last steps to another pipeline (denoising_end), and pictures are judged at the end: "
                "use the guard, or judge, there"
            )

    def _predict(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(uncond, cond), (B, ...) each, for latents (B, ...): what the scheduler would be given."""
        own = vars(self.pipe)
        before = {name: own[name] for name in ("_current_timestep",) if name in own}  # diffusers' caches read it
        own.update(dict.fromkeys(before, timesteps[0]))
        try:
            made = [call.repeated(latents, float(timesteps[0])) for call in self._kept]
        finally:
            own.update(before)
        earlier, later = made if self.known.pair else self._halves(made[0])[:2]
        uncond, cond = (later, earlier) if self.known.cond_first else (earlier, later)
        return self._sign * uncond.reshape(latents.shape), self._sign * cond.reshape(latents.shape)

    def _followed(self, guidance: Guidance | list[Guidance]) -> Guidance | list[Guidance]:
        """Return the guidance with the rule that the call's arguments ask for. In the pipeline that rule is switched off."""
        known, given = self.known, self.arguments
        followed = [_with_its_rule(one, known, given) for one in ([guidance] if isinstance(guidance, Guidance) else guidance)]
        self._per_token = given[known.per_token] if isinstance(known.per_token, str) else known.per_token
        changes: dict[str, Any] = {"guidance_rescale": 0.0}
        if not known.weight(given[known.scale]) > OFF:
            changes[known.scale] = ON
        if known.capped and given[known.capped]:
            changes[known.capped] = False
        self._changed = {name: (value, given[name]) for name, value in changes.items() if name in given}
        given |= {name: ours for name, (ours, _) in self._changed.items()}
        if known.negated and given["negative_prompt"] is None and given["negative_prompt_embeds"] is None:
            given["negative_prompt"] = ""
        return followed[0] if isinstance(guidance, Guidance) else followed

    def _watch_callback(self) -> None:
        """Wrap the call's callback, to note the latents after each step and what it changes in the pipeline's guidance."""
        name, wanted = "callback_on_step_end", "callback_on_step_end_tensor_inputs"
        if name not in self.arguments:
            return
        own = self.arguments[name]
        known = isinstance(own, (PipelineCallback, MultiPipelineCallbacks))
        inputs = own.tensor_inputs if known else self.arguments[wanted]

        def after(pipe: DiffusionPipeline, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
            changed = own(pipe, step, timestep, {name: given[name] for name in inputs}) if own is not None else {}
            self.latents = changed.get("latents", given["latents"])
            self._follow_scale()
            return changed

        self.arguments[name], self.arguments[wanted] = after, list(dict.fromkeys(["latents", *inputs]))

    def _follow_scale(self) -> None:
        """Note guidance that a callback has cut off. Raises ValueError where it has set another scale, rescale or norm."""
        for name in ("guidance_rescale", self.known.capped, self.known.per_token):
            if name in self.arguments and vars(self.pipe).get(f"_{name}", self.arguments[name]) != self.arguments[name]:
                raise ValueError(
                    f"callback_on_step_end has set {name} to {vars(self.pipe)[f'_{name}']!r}, which escape cannot follow: give "
                    "it in the call"
                )
        given = self.arguments[self.known.scale]
        scale = vars(self.pipe).get("_" + self.known.scale, given)
        if OFF < self.known.weight(scale) != self.known.weight(given):
            raise ValueError(
                f"callback_on_step_end has set {self.known.scale} to {scale!r}, which escape cannot follow: guidance that "
                "varies over time is Guidance's shape and interval"
            )
        self._cut_off |= self.known.weight(scale) <= OFF

    def _predicted(self, call: NetworkCall, output: Any) -> Any:
        """Return what the pipeline gets in the place of a network's output."""
        if self._cut_off:
            return output
        if self._guided is not None:
            raise ValueError(f"{self._name} asks for a third prediction in a step, which escape cannot follow")
        prediction = output[0]
        if self.known.pair:
            return (self._paired(call, prediction), *output[1:])
        if self.state is None and not _is_doubled(call.latents):
            raise ValueError(
                f"{self._name} does not ask for two predictions of each sample at once here (guidance is off, or by something "
                "else): escape cannot follow"
            )
        earlier, later, rest = self._halves(stacked(prediction))
        self._note(call, earlier)
        m = self._guide(earlier, later)
        both = torch.cat([m, m])
        if rest is not None:
            both = torch.cat([both, rest.to(both.dtype)], dim=1)
        return (list(both.unbind()) if isinstance(prediction, list) else both, *output[1:])

    def _paired(self, call: NetworkCall, prediction: Tensor) -> Tensor:
        self._note(call, prediction)
        if self._first is None:  # a copy: the network may use its own memory again
            self._first = prediction.to(self.known.merge or prediction.dtype, copy=True)
            return self._first
        m = self._guide(self._first, prediction)
        self._first.copy_(m)
        self._first = None
        return m

    def _halves(self, doubled: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(first prediction, second, other channels of both) of a doubled batch, in its own order; None for no others."""
        channels = doubled.shape[1]
        if self.known.variance and channels == 2 * network_of(self.pipe, self.known).config.in_channels:
            channels //= 2
        earlier, later = doubled[:, :channels].chunk(2)
        return earlier, later, doubled[:, channels:] if channels < doubled.shape[1] else None

    def _guide(self, earlier: Tensor, later: Tensor) -> Tensor:
        """The guided prediction of a step, from its two in the order in which they came."""
        cond, uncond = (earlier, later) if self.known.cond_first else (later, earlier)
        m = self.begun(uncond, cond, dtype=self.known.merge)
        self._guided = renormalised(m, cond, self.begun.weight) if self._per_token else m
        return self._guided

    def _note(self, call: NetworkCall, prediction: Tensor) -> None:
        """Begin the guidance at the run's first call of the network, and keep the calls that may judge pictures.

        Those are the first step's, and later those whose noise level is nearest to that of a judged picture.
        """
        if self.state is None:
            self._begin(call.time, prediction)
        number = self.begun.calls
        if number in (0, self._nearest):
            counted = self.scheduler.config.get("num_train_timesteps", 1000)
            self._kept = [] if self._first is None else self._kept
            self._kept.append(call.kept(self._timesteps[number], counted))

    def _begin(self, time: Any, prediction: Tensor) -> None:
        """Lay the guidance over the steps that the pipeline is about to take. time: its network's time input in the first."""
        calls, start = vars(self.pipe).get("_num_timesteps"), _first_call(self.scheduler, time)
        timesteps = self.scheduler.timesteps[start : None if calls is None else start + calls]
        taken = steps_taken(self.scheduler, timesteps)
        self._timesteps = timesteps.tolist()
        if taken.log_snrs is not None:
            self._nearest = int((taken.log_snrs[taken.step] - LOG_SNR).nan_to_num(torch.inf).abs().argmin())
        self.state = Escape(self._guidance, taken.timesteps, len(prediction), prediction.device, taken.step, taken.log_snrs)
        for one in dict.fromkeys(self.state.guidance):
            if (line := one.idle(self.state.timesteps)) is not None:
                log.warning(line)

    def _step(self, step: Callable[..., Any], model_output: Tensor, *given: Any, **named: Any) -> Any:
        """Take a step of the scheduler with what the pipeline made of the predictions."""
        if not self._cut_off:
            self._verify(model_output)
        result = step(model_output, *given, **named)
        self._guided, self.latents = None, result[0]
        return result

    def _verify(self, model_output: Tensor) -> None:
        if self._guided is None:
            raise ValueError(f"{self._name} steps without two predictions (guidance is off): escape cannot follow")
        if self._verified:
            return
        m, found = self._guided.flatten(1).float(), model_output.flatten(1)[:, : self._guided[0].numel()].float()
        if m.shape != found.shape or not torch.allclose(found.abs(), m.abs(), rtol=1e-2, atol=1e-3, equal_nan=True):
            raise ValueError(f"{self._name} did not step with the guided prediction: use Escape in a loop of your own")
        self._sign, self._verified = sign_of(m, found), True

    @property
    def _name(self) -> str:
        return type(self.pipe).__name__


def _with_its_rule(guidance: Guidance, known: KnownPipeline, arguments: Mapping[str, Any]) -> Guidance:
    """The guidance with what the call's own arguments ask for as its rule."""
    guidance = guidance.rescaled(arguments.get("guidance_rescale", 0.0))
    cap = float(arguments[known.capped] or 0) if known.capped else 0.0
    if cap > 0:
        if guidance.rule != "cfg":
            raise ValueError(
                f"{known.capped} is the rule 'norm-cap', and the guidance has the rule {guidance.rule!r}: give one"
            )
        guidance = replace(guidance, rule="norm-cap", options={"kappa": cap})
    return guidance


def renormalised(guided: Tensor, cond: Tensor, weight: Tensor) -> Tensor:
    """Return `guided`; samples of a weight (B,) above 1 get the norm of `cond` in each token, the last dimension."""
    norm = torch.norm(guided, dim=-1, keepdim=True)
    scaled = guided * (torch.norm(cond, dim=-1, keepdim=True) / norm)
    return torch.where((per_sample(weight, guided) > 1) & (norm != 0), scaled, guided)


def _is_doubled(sample: Tensor) -> bool:
    """Whether the network's input is the same samples twice: other batches of two inputs are not the two predictions of one."""
    halves = sample.nan_to_num().chunk(2)
    return len(halves) == 2 and halves[0].shape == halves[1].shape and torch.equal(*halves)


def _first_call(scheduler: Any, timestep: Any) -> int:
    """Return the index of the scheduler's timestep that is taken first. timestep: the network's time input there."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return begin
    given = torch.as_tensor(timestep).flatten()[0].to(scheduler.timesteps)
    return int((scheduler.timesteps == given).nonzero()[0]) if bool((scheduler.timesteps == given).any()) else 0
