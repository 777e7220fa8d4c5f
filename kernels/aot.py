"""Compile every kernel on a machine without a GPU, and read registers, spills and load width from the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .dispatch import INTERPRETED, Launch, recorded, triton
from .guide import launch_guide
from .rules import RULES
from .state import State
from .step import launch_step
from .table import Column

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
DTYPES = ("float32", "float16", "bfloat16")
SHAPES = ((4, 16, 16), (4, 32, 32), (4, 64, 64), (4, 128, 128))  # one for each block, and one of several tiles
BATCH, STEPS = 3, 50


def launches(dtype: str, rule: str = "apg", shapes: Sequence[tuple[int, ...]] = SHAPES) -> Iterator[tuple[str, Launch]]:
    """Yield (name, launch) for every kernel launch on `dtype` predictions. Nothing runs: the tensors are on device "meta".

    Each launch is the most general of its kind: uncond and cond are halves of one batch, the weight is a tensor, and a two-step
    solver scales the network's input. rule: a guidance rule that needs a sample's sums.
    """
    for shape in shapes:
        uncond, cond = torch.empty((2 * BATCH, *shape), dtype=getattr(torch, dtype), device="meta").chunk(2)
        gap, table = torch.empty(BATCH, device="meta"), torch.empty((STEPS, len(Column)), device="meta")
        state = State.empty(tuple(uncond.shape), STEPS, uncond.dtype, "meta", multistep=True)
        guided, step = torch.empty_like(uncond), partial(launch_step, uncond, cond, table)
        named: dict[str, Launch] = {}
        for name, call in {
            "guide": partial(launch_guide, uncond, cond, gap, guided, gap),
            "noise_gap": partial(launch_guide, uncond, cond, 0.0, None, gap),
            "guide, rule": partial(launch_guide, uncond, cond, gap, guided, gap, RULES[rule]),
            "step": partial(step, False, None, state),
            "step, first minimum": partial(step, True, None, state),
            "step, rule": partial(step, True, None, state, rule),
        }.items():
            with recorded() as made:
                call()
            for launch in made:
                kernel = launch.kernel.__name__.removesuffix("_kernel")
                what = ", rule" if launch.options.get("ALL") else ", first minimum" if launch.options.get("FINDS") else ""
                named[name if kernel in ("guide", "step", "tile") else kernel + what] = launch
        yield from named.items()


def assembly(launch: Launch, target: str) -> dict[str, Any]:
    """Return the code of every stage in compiling a launch for `target`: "ttir", "ptx", "cubin" or "amdgcn", among others."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    if target.startswith("gfx"):
        gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    kernel = launch.kernel
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)  # as Triton itself reads arguments
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, launch.options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu, options=options.__dict__).asm


def resources(code: dict[str, Any]) -> dict[str, int]:
    """Return registers and spill_bytes per thread, and load_bits of the widest global load. code: what `assembly` returned."""
    return _of_amd(code["amdgcn"]) if "amdgcn" in code else _of_nvidia(code["cubin"])


def _of_nvidia(code: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    loads = re.findall(r"\bLDG(\.\S+)? ", text)
    return {
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],  # local memory
        "load_bits": max(_bits(modifiers) for modifiers in loads),
    }


def _of_amd(text: str) -> dict[str, int]:
    """As `resources`; registers counts the vector registers."""
    used = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
    words = re.findall(r"\b(?:global|buffer)_load_(?:dword(?:x(\d))?|b(\d+))\b", text)
    return {
        "registers": used["vgpr_count"],
        "spill_bytes": used["private_segment_fixed_size"],
        "load_bits": max(int(bits) if bits else 32 * int(count or 1) for count, bits in words),
    }


def _bits(modifiers: str) -> int:
    """Width of a load from its SASS modifiers: .E.128 -> 128; no number means 32."""
    return max((int(bits) for bits in re.findall(r"\.[US]?(8|16|64|128|256)\b", modifiers)), default=32)


def rows(targets: Sequence[str] = TARGETS, dtypes: Sequence[str] = DTYPES) -> Iterator[dict[str, object]]:
    """Compile, and yield one row for each kernel, launch configuration, dtype and target.

    Raises RuntimeError where triton is missing or its interpreter is on, subprocess.CalledProcessError if a tool fails.
    """
    if triton is None or INTERPRETED:
        raise RuntimeError("compiling ahead of time needs triton, and TRITON_INTERPRET unset")
    for target in targets:
        for dtype in dtypes:
            for name, launch in launches(dtype):
                yield {
                    "kernel": name,
                    "block": launch.options.get("BLOCK"),  # None: a program adds up a sample's tiles
                    "split": launch.programs > BATCH or "BLOCK" not in launch.options,
                    "dtype": dtype,
                    "target": target,
                    "num_warps": launch.options["num_warps"],
                    **resources(assembly(launch, target)),
                }
