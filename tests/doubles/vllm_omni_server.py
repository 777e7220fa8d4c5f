"""vLLM-Omni's contract with a plugin, as a stand-in, in its names: vllm-omni 0.30.0, read in November 2026.

`installed("stand-in")` puts it where `import vllm_omni...` finds it; `installed("0.30.0")` puts two files of the package there,
`diffusion/distributed/cfg_parallel.py` and `diffusion/worker/input_batch.py`, with a stand-in of what they import.
"""

import importlib
import logging
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import own_code
import torch

CFG = "vllm_omni.diffusion.distributed.cfg_parallel"
BATCH = "vllm_omni.diffusion.worker.input_batch"
RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"
SCHEDULER = "vllm_omni.diffusion.sched.base_scheduler"
BESIDE = {
    "vllm.logger": {"init_logger": logging.getLogger},
    "vllm.sequence": {"IntermediateTensors": type("IntermediateTensors", (), {})},
    "vllm_omni.diffusion.distributed.parallel_state": {
        "get_cfg_group": None,
        "get_classifier_free_guidance_rank": lambda: 0,
        "get_classifier_free_guidance_world_size": lambda: 1,
        "is_cfg_group_initialized": lambda: False,
    },
    "vllm_omni.diffusion.interaction.modality_handlers.prompt": {"prompt_update_versions": lambda states: ()},
}


@dataclass
class SamplingParams:
    true_cfg_scale: float = 4.0
    guidance_scale: float = 0.0
    guidance_scale_2: float | None = None
    cfg_normalize: bool = False
    extra_args: dict = field(default_factory=dict)


@dataclass
class StepRequestState:
    """A request under `--step-execution`, from its first step to its last."""

    request_id: str
    sampling: SamplingParams
    prompt_embeds: torch.Tensor
    latents: torch.Tensor
    scheduler: Any
    timesteps: torch.Tensor
    step_index: int = 0
    do_true_cfg: bool = True
    prompt_embeds_mask: Any = None
    negative_prompt_embeds: Any = None
    negative_prompt_embeds_mask: Any = None
    guidance: Any = None
    img_shapes: Any = None
    txt_seq_lens: Any = None
    negative_txt_seq_lens: Any = None
    extra: dict = field(default_factory=dict)

    @property
    def current_timestep(self):
        return self.timesteps[self.step_index]


def mixin():
    """A class of its own for each test: the plugin changes it."""

    class CFGParallelMixin:
        def predict_noise_maybe_with_cfg(
            self,
            do_true_cfg,
            true_cfg_scale,
            positive_kwargs,
            negative_kwargs,
            cfg_normalize=True,
            output_slice=None,
            kwargs=None,
        ):
            cond = self.predict_noise(**positive_kwargs)
            if not do_true_cfg:
                return cond
            return self.combine_cfg_noise((cond,), (self.predict_noise(**negative_kwargs),), true_cfg_scale, cfg_normalize)

        def cfg_normalize_function(self, noise_pred, comb_pred):
            return comb_pred * (noise_pred.norm(dim=-1, keepdim=True) / comb_pred.norm(dim=-1, keepdim=True))

        def combine_cfg_noise(self, positive_noise_pred, negative_noise_pred, true_cfg_scale, cfg_normalize=False, kwargs=None):
            cond, uncond = (one[0] if isinstance(one, tuple) else one for one in (positive_noise_pred, negative_noise_pred))
            made = uncond + true_cfg_scale * (cond - uncond)
            return self.cfg_normalize_function(cond, made) if cfg_normalize else made

        def predict_noise(self, **given):
            return self.transformer(**given)[0]

    return CFGParallelMixin


def input_batch():
    class InputBatch(SimpleNamespace):
        @classmethod
        def make_batch(cls, states, idx_mapping=None, cached_batch=None):
            scales = {(one.do_true_cfg, one.sampling.true_cfg_scale, one.sampling.cfg_normalize) for one in states}
            if len(scales) > 1:
                raise ValueError("Mixed CFG settings in one diffusion batch are not supported.")
            ((do_true_cfg, scale, normalize),) = scales
            rows = [one.current_timestep.expand(len(one.latents)) for one in states]
            return cls(
                states=states,
                latents=torch.cat([one.latents for one in states]),
                timesteps=torch.cat(rows),
                prompt_embeds=torch.cat([one.prompt_embeds for one in states]),
                do_true_cfg=do_true_cfg,
                true_cfg_scale=scale,
                cfg_normalize=normalize,
            )

    return InputBatch


