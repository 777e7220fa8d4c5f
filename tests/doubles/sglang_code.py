"""Where `import sglang...` finds the stand-in of `sglang_server`, or SGLang-Diffusion's own code.

That is, from the wheel: `cfg_policy.py`, `hook_registry.py`, the functions of `cfg_parallel_utils.py`, and these methods of
others: `DenoisingStage`'s loop, step and prediction; `Scheduler`'s of signature, merging and splitting.
"""

import copy
import dataclasses
import importlib
import logging
import sys
import time
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace

import own_code
import sglang_server
import torch
from sglang_server import RANKS, Admission, Loop, Worker, all_gather

RUNTIME = "sglang.multimodal_gen.runtime"
POLICY, STAGE, SCHEDULER = (
    f"{RUNTIME}.{name}" for name in ("distributed.cfg_policy", "pipelines_core.stages.denoising", "managers.scheduler")
)
WORKER = f"{RUNTIME}.managers.gpu_worker"
STEPPING = ["_predict_noise_with_cfg", "_run_denoising_step", "_run_denoising_loop", "_before_denoising_loop"]
STEPPING += ["_reset_scheduler_loop_state"]
MERGING = ["_freeze_signature_value", "_sampling_param_signature_items", "_diffusers_kwargs_signature_value"]
MERGING += ["_build_dynamic_batch_signature", "_try_merge_generation_reqs", "_count_first_dim", "_slice_batched_value"]
MERGING += ["_split_batched_output"]


@contextmanager
def installed(code, monkeypatch):
    """`basinescape.hosts.sglang`, with the stand-in or the package's own code under it, and its hooks applied."""
    names = dict(vars(sglang_server))
    policy, stage, scheduler, registry, worker = (ModuleType(name) for name in (POLICY, STAGE, SCHEDULER, "plugins", WORKER))
    if code == "stand-in":
        for made in (policy, stage, scheduler, registry, worker):
            vars(made).update({name: value for name, value in names.items() if not name.startswith("__")})
        kept = [sglang_server.CFGPolicy, sglang_server.DenoisingStage, sglang_server.Scheduler, sglang_server.GPUWorker]
        before = {one: dict(vars(one)) for one in kept}
        sglang_server.HookRegistry._hooks = []
    else:
        before = {}
        policy = own_code.find("sglang", "multimodal_gen/runtime/distributed/cfg_policy.py")
        runtime, srt = policy.parent.parent, policy.parents[3] / "srt"
        registry = own_code.module(srt / "plugins/hook_registry.py", f"{RUNTIME}.platforms.plugins")
        policy = own_policy(policy, monkeypatch)
        stage = own_stage(runtime, policy)
        known = names | {"logger": logging.getLogger(__name__), "deepcopy": copy.deepcopy, "dataclasses": dataclasses}
        known |= {"List": list, "normalize_output_seeds": lambda seed, num_outputs_per_prompt: [seed]}
        path = runtime / "managers/scheduler.py"
        scheduler = own_code.parts(path, [f"Scheduler.{name}" for name in MERGING], known)
        worker = own_code.parts(runtime / "managers/gpu_worker.py", ["GPUWorker._merge_expanded_singletons"], known)
        scheduler.Scheduler = type("Scheduler", (scheduler.Scheduler, Admission), {})
        worker.GPUWorker = type("GPUWorker", (worker.GPUWorker, Worker), {})
    found = {WORKER: worker, POLICY: policy, STAGE: stage, SCHEDULER: scheduler, f"{RUNTIME}.platforms.plugins": registry}
    for name in list(found):
        for i in range(1, name.count(".") + 1):
            found.setdefault(".".join(name.split(".")[:i]), ModuleType(name))
    for name, made in found.items():
        made.__path__ = getattr(made, "__path__", [])
        monkeypatch.setitem(sys.modules, name, made)
    for name in found:  # `pkgutil.resolve_name` goes from attribute to attribute
        home, _, own = name.rpartition(".")
        if home:
            monkeypatch.setattr(found[home], own, found[name], raising=False)
    monkeypatch.delitem(sys.modules, "basinescape.hosts.sglang", raising=False)
    ours = importlib.import_module("basinescape.hosts.sglang")
    ours.register()
    registry.HookRegistry.apply_hooks()
    try:
        yield SimpleNamespace(
            ours=ours, policy=policy, stage=stage.DenoisingStage, scheduler=scheduler.Scheduler, worker=worker.GPUWorker
        )
    finally:
        sys.modules.pop("basinescape.hosts.sglang", None)
        for one, own in before.items():
            for name in vars(one).keys() - own.keys():
                delattr(one, name)
            for name, value in own.items():
                if (callable(value) or isinstance(value, staticmethod)) and not name.startswith("__"):
                    setattr(one, name, value)


def own_policy(path, monkeypatch):
    """The file as a module: it is known by name while its dataclasses are made."""
    monkeypatch.setitem(sys.modules, POLICY, ModuleType(POLICY))
    return own_code.module(path, POLICY)


def own_stage(runtime, policy):
    ranks = {
        "get_local_torch_device": lambda: torch.device("cpu"),
        "get_classifier_free_guidance_rank": lambda: RANKS.rank,
        "get_classifier_free_guidance_world_size": lambda: 2,
        "cfg_model_parallel_all_gather": all_gather,
        "_logged_dispatch_keys": set(),
        "logger": logging.getLogger(__name__),
        "dataclasses": dataclasses,
    }
    shared = vars(policy) | ranks
    names = ["_run", "run_cfg_parallel", "run_two_branch_cfg_parallel", "dispatch_branches"]
    parallel = own_code.parts(runtime / "distributed/cfg_parallel_utils.py", names, shared)
    context = {"set_forward_context": lambda **given: nullcontext(), "maybe_nvtx_range": lambda *given: nullcontext()}
    context |= dict.fromkeys(("precision_autocast_context", "StageProfiler"), lambda *given, **named: nullcontext())
    context |= {"time": time}
    context |= {name: getattr(parallel, name) for name in names}
    made = own_code.parts(
        runtime / "pipelines_core/stages/denoising.py", [f"DenoisingStage.{name}" for name in STEPPING], shared | context
    )
    made.DenoisingStage = type("DenoisingStage", (made.DenoisingStage, Loop), {})
    return made
