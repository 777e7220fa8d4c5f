"""`escape(pipe, guidance)`: the guidance inside a stock diffusers pipeline, which goes on as it is.

A forward hook on the network replaces both predictions by the guided one, m, before the pipeline combines them as it always
does: m + s (m - m) = m, whatever its scale s. All else (LoRA, adapters, offload, schedulers, callbacks) stays the pipeline's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from ..calibration import Calibration
from ..guidance import Guidance
from ..kernels.state import per_sample
from ..schedulers import levels, step_of_calls
from .escape import Escape, each
from .families import Family, family_of, network_of

ON = 2.0  # a scale at which every pipeline asks for both predictions; it multiplies zero


def escape(
    pipe: DiffusionPipeline, guidance: Guidance | Sequence[Guidance], calibration: Calibration | None = None
) -> AbstractContextManager[EscapeRun]:
    """Inside, every call of `pipe` is guided by `guidance`: `with escape(pipe, guidance) as run: pipe(prompt)`.

    guidance:    of all samples, or a list of one a sample, all of one rule. Its scale counts; that in the call does not.
    calibration: of the guidance, scheduler and number of steps; then `run.score` and `run.suspect` say how memorized each
                 sample of the last call looks.

    The call's `guidance_rescale` is followed, and a pipeline's own renormalisation for weights above 1. Steps count from the
    first that is taken (image to image takes the later ones of a schedule).

    Raises ValueError for a pipeline that is not guided by two predictions, or is inside another `escape`, and for guidance that
    needs a loop of its own; when `pipe` is called, for arguments that cannot be followed, and after the first step where the
    pipeline did not step with the guided prediction. On leaving the pipeline is what it was before, after errors too.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"pipe must be a diffusers pipeline, got {type(pipe).__name__}: in another loop use Escape")
    if isinstance(pipe, _Escaping):
        raise ValueError("pipe is inside another escape: leave that first, or give a list of one guidance a sample")
    family, checked = family_of(pipe), each(guidance)
    return _escaped(pipe, family, checked[0] if isinstance(guidance, Guidance) else checked, calibration)


