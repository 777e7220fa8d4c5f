"""SGLang-Diffusion's contract with a plugin, as a stand-in, in its names: sglang 0.5.23, read in November 2026.

`sglang_code.installed` puts it, or the package's own code, where `import sglang...` finds it.
"""

import copy
import dataclasses
import functools
import inspect
import sys
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch

RANKS = threading.local()  # .rank, and .group of those that run together


# ------------------------------------------------------------------------------------------------ the policy of a request


@dataclass
class CFGBranch:
    name: str
    is_conditional: bool
    kwargs: dict

    def configure_batch(self, batch):
        batch.is_cfg_negative = not self.is_conditional


@dataclass
class CFGPolicy:
    branches: list = field(default_factory=list)
    parallel_uses_serial_arithmetic: bool = False

    def build(self, batch, image_kwargs, pos_cond_kwargs, neg_cond_kwargs):
        made = [CFGBranch("conditional", True, image_kwargs | pos_cond_kwargs)]
        if batch.do_classifier_free_guidance:
            made.append(CFGBranch("unconditional", False, image_kwargs | neg_cond_kwargs))
        return dataclasses.replace(self, branches=made)

    def combine(self, predictions, batch, cfg_scale, pipeline_config, *, cfg_parallel=False):
        if len(predictions) == 1:
            return predictions[0]
        cond, uncond = (_wrap(one) for one in predictions)
        made = [u + cfg_scale * (c - u) for c, u in zip(cond, uncond, strict=True)]
        made[0] = _apply_cfg_postprocess(made[0], cond[0], batch, pipeline_config)
        return _unwrap(tuple(made))


def _wrap(made):
    return made if isinstance(made, tuple) else (made,)


def _unwrap(made):
    return made[0] if len(made) == 1 else made


def _apply_cfg_postprocess(noise_pred, noise_pred_cond, batch, pipeline_config):
    if batch.guidance_rescale > 0:
        dims = list(range(1, noise_pred.ndim))
        ratio = noise_pred_cond.std(dims, keepdim=True) / noise_pred.std(dims, keepdim=True)
        noise_pred = batch.guidance_rescale * noise_pred * ratio + (1 - batch.guidance_rescale) * noise_pred
    return pipeline_config.postprocess_cfg_noise(batch, noise_pred, noise_pred_cond)


# ----------------------------------------------------------------------------------------------- what a plugin can register


class HookType(Enum):
    AFTER, AROUND = "after", "around"


class HookRegistry:
    """Hooks by dotted names of methods: `around(original, *args)`, `after(result, *args)`."""

    _hooks = []  # noqa: RUF012

    @classmethod
    def register(cls, target, hook, hook_type):
        cls._hooks.append((target, hook, hook_type))

    @classmethod
    def apply_hooks(cls):
        for target, hook, hook_type in cls._hooks:
            home, owner, name = target.rsplit(".", 2)
            made = getattr(sys.modules[home], owner)
            wrapped = cls._wrapped(getattr(made, name), hook, hook_type)
            setattr(
                made, name, staticmethod(wrapped) if isinstance(inspect.getattr_static(made, name), staticmethod) else wrapped
            )

    @staticmethod
    def _wrapped(original, hook, hook_type):
        @functools.wraps(original)
        def wrapper(*args, **named):
            if hook_type is HookType.AROUND:
                return hook(original, *args, **named)
            result = original(*args, **named)
            changed = hook(result, *args, **named)
            return result if changed is None else changed

        return wrapper


# -------------------------------------------------------------------------------------------------------- the denoising loop


@dataclass
class DenoisingContext:
    scheduler: Any
    timesteps: torch.Tensor
    latents: torch.Tensor
    cfg_policy: Any
    target_dtype: torch.dtype = torch.float32
    extra_step_kwargs: dict = field(default_factory=dict)
    seq_len: Any = None
    reserved_frames_mask: Any = None
    guidance: Any = None
    z: Any = None
    num_inference_steps: int = 0
    num_warmup_steps: int = 0
    autocast_enabled: bool = False
    is_warmup: bool = False
    extra: dict = field(default_factory=dict)


class Loop:
    """The stage around the parts that matter: its network is `network(latents, timestep (), prompt (B, ...))`."""

    current_use_nvtx = False
    _apply_nvtx_gate = _init_cfg_gate_state = _record_trajectory = _finish_active_component_use = log_info = step_profile = (
        lambda *given: None
    )
    progress_bar = staticmethod(lambda **given: nullcontext(SimpleNamespace(update=lambda: None)))

    def __init__(self, network):
        self.network, self.calls = network, []

    def expand_timestep_before_forward(self, batch, server_args, t_device, target_dtype, seq_len, mask):
        return t_device

    def post_forward_for_ti2v_task(self, batch, server_args, mask, latents, z):
        return latents

    def _prepare_step_state(self, ctx, batch, server_args, step_index, t_host, timesteps_cpu):
        names = {"t_device": ctx.timesteps[step_index], "current_model": self.network, "attn_metadata": None}
        return SimpleNamespace(step_index=step_index, t_host=t_host, current_guidance_scale=batch.guidance_scale, **names)

    def _predict_noise(self, current_model, latent_model_input, timestep, target_dtype, guidance, prompt):
        self.calls.append(prompt)
        return current_model(latent_model_input, timestep, prompt)

    def _run_denoising_loop(self, ctx, batch, server_args, *, collect_trajectory=True):
        ctx.scheduler._step_index = None
        timesteps = ctx.timesteps.cpu()
        for i, t in enumerate(timesteps):
            step = self._prepare_step_state(ctx, batch, server_args, i, t, timesteps)
            self._run_denoising_step(ctx, step, batch, server_args)
        return timesteps

    def forward(self, batch, server_args, policy):
        made = policy.build(batch, {}, {"prompt": batch.prompts}, {"prompt": torch.zeros_like(batch.prompts)})
        ctx = DenoisingContext(batch.scheduler, batch.timesteps, batch.latents, made, num_inference_steps=len(batch.timesteps))
        self._run_denoising_loop(ctx, batch, server_args)
        batch.latents = ctx.latents
        return batch