def runner():
    class DiffusionModelRunner:
        """What a model runner does with its pipeline: all steps of a batch, or one step of whoever is there."""

        def __init__(self, pipeline, cache_backend="none"):
            self.pipeline, self.od_config = pipeline, SimpleNamespace(cache_backend=cache_backend)

        def _execute_request_list(self, reqs, **named):
            return self.pipeline.forward(reqs)

        def execute_stepwise(self, states):
            sys_batch = sys.modules[BATCH].InputBatch.make_batch(states)
            made, start = self.pipeline.denoise_step(sys_batch, states=states), 0
            for one in states:
                end = start + len(one.latents)
                one.latents = one.scheduler.step(made[start:end], one.current_timestep, one.latents, return_dict=False)[0]
                one.step_index, start = one.step_index + 1, end

    return DiffusionModelRunner


def scheduler(code):
    """A class of its own for each test: the admission of requests."""

    class BaseScheduler:
        def __init__(self):
            self._request_states, self._kv_draining_requests, self._waiting = {}, {}, []

        def _make_request_state(self, request_id, request):
            return SimpleNamespace(request_id=request_id, request=request)

        def add_request(self, request):
            return self._add_request_with_request_id(request.request_id, request)

        def _add_request_with_request_id(self, request_id, request):
            self._request_states[request_id] = self._make_request_state(request_id, request)
            self._waiting.append(request_id)
            return request_id

    if code != "stand-in":
        path = own_code.find("vllm_omni", "diffusion/sched/base_scheduler.py")
        names = [f"BaseScheduler.{name}" for name in ("add_request", "_add_request_with_request_id")]
        own = own_code.parts(path, names, {"time": time, "logger": logging.getLogger(__name__)}).BaseScheduler
        for name in ("add_request", "_add_request_with_request_id"):
            setattr(BaseScheduler, name, vars(own)[name])
    return BaseScheduler


@contextmanager
def installed(code, monkeypatch):
    """`basinescape.hosts.vllm_omni`, with the stand-in or the package's own files under it, and its plugin registered."""
    found = {name: ModuleType(name) for name in (CFG, BATCH, RUNNER, SCHEDULER, "vllm_omni.diffusion.worker.utils", *BESIDE)}
    for name, given in BESIDE.items():
        vars(found[name]).update(given)
    found["vllm_omni.diffusion.worker.utils"].StepRequestState = StepRequestState
    found[RUNNER].DiffusionModelRunner, found[SCHEDULER].BaseScheduler = runner(), scheduler(code)
    for name in list(found):
        for i in range(1, name.count(".") + 1):
            found.setdefault(".".join(name.split(".")[:i]), ModuleType(name)).__path__ = []
    for name, made in found.items():
        monkeypatch.setitem(sys.modules, name, made)
    if code == "stand-in":
        found[CFG].CFGParallelMixin, found[BATCH].InputBatch = mixin(), input_batch()
    else:
        for name in (CFG, BATCH):
            path = own_code.find("vllm_omni", "/".join(name.split(".")[1:]) + ".py")
            monkeypatch.setitem(sys.modules, name, own_code.module(path, name))
    monkeypatch.delitem(sys.modules, "basinescape.hosts.vllm_omni", raising=False)
    ours = importlib.import_module("basinescape.hosts.vllm_omni")
    ours.register()
    ours.register()  # more than once changes nothing
    try:
        yield SimpleNamespace(
            mixin=sys.modules[CFG].CFGParallelMixin,
            runner=found[RUNNER].DiffusionModelRunner,
            scheduler=found[SCHEDULER].BaseScheduler,
        )
    finally:
        sys.modules.pop("basinescape.hosts.vllm_omni", None)
