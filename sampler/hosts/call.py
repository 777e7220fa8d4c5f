"""One call of a stock pipeline, guided: what its networks return, what its scheduler steps with, what its callback changes."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

from ..detection.basin import LOG_SNR, Probe
from ..detection.judging import Verdict
from ..guidance.guidance import Guidance
from ..kernels.state import per_sample
from .escape import Escape, judge
from .executed_steps import taken
from .network_call import NetworkCall, sample_of, seen, stacked, timestep_of
from .stock_pipelines import StockPipeline, network_of

log = logging.getLogger(__name__)
ON = 2.0  # a scale at which every pipeline asks for both predictions; it multiplies zero
OFF = 1.0  # the largest at which a pipeline asks for one
SEEDS = 2**63 - 1


class Call:
    """A call of the pipeline `pipe` under `guidance`: one for all samples, or one a sample.

    stock: what is known of such pipelines. arguments: of the call. state: the guidance's, None before the first step. latents:
    after the last step.

    Raises ValueError for arguments that cannot be followed.
    """

    def __init__(
        self, pipe: DiffusionPipeline, stock: StockPipeline, guidance: Guidance | list[Guidance], arguments: Mapping[str, Any]
    ):
        self.pipe: Any = pipe  # its components are attributes that its own class has
        self.stock, self.arguments = stock, dict(arguments)
        for name, allowed in stock.only:
            if self.arguments[name] != allowed:
                raise ValueError(
                    f"{name} is {self.arguments[name]!r}, which escape cannot follow: leave it at {allowed!r}; guidance that "
                    "varies over time is Guidance's shape and interval"
                )
        network = network_of(pipe, stock)
        if network.dtype == torch.float64:
            raise ValueError(
                f"pipe's {type(network).__name__} is in {network.dtype}, and guidance computes in float32: use "
                "pipe.to(torch.float32)"
            )
        self.state: Escape | None = None
        self.latents: Tensor | None = None
        self._network_calls: list[NetworkCall] = []  # the network's call that a picture is judged by, or both of a pair
        self._nearest = 0  # the step's call whose noise level is that of a judged picture, of those taken
        self._sign = 1.0  # -1 where the pipeline steps with the opposite of what its network predicts
        self._first: Tensor | None = None  # of a pair, as the pipeline holds it
        self._guided: Tensor | None = None  # of the step that is being taken
        self._verified = self._cut_off = False
        self._changed: dict[str, tuple[Any, Any]] = {}  # arguments: as the pipeline gets them, as they were given
        self._guidance = self._followed(guidance)
        self._watch_callback()

    def run(self, method: Callable[..., Any]) -> Any:
        """Make the call, and return what the pipeline's `__call__` returns.

        The pipeline is left as its own call leaves it, after errors too.
        """
        bound = inspect.BoundArguments(inspect.signature(method), self.arguments)
        own, networks = vars(self.pipe), (getattr(self.pipe, name, None) for name in self.stock.networks)
        counted = own.pop("_num_timesteps", None)  # the pipeline counts its steps anew
        with ExitStack() as stack:
            for network in (network for network in networks if network is not None):
                stack.enter_context(seen(network, partial(self._predicted, network)))
            stack.enter_context(_stepping(self.pipe.scheduler, self._step))
            try:
                return method(*bound.args, **bound.kwargs)
            finally:
                if counted is not None:  # one that failed before it counted has the count it had
                    own.setdefault("_num_timesteps", counted)
                for name, (ours, given) in self._changed.items():
                    if own.get("_" + name) == ours:
                        own["_" + name] = given

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

    def judge(self, threshold: float, probes: int, latents: Tensor | None = None) -> Verdict:
        """The verdict on the call's pictures, or on these latents (B, ...) in their place; see `escape.judge`.

        Raises ValueError where the pictures cannot be judged.
        """
        self.check()
        found = self.latents if latents is None else latents
        if self.interrupted or not self._network_calls or found is None:
            what = "was stopped in" if self.interrupted else "never asked for both predictions in"
            raise ValueError(f"{self._name} {what} its last call: its pictures cannot be judged")
        given = self.arguments.get("generator")
        one_each = given if isinstance(given, Sequence) else [given] * self.begun.batch
        seeds = [0 if one is None else one.initial_seed() & SEEDS for one in one_each]
        verdict = judge(self._predict, self.pipe.scheduler, found, seeds, threshold, probes)
        self.pipe.maybe_free_model_hooks()
        return verdict

    def forget(self) -> None:
        """Let go of what only `judge` needs."""
        self._network_calls, self.latents = [], None

    def check(self) -> None:
        """Raise ValueError where the pictures of such a call cannot be judged."""
        Probe.of(self.pipe.scheduler)
        if 0 < (self.arguments.get("denoising_end") or 0) < 1:
            raise ValueError(
                f"{self._name} leaves its last steps to another pipeline (denoising_end), and pictures are judged at the end: "
                "use the guard, or judge, there"
            )

    def _predict(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(uncond, cond), (B, ...) each, for latents (B, ...): what the scheduler would be given."""
        made = [call.repeated(latents, float(timesteps[0])) for call in self._network_calls]
        earlier, later = made if self.stock.pair else self._halves(made[0])[:2]
        uncond, cond = (later, earlier) if self.stock.cond_first else (earlier, later)
        return self._sign * uncond.reshape(latents.shape), self._sign * cond.reshape(latents.shape)

    def _followed(self, guidance: Guidance | list[Guidance]) -> Guidance | list[Guidance]:
        """The guidance, with the rule that the call's own arguments ask for. The pipeline's own way to it is switched off."""
        stock, given = self.stock, self.arguments
        followed = [_with_its_rule(one, stock, given) for one in ([guidance] if isinstance(guidance, Guidance) else guidance)]
        self._per_token = given[stock.per_token] if isinstance(stock.per_token, str) else stock.per_token
        changes = {stock.scale: ON, "guidance_rescale": 0.0}
        if stock.capped and given[stock.capped]:
            changes[stock.capped] = False
        self._changed = {name: (value, given[name]) for name, value in changes.items() if name in given}
        given |= {name: ours for name, (ours, _) in self._changed.items()}
        if stock.negated and all(value is None for name, value in given.items() if name.startswith("negative_prompt")):
            given["negative_prompt"] = ""
        return followed[0] if isinstance(guidance, Guidance) else followed

    def _watch_callback(self) -> None:
        """Wrap the call's callback, to know the latents after each step, and what it makes of the pipeline's guidance."""
        name, wanted = "callback_on_step_end", "callback_on_step_end_tensor_inputs"
        if name not in self.arguments:
            return
        own = self.arguments[name]
        known = isinstance(own, (PipelineCallback, MultiPipelineCallbacks))
        inputs = own.tensor_inputs if known else self.arguments[wanted]

        def after(pipe: DiffusionPipeline, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
            told = own(pipe, step, timestep, {name: given[name] for name in inputs}) if own is not None else {}
            self.latents = told.get("latents", given["latents"])
            self._follow_scale()
            return told

        self.arguments[name], self.arguments[wanted] = after, list(dict.fromkeys(["latents", *inputs]))

    def _follow_scale(self) -> None:
        """Guidance that a callback has cut off stays off. Raises ValueError for another scale."""
        scale = vars(self.pipe).get("_" + self.stock.scale, ON)
        if scale == ON or self._cut_off:
            return
        if scale > OFF:
            raise ValueError(
                f"callback_on_step_end has set {self.stock.scale} to {scale!r}, which escape cannot follow: guidance that "
                "varies over time is Guidance's shape and interval"
            )
        self._cut_off = True

    def _predicted(self, network: nn.Module, given: tuple, named: dict[str, Any], output: Any) -> Any:
        """What the pipeline gets in the place of a network's output."""
        if self._cut_off:
            return output
        if self._guided is not None:
            raise ValueError(f"{self._name} asks for a third prediction in a step, which escape cannot follow")
        prediction = output[0]
        if self.stock.pair:
            return (self._paired(network, given, named, prediction), *output[1:])
        if self.state is None and not _is_doubled(sample_of(given, named)):
            raise ValueError(
                f"{self._name} does not ask for two predictions of each sample at once here (guidance is off, or by something "
                "else): escape cannot follow"
            )
        earlier, later, rest = self._halves(stacked(prediction))
        self._begin(given, named, earlier)
        self._keep(network, given, named)
        m = self._guide(earlier, later)
        both = torch.cat([m, m])
        if rest is not None:
            both = torch.cat([both, rest.to(both.dtype)], dim=1)
        return (list(both.unbind()) if isinstance(prediction, list) else both, *output[1:])

    def _paired(self, network: nn.Module, given: tuple, named: dict[str, Any], prediction: Tensor) -> Tensor:
        if self._first is None:  # a copy: the network may use its own memory again
            self._begin(given, named, prediction)
            self._keep(network, given, named)
            self._first = prediction.to(self.stock.merge or prediction.dtype, copy=True)
            return self._first
        self._keep(network, given, named)
        m = self._guide(self._first, prediction)
        self._first.copy_(m)
        self._first = None
        return m

    def _halves(self, doubled: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(first prediction, second, other channels of both) of a doubled batch, in its own order; None for no others."""
        channels = doubled.shape[1]
        if self.stock.variance and channels == 2 * network_of(self.pipe, self.stock).config.in_channels:
            channels //= 2
        earlier, later = doubled[:, :channels].chunk(2)
        return earlier, later, doubled[:, channels:] if channels < doubled.shape[1] else None

    def _guide(self, earlier: Tensor, later: Tensor) -> Tensor:
        """The guided prediction of a step, from its two in the order in which they came."""
        cond, uncond = (earlier, later) if self.stock.cond_first else (later, earlier)
        m = self.begun(uncond, cond, dtype=self.stock.merge)
        if self._per_token:
            m = renormalised(m, cond, self.begun.weight)
        self._guided = m
        return m

    def _begin(self, given: tuple, named: dict[str, Any], prediction: Tensor) -> None:
        """Lay the guidance over the steps that the pipeline is about to take, once."""
        if self.state is not None:
            return
        scheduler = self.pipe.scheduler
        calls = vars(self.pipe).get("_num_timesteps")
        start = _first_call(scheduler, timestep_of(given, named))
        which = slice(start, None if calls is None else start + calls)
        timesteps, noise, step = taken(scheduler, which)
        self._timesteps = scheduler.timesteps[which].tolist()
        self._nearest = 0 if noise is None else int((noise[step] - LOG_SNR).nan_to_num(torch.inf).abs().argmin())
        self.state = Escape(self._guidance, timesteps, len(prediction), prediction.device, step, noise)
        for one in dict.fromkeys(self.state.guidance):
            if (line := one.idle(self.state.timesteps)) is not None:
                log.warning(line)

    def _keep(self, network: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        """Keep the arguments of the first step's calls, then of those whose noise level is that of a judged picture."""
        call = self.begun.calls
        if call not in (0, self._nearest):
            return
        if self._first is None:
            self._network_calls = []
        counted = self.pipe.scheduler.config.get("num_train_timesteps", 1000)
        self._network_calls.append(NetworkCall.kept(network, given, named, self._timesteps[call], counted))

    def _step(self, step: Callable[..., Any], model_output: Tensor, *given: Any, **named: Any) -> Any:
        """A step of the scheduler with what the pipeline made of the predictions."""
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
        self._sign = -1.0 if bool((m * found).nansum() < 0) else 1.0
        self._verified = True

    @property
    def _name(self) -> str:
        return type(self.pipe).__name__


def _with_its_rule(guidance: Guidance, stock: StockPipeline, arguments: Mapping[str, Any]) -> Guidance:
    """The guidance with what the call's own arguments ask for as its rule."""
    guidance = guidance.rescaled(arguments.get("guidance_rescale", 0.0))
    cap = float(arguments[stock.capped] or 0) if stock.capped else 0.0
    if cap > 0:
        if guidance.rule != "cfg":
            raise ValueError(
                f"{stock.capped} is the rule 'norm-cap', and the guidance has the rule {guidance.rule!r}: give one"
            )
        guidance = replace(guidance, rule="norm-cap", options={"kappa": cap})
    return guidance


def renormalised(guided: Tensor, cond: Tensor, weight: Tensor) -> Tensor:
    """Samples whose weight (B,) is above 1 with the conditional prediction's norm in each token, the last dimension."""
    norm = torch.norm(guided, dim=-1, keepdim=True)
    scaled = guided * (torch.norm(cond, dim=-1, keepdim=True) / norm)
    return torch.where((per_sample(weight, guided) > 1) & (norm != 0), scaled, guided)


def _is_doubled(sample: Tensor) -> bool:
    """Whether the network's input is the same samples twice: other batches of two inputs are not the two predictions of one."""
    halves = sample.nan_to_num().chunk(2)
    return len(halves) == 2 and halves[0].shape == halves[1].shape and torch.equal(*halves)


def _first_call(scheduler: Any, timestep: Any) -> int:
    """Which of the scheduler's timesteps is taken first; `timestep` is what the network is told there."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return begin
    told = torch.as_tensor(timestep).flatten()[0].to(scheduler.timesteps)
    return int((scheduler.timesteps == told).nonzero()[0]) if bool((scheduler.timesteps == told).any()) else 0


@contextmanager
def _stepping(scheduler: Any, take: Callable[..., Any]) -> Iterator[None]:
    """`take` gets the scheduler's step and its arguments in the place of every step."""
    step = scheduler.step
    own = vars(scheduler).get("step")
    scheduler.step = functools.wraps(step)(partial(take, step))
    try:
        yield
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own