class DenoisingStage(Loop):
    def _run_denoising_step(self, ctx, step, batch, server_args):
        noise_pred = self._predict_noise_with_cfg(ctx, step, batch, server_args)
        ctx.latents = ctx.scheduler.step(
            model_output=noise_pred, timestep=step.t_device, sample=ctx.latents, return_dict=False, **ctx.extra_step_kwargs
        )[0]

    def _predict_noise_with_cfg(self, ctx, step, batch, server_args):
        policy, scale = ctx.cfg_policy, batch.guidance_scale

        def predict(branch):
            branch.configure_batch(batch)
            given = ctx.scheduler.scale_model_input(ctx.latents, step.t_device), step.t_device
            return self._predict_noise(step.current_model, *given, ctx.target_dtype, None, **branch.kwargs)

        if server_args.enable_cfg_parallel:
            if len(policy.branches) == 2 and not policy.parallel_uses_serial_arithmetic:
                raise AssertionError("the stock two-rank combination, which does not call combine")
            return policy.combine(
                run_cfg_parallel(policy, predict), batch, scale, server_args.pipeline_config, cfg_parallel=True
            )
        return policy.combine([predict(one) for one in policy.branches], batch, scale, server_args.pipeline_config)


def run_cfg_parallel(policy, predict):
    """Branch i is made by rank i; a rank without one makes the first for its shape."""
    own = predict(policy.branches[RANKS.rank if RANKS.rank < len(policy.branches) else 0])
    return all_gather(own)[: len(policy.branches)]


def all_gather(tensor, dim=0, separate_tensors=True):
    group = RANKS.group
    group.slots[RANKS.rank] = tensor.clone()
    group.barrier.wait()
    made = list(group.slots)
    group.barrier.wait()
    return made


def on_two_ranks(work):
    """[work(0), work(1)], side by side."""
    group, made = SimpleNamespace(slots=[None, None], barrier=threading.Barrier(2, timeout=30)), [None, None]

    def one(rank):
        RANKS.rank, RANKS.group = rank, group
        made[rank] = work(rank)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


# ------------------------------------------------------------------------------------------------- the scheduler of requests


@dataclass
class SamplingParams:
    prompt: Any = field(default=None, metadata={"batch_sig_exclude": True})
    seed: int = field(default=0, metadata={"batch_sig_exclude": True})
    num_outputs_per_prompt: int = 1
    guidance_scale: float = 4.0
    diffusers_kwargs: dict | None = None


@dataclass
class OutputBatch:
    output: Any = None
    audio: Any = None
    audio_sample_rate: Any = None
    fps: Any = None
    action_pred: Any = None
    trajectory_timesteps: Any = None
    trajectory_latents: Any = None
    trajectory_decoded: Any = None
    error: Any = None
    output_file_paths: Any = None
    output_image_bytes: Any = None
    metrics: Any = None
    metrics_list: Any = None
    noise_pred: Any = None
    peak_memory_mb: float = 0.0
    usage: dict | None = None


class Admission:
    """What stands around the parts that matter."""

    server_args = SimpleNamespace(pipeline_config=SimpleNamespace(supports_sequential_dit_inference=lambda: False))

    def _can_dynamic_batch(self, base_req, candidate_req):
        return self._build_dynamic_batch_signature(base_req) == self._build_dynamic_batch_signature(candidate_req)

    def _pi05_segments_enabled(self):
        return False


class Scheduler(Admission):
    def _freeze_signature_value(self, value):
        return {name: self._freeze_signature_value(one) for name, one in value.items()} if isinstance(value, dict) else value

    def _build_dynamic_batch_signature(self, req):
        return req.guidance_scale, self._freeze_signature_value(req.extra.get("diffusers_kwargs"))

    def _try_merge_generation_reqs(self, reqs):
        if not all(self._can_dynamic_batch(reqs[0], one) for one in reqs[1:]):
            return None
        made = copy.deepcopy(reqs[0])
        made.prompt = [one.prompt for one in reqs]
        made.extra["dynamic_batch_seeds"] = [one.seed for one in reqs]
        return made

    def _split_batched_output(self, output_batch, reqs):
        return [OutputBatch(output=output_batch.output[i : i + 1]) for i in range(len(reqs))]


class Worker:
    def _execute_forward_common(self, req, *, forward_fn, return_req, **named):
        """For each request: its output, or its error."""
        try:
            result = forward_fn()
        except ValueError as error:
            return OutputBatch(error=str(error))
        return result if return_req else OutputBatch(usage=result.usage)


class GPUWorker(Worker):
    @staticmethod
    def _merge_expanded_singletons(merged, output_batch):
        """For each of a request's outputs that were made one by one."""
        merged.usage = {**(merged.usage or {}), **(output_batch.usage or {})}


class Req(SimpleNamespace):
    """A request, or a batch of them; what it does not have is its sampling parameters'."""

    def __getattr__(self, name):
        if name.startswith("__") or "sampling_params" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.sampling_params, name)