class EscapeRun:
    """What is known of the last call of a pipeline inside `escape`: as `Escape` has it, whose properties these are."""

    def __init__(self) -> None:
        self._state: Escape | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in dir(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if self._state is None:
            raise ValueError(f"{name} is known when the pipeline has been called inside escape(...)")
        return getattr(self._state, name)

    def __dir__(self) -> list[str]:
        return ["calls", "noise_gap", "score", "suspect", "timesteps", "transition_step"]


class _Escaping:
    """Marks the class of a pipeline inside `escape`."""


@contextmanager
def _escaped(
    pipe: DiffusionPipeline, family: Family, guidance: Guidance | list[Guidance], calibration: Calibration | None
) -> Iterator[EscapeRun]:
    run, host = EscapeRun(), type(pipe)

    @functools.wraps(host.__call__)
    def call(self: DiffusionPipeline, *given: Any, **named: Any) -> Any:
        bound = inspect.signature(host.__call__).bind(self, *given, **named)
        bound.apply_defaults()
        with ExitStack() as stack:
            _Call(self, family, guidance, calibration, run, bound.arguments).attach(stack)
            return host.__call__(*bound.args, **bound.kwargs)

    pipe.__class__ = type(host.__name__, (_Escaping, host), {"__call__": call, "__module__": host.__module__})
    try:
        yield run
    finally:
        pipe.__class__ = host


class _Call:
    """One call of a pipeline. `arguments` are the call's, changed so that it asks for both predictions."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        family: Family,
        guidance: Guidance | list[Guidance],
        calibration: Calibration | None,
        run: EscapeRun,
        arguments: dict[str, Any],
    ):
        self.pipe, self.family, self.calibration, self.run = pipe, family, calibration, run
        for name, allowed in family.only:
            if arguments[name] != allowed:
                raise ValueError(
                    f"{name} is {arguments[name]!r}, which escape cannot follow: leave it at {allowed!r}; guidance that varies "
                    "over time is Guidance's shape and interval"
                )
        shared = isinstance(guidance, Guidance)
        followed = [_followed(one, family, arguments) for one in ([guidance] if shared else guidance)]
        self.guidance = followed[0] if shared else followed
        self.per_token = arguments[family.per_token] if isinstance(family.per_token, str) else family.per_token
        arguments[family.scale] = ON
        if family.negated and all(value is None for name, value in arguments.items() if name.startswith("negative_prompt")):
            arguments["negative_prompt"] = ""
        self.first: Tensor | None = None  # of a pair, as the pipeline holds it
        self.guided: Tensor | None = None  # of the step that is being taken
        self.state: Escape | None = None
        self.verified = False
        self.counted = vars(pipe).get("_num_timesteps")

    def attach(self, stack: ExitStack) -> None:
        """See what the networks return and what the scheduler is given, until `stack` is left."""
        networks = (getattr(self.pipe, name, None) for name in self.family.networks)
        for network in (network for network in networks if network is not None):
            stack.enter_context(_seen(network, self.predicted))
        stack.enter_context(_stepping(self.pipe.scheduler, self.stepped))
        vars(self.pipe).pop("_num_timesteps", None)  # the pipeline counts its steps anew
        stack.callback(self._restore_count)

    def predicted(self, given: tuple, named: dict[str, Any], output: Any) -> Any:
        """What the pipeline gets in the place of a network's output."""
        if self.guided is not None:
            raise ValueError(f"{self._name} asks for a third prediction in a step, which escape cannot follow")
        prediction = output[0]
        if self.family.pair:
            return (self._paired(given, named, prediction), *output[1:])
        listed = isinstance(prediction, list)
        doubled = torch.stack(prediction) if listed else prediction
        if self.state is None and not _is_doubled(given, named):
            raise ValueError(
                f"{self._name} does not ask for two predictions of each sample at once here (guidance is off, or by something "
                "else): escape cannot follow"
            )
        channels = doubled.shape[1]
        if self.family.variance and channels == 2 * network_of(self.pipe, self.family).config.in_channels:
            channels //= 2
        m = self._guide(given, named, *doubled[:, :channels].chunk(2))
        both = torch.cat([m, m])
        if channels < doubled.shape[1]:
            both = torch.cat([both, doubled[:, channels:].to(both.dtype)], dim=1)
        return (list(both.unbind()) if listed else both, *output[1:])

    def _paired(self, given: tuple, named: dict[str, Any], prediction: Tensor) -> Tensor:
        if self.first is None:  # a copy: the network may use its own memory again
            self.first = prediction.to(self.family.merge or prediction.dtype, copy=True)
            return self.first
        m = self._guide(given, named, self.first, prediction)
        self.first.copy_(m)
        self.first = None
        return m

    def _guide(self, given: tuple, named: dict[str, Any], earlier: Tensor, later: Tensor) -> Tensor:
        """The guided prediction of a step, from its two in the order in which they came."""
        cond, uncond = (earlier, later) if self.family.cond_first else (later, earlier)
        if self.state is None:
            self.state = self.run._state = self._begin(given, named, uncond)
        m = self.state(uncond, cond, dtype=self.family.merge)
        if self.per_token:
            m = renormalised(m, cond, self.state.weight)
        self.guided = m
        return m

    def _begin(self, given: tuple, named: dict[str, Any], uncond: Tensor) -> Escape:
        """The guidance over the steps that the pipeline is about to take."""
        scheduler = self.pipe.scheduler
        calls = vars(self.pipe).get("_num_timesteps")
        start = _first_call(scheduler, named["timestep"] if "timestep" in named else given[1])
        taken = slice(start, None if calls is None else start + calls)
        step, level = step_of_calls(scheduler)[taken], levels(scheduler)
        step = step - step[0]
        first = torch.searchsorted(step, torch.arange(int(step[-1]) + 1))
        timesteps = [torch.nan] * len(first) if level is None else level[taken][first]
        return Escape(self.guidance, timesteps, len(uncond), uncond.device, step, self.calibration)

    def stepped(self, model_output: Tensor) -> None:
        """Before the scheduler steps with what the pipeline made of the predictions."""
        if self.guided is None:
            raise ValueError(f"{self._name} steps without two predictions (guidance is off): escape cannot follow")
        if not self.verified:
            m, found = self.guided.flatten(1), model_output.flatten(1)[:, : self.guided[0].numel()]
            if m.shape != found.shape or not torch.allclose(found.abs().float(), m.abs().float(), rtol=1e-2, atol=1e-3):
                raise ValueError(f"{self._name} did not step with the guided prediction: use Escape in a loop of your own")
            self.verified = True
        self.guided = None

    def _restore_count(self) -> None:
        """A pipeline that failed before it counted its steps has the count it had."""
        if self.counted is not None:
            vars(self.pipe).setdefault("_num_timesteps", self.counted)

    @property
    def _name(self) -> str:
        return type(self.pipe).__name__


def _followed(guidance: Guidance, family: Family, arguments: dict[str, Any]) -> Guidance:
    """The guidance with what the call's own arguments ask for as its rule; those are switched off."""
    if "guidance_rescale" in arguments:
        guidance = guidance.rescaled(arguments["guidance_rescale"])
        arguments["guidance_rescale"] = 0.0
    cap = float(arguments[family.capped] or 0) if family.capped else 0.0
    if cap > 0:
        if guidance.rule != "cfg":
            raise ValueError(
                f"{family.capped} is the rule 'norm-cap', and the guidance has the rule {guidance.rule!r}: give one"
            )
        guidance = replace(guidance, rule="norm-cap", options={"kappa": cap})
        arguments[family.capped] = False
    return guidance


def renormalised(guided: Tensor, cond: Tensor, weight: Tensor) -> Tensor:
    """Samples whose weight (B,) is above 1 with the conditional prediction's norm in each token, the last dimension."""
    scaled = guided * (torch.norm(cond, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))
    return torch.where(per_sample(weight, guided) > 1, scaled, guided)


def _is_doubled(given: tuple, named: dict[str, Any]) -> bool:
    """Whether the network's input is the same samples twice: other batches of two inputs are not the two predictions of one."""
    sample = given[0] if given else named["sample"] if "sample" in named else named["hidden_states"]
    halves = torch.stack(sample).chunk(2) if isinstance(sample, list) else sample.chunk(2)
    return len(halves) == 2 and halves[0].shape == halves[1].shape and torch.equal(*halves)


def _first_call(scheduler: SchedulerMixin, timestep: Any) -> int:
    """Which of the scheduler's timesteps is taken first; `timestep` is what the network is told there."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return begin
    told = torch.as_tensor(timestep).flatten()[0].to(scheduler.timesteps)
    return int((scheduler.timesteps == told).nonzero()[0]) if bool((scheduler.timesteps == told).any()) else 0


@contextmanager
def _seen(network: torch.nn.Module, see: Callable[[tuple, dict, Any], Any]) -> Iterator[None]:
    """`see` gets (arguments, named ones, output) of every call, and its result is the output; compiled or not."""
    compiled = network._compiled_call_impl
    if compiled is None:
        handle = network.register_forward_hook(lambda _, *seen: see(*seen), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
    else:  # of `network.compile()`, into which a hook would be compiled
        network._compiled_call_impl = lambda *given, **named: see(given, named, compiled(*given, **named))
        try:
            yield
        finally:
            network._compiled_call_impl = compiled


@contextmanager
def _stepping(scheduler: SchedulerMixin, see: Callable[[Tensor], None]) -> Iterator[None]:
    """`see` gets the prediction that each step of the scheduler is given."""
    step = scheduler.step

    @functools.wraps(step)
    def seen(model_output: Tensor, *given: Any, **named: Any) -> Any:
        see(model_output)
        return step(model_output, *given, **named)

    own = vars(scheduler).get("step")
    scheduler.step = seen
    try:
        yield
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own
