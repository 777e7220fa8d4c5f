"""SGLang-Diffusion: a plugin of its server, by which each request names its own guidance.

A request names it in its sampling parameters, as plain data (`Guidance.to_dict`, or that of a guard):

    diffusers_kwargs={"basinescape": {"guidance": {"scale": 4.0, "until": {"rule": "At", "timestep": 680}}, "judge": true}}

A request that names none is sampled as the server always does. Requests with different guidance share a dynamic batch where
their rules are the same. `usage["basinescape"]` of the worker's output has an entry for each picture: `transition_step`,
`noise_gap`, and where a picture is judged `score`, `suspect` and `attempts`. The server's HTTP responses leave that entry out,
because their `ImageUsage` has fields of its own alone; so the log has it too, without the gaps. Under a guard the batch's
denoising runs again, from the next noise, while a picture is suspect and has attempts left.

Written against sglang 0.5.23: `runtime/distributed/cfg_policy.py`, `runtime/pipelines_core/stages/denoising.py`,
`runtime/managers/scheduler.py`. The server finds `register` by the entry point group `sglang.multimodal_gen.plugins`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.multimodal_gen.runtime.distributed.cfg_policy import CFGPolicy, _apply_cfg_postprocess
from torch import Tensor

from ..detection.basin_score import Probe, suspects
from ..kernels import guide
from ..kernels.state import per_sample
from .own_loop import Escape, each, judge
from .request_guidance import KEY, RequestGuidance, check_one_scale
from .scheduler_steps import steps_taken

log = logging.getLogger(__name__)
STILL = SimpleNamespace(  # a scheduler under which the latents stay what they are
    order=1,
    set_begin_index=lambda begin_index=0: None,
    scale_model_input=lambda sample, timestep: sample,
    step=lambda model_output, timestep, sample, **given: (sample,),
)
MERGED_IN = {"CFGPolicy": None, "ZImageCFGPolicy": torch.float32}  # policies known, and the dtype that each combines in
RUNTIME = "sglang.multimodal_gen.runtime"


@dataclass
class EscapePolicy(CFGPolicy):
    """SGLang's CFG policy of one denoising loop, guided by an `Escape` over the rows of the batch.

    asked: of each request of the batch, whose rows follow one another. merge: the dtype that predictions are combined in.
    `branches` are those that the next step needs. Both ranks of CFG parallelism gather the predictions, and combine them alike.
    """

    parallel_uses_serial_arithmetic: bool = True
    asked: list[RequestGuidance] = field(default_factory=list)
    merge: torch.dtype | None = None
    both: list[Any] = field(default_factory=list)
    run: Escape = field(default=None)  # type: ignore[assignment]  # of the loop, once it is begun
    predicted: list[Any] | None = None  # the predictions of a step that only judges

    @classmethod
    def of(cls, built: CFGPolicy, batch: Any, asked: list[RequestGuidance]) -> EscapePolicy:
        """The server's own policy, guided. Raises ValueError for what cannot be followed."""
        check(built, batch, asked)
        made = cls(branches=built.branches, asked=asked, merge=MERGED_IN[type(built).__name__], both=built.branches)
        made.begin(batch, len(batch.latents), batch.latents.device)
        return made

    def begin(self, batch: Any, rows: int, device: torch.device, attempt: int = 0) -> None:
        """Begin an attempt, counted from 0: each row takes its own guidance of that attempt, or of its last one."""
        guidance = []
        for asked in self.asked:
            tried = asked.attempts
            guidance += [tried[min(attempt, len(tried) - 1)].guidance] * (rows // len(self.asked))
        timesteps, noise, step = steps_taken(batch.scheduler, batch.timesteps)
        self.run = Escape(guidance, timesteps, rows, device, step, noise)
        self._need()

    def combine(
        self, predictions: list[Any], batch: Any, cfg_scale: float, pipeline_config: Any, *, cfg_parallel: bool = False
    ) -> Any:
        """The guided prediction, or a tuple of them, from those of `branches`; the first of a tuple is what is judged."""
        if self.predicted is not None:
            self.predicted = predictions
            return predictions[0]
        made = [one if isinstance(one, tuple) else (one,) for one in predictions]
        run = self.run
        if len(self.branches) == 1:
            guided = [run(made[0][0], None, dtype=self.merge), *made[0][1:]]
        else:
            cond, uncond = made
            first = run(uncond[0], cond[0], dtype=self.merge)
            own = _apply_cfg_postprocess(first, cond[0].to(first.dtype), batch, pipeline_config)
            guided = [torch.where(per_sample(run.weight, first) > 1, own.to(first.dtype), first)]
            guided += [guide(u, c, run.weight)[0] for u, c in zip(uncond[1:], cond[1:], strict=True)]
        self._need()
        return guided[0] if len(guided) == 1 else tuple(guided)

    def _need(self) -> None:
        """Set `branches` to those that the next step needs; to both after the last."""
        branch = "both" if self.run.done else self.run.branch()
        self.branches = [one for one in self.both if branch in ("both", "cond" if one.is_conditional else "uncond")]


def check(built: CFGPolicy, batch: Any, asked: list[RequestGuidance]) -> None:
    """Raises ValueError, before the first step, for a batch whose guidance cannot be followed."""
    guidance = each([attempt.guidance for one in asked for attempt in one.attempts])
    if type(built).__name__ not in MERGED_IN:
        raise ValueError(f"this model combines predictions by its own {type(built).__name__}: {KEY} cannot guide it")
    if [one.is_conditional for one in built.branches] != [True, False]:
        raise ValueError(
            f"{KEY} guides by two predictions, and this request makes {len(built.branches)}: give a negative_prompt, which may "
            "be empty, and a guidance_scale (or true_cfg_scale) above 1; the guidance's own scale counts"
        )
    check_one_scale(batch)
    if batch.cfg_gate_step is not None and batch.cfg_gate_step < 1:
        raise ValueError(f"cfg_gate_step is {batch.cfg_gate_step}, which {KEY} cannot follow: use Guidance's interval")
    if (batch.guidance_rescale or batch.cfg_normalization) and guidance[0].rule != "cfg":
        raise ValueError(f"guidance_rescale and cfg_normalization stand beside the rule {guidance[0].rule!r}: give one")
    judged = any(one.judge for one in asked)
    if getattr(batch, "did_sp_shard_latents", False) and (judged or any(one.until and not one.timed for one in guidance)):
        raise ValueError(
            "latents are shared out between ranks, each of which sees a part of the noise gap: use At(timestep=...)"
        )
    if judged:
        Probe.of(batch.scheduler)
        if getattr(batch, "enable_teacache", False) or getattr(batch, "enable_spectrum", False):
            raise ValueError("enable_teacache and enable_spectrum keep parts of earlier predictions: pictures cannot be judged")
    if any(len(one.attempts) > 1 for one in asked) and (batch.image_latent is not None or batch.return_trajectory_latents):
        raise ValueError(
            "a guard begins again from noise, and this request has an image or wants its trajectory: name plain guidance"
        )


def asked_of(batch: Any) -> list[RequestGuidance]:
    """Return what the requests of a batch ask for; an empty list if the batch is to be sampled as the server does."""
    return [RequestGuidance.by(one) for one in named_by(batch)]


def named_by(batch: Any) -> list[Any]:
    """Return what the requests of a batch have named, as it was given."""
    named = batch.extra.get(KEY) or [(batch.extra.get("diffusers_kwargs") or {}).get(KEY)]
    return [one for one in named if one is not None]


def built(original: Callable[..., CFGPolicy], policy: CFGPolicy, batch: Any, *given: Any, **named: Any) -> CFGPolicy:
    """Around `CFGPolicy.build`: the policy of a loop, guided where the batch's requests ask for it."""
    made = original(policy, batch, *given, **named)
    asked = [] if batch.is_warmup else asked_of(batch)
    return EscapePolicy.of(made, batch, asked) if asked else made


def denoised(original: Callable[..., Any], stage: Any, ctx: Any, batch: Any, server_args: Any, **named: Any) -> Any:
    """Around `DenoisingStage._run_denoising_loop`: judge pictures, and denoise a guard's suspect ones again."""
    policy = ctx.cfg_policy
    if not isinstance(policy, EscapePolicy):
        if asked_of(batch) and not batch.is_warmup:
            raise ValueError(f"this model builds its own {type(policy).__name__}: {KEY} cannot guide it")
        return original(stage, ctx, batch, server_args, **named)
    if getattr(stage, "_cache_dit_enabled", False):
        raise ValueError(
            f"cache-dit tells the two predictions apart by counting the network's calls, and {KEY} leaves some out: set "
            "enable_cache_dit to false"
        )
    rows = [one for one in policy.asked for _ in range(len(ctx.latents) // len(policy.asked))]
    result = original(stage, ctx, batch, server_args, **named)
    for line in policy.run.warnings():
        log.warning(f"{KEY}: request {batch.request_id}: {line}")
    entries = [facts(policy, i) for i in range(len(rows))]
    attempt, again = 0, [one.judge for one in rows]
    while any(again):
        scores = judged(partial(original, stage), ctx, batch, server_args).tolist()
        for i in (i for i, asked in enumerate(again) if asked):
            suspect = bool(suspects(scores[i], rows[i].attempts[attempt].threshold))
            entries[i] = {**facts(policy, i), "score": scores[i], "suspect": suspect, "attempts": attempt + 1}
            again[i] = suspect and attempt + 1 < len(rows[i].attempts)
        if any(again):
            attempt, kept = attempt + 1, ctx.latents
            ctx.latents = next_noise(kept, batch)
            policy.begin(batch, len(rows), kept.device, attempt)
            original(stage, ctx, batch, server_args, **named)
            ctx.latents = torch.where(per_sample(torch.tensor(again, device=kept.device), kept), ctx.latents, kept)
    batch.usage = {**(batch.usage or {}), KEY: entries}
    for i, entry in enumerate(entries):
        shown = ", ".join(f"{name} {value}" for name, value in entry.items() if name != "noise_gap")
        level = logging.WARNING if entry.get("suspect") else logging.INFO
        log.log(level, f"{KEY}: request {batch.request_id}, picture {i}: {shown}")
    return result


def facts(policy: EscapePolicy, row: int) -> dict[str, Any]:
    """Return what a response says of a picture's guidance; None for a gap that was not computed."""
    run = policy.run
    gaps = [None if math.isnan(gap) else gap for gap in run.noise_gap[row].tolist()]
    return {"transition_step": int(run.transition_step[row]), "noise_gap": gaps}


def next_noise(like: Tensor, batch: Any) -> Tensor:
    """Return the next initial noise, (B, ...), from the rows' generators, which have drawn the first already."""
    given = batch.generator if isinstance(batch.generator, list) else [batch.generator] * len(like)
    drawn = [torch.randn(one.shape, generator=rng, device=rng.device) for one, rng in zip(like, given, strict=True)]
    return torch.stack(drawn).to(like) * getattr(batch.scheduler, "init_noise_sigma", 1.0)


def judged(loop: Callable[..., Any], ctx: Any, batch: Any, server_args: Any) -> Tensor:
    """(B,) float32 on the CPU: the basin scores of a finished loop's latents.

    loop: the stage's own; one step of it, under a scheduler that does nothing, makes both predictions.
    """
    asking = replace(ctx.cfg_policy, branches=ctx.cfg_policy.both, predicted=[])

    def predict(x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        one = copy.copy(ctx)
        one.scheduler, one.latents, one.cfg_policy, one.timesteps = STILL, x, asking, timesteps[:1].to(ctx.timesteps)
        one.num_inference_steps, one.extra = 1, dict(ctx.extra)
        loop(one, batch, server_args, collect_trajectory=False)
        cond, uncond = (made[0] if isinstance(made, tuple) else made for made in asking.predicted or ())
        return uncond, cond

    return judge(predict, Probe.of(batch.scheduler), ctx.latents, batch.seeds).score


def compared(original: Callable[..., Any], scheduler: Any, value: Any) -> Any:
    """Around `Scheduler._freeze_signature_value`: requests whose guidance alone differs may share a batch, under one rule."""
    if isinstance(value, Mapping) and KEY in value:
        with suppress(ValueError):  # a request that is refused later stands alone
            value = {**value, KEY: RequestGuidance.by(value[KEY]).attempts[0].guidance.rule}
    return original(scheduler, value)


def merged(result: Any, scheduler: Any, reqs: Sequence[Any]) -> Any:
    """After `Scheduler._try_merge_generation_reqs`: the batch knows what each of its requests asks for."""
    named = [(one.extra.get("diffusers_kwargs") or {}).get(KEY) for one in reqs]
    if result is not None and len(reqs) > 1 and all(one is not None for one in named):
        result.extra[KEY] = named
    return result


def split(result: Any, scheduler: Any, output_batch: Any, reqs: Sequence[Any]) -> Any:
    """After `Scheduler._split_batched_output`: each response has the entries of its own pictures."""
    entries = (getattr(output_batch, "usage", None) or {}).get(KEY)
    if result is not None and entries is not None:
        start = 0
        for one, req in zip(result, reqs, strict=True):
            end = start + req.num_outputs_per_prompt
            one.usage, start = {**(one.usage or {}), KEY: entries[start:end]}, end
    return result


def joined(original: Callable[..., Any], merged: Any, output_batch: Any) -> None:
    """Around `GPUWorker._merge_expanded_singletons`: a request's pictures that were made one by one keep their entries all."""
    entries = (merged.usage or {}).get(KEY, []) + (output_batch.usage or {}).get(KEY, [])
    original(merged, output_batch)
    if entries:
        merged.usage[KEY] = entries


def executed(original: Callable[..., Any], worker: Any, req: Any, *, return_req: bool, **named: Any) -> Any:
    """Around `GPUWorker._execute_forward_common`: log that nothing was guided, where a request has named guidance."""
    output = original(worker, req, return_req=return_req, **named)
    if named_by(req) and not (req.is_warmup or return_req or output.error or KEY in (output.usage or {})):
        log.warning(
            f"{KEY}: request {req.request_id} named guidance, and nothing was guided by it: its model has a denoising loop of "
            "its own, or runs by the diffusers backend"
        )
    return output


def register() -> None:
    """The plugin: what the server calls in each of its processes, before it starts."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    stage, scheduler = f"{RUNTIME}.pipelines_core.stages.denoising.DenoisingStage", f"{RUNTIME}.managers.scheduler.Scheduler"
    worker = f"{RUNTIME}.managers.gpu_worker.GPUWorker"
    HookRegistry.register(f"{RUNTIME}.distributed.cfg_policy.CFGPolicy.build", built, HookType.AROUND)
    HookRegistry.register(f"{stage}._run_denoising_loop", denoised, HookType.AROUND)
    HookRegistry.register(f"{scheduler}._freeze_signature_value", compared, HookType.AROUND)
    HookRegistry.register(f"{scheduler}._try_merge_generation_reqs", merged, HookType.AFTER)
    HookRegistry.register(f"{scheduler}._split_batched_output", split, HookType.AFTER)
    HookRegistry.register(f"{worker}._merge_expanded_singletons", joined, HookType.AROUND)
    HookRegistry.register(f"{worker}._execute_forward_common", executed, HookType.AROUND)
