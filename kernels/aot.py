"""What every kernel compiles to, on a machine without a GPU: registers, spills and load width, read from the machine code.

python -m basinescape.kernels.aot [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .dispatch import INTERPRETED, triton
from .guide import guide_kernel
from .state import Column
from .step import RESIDENT, parts, step_kernel
from .tiles import OPTIONS, TILES

TARGETS = ("sm_80", "sm_90", "sm_100")
ANY_INTEGER = ("tiles", "batch", "steps", "earliest", "latest", "wait")
DTYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def _guide_arguments(dtype: str, split: bool, gap_only: bool) -> dict[str, object]:
    """Arguments of `guide_kernel` as its launcher passes them: a Triton type, or the constant that replaces it.

    The widest case: dense samples of a multiple of 16 elements, a contiguous (B,) tensor of weights.
    """
    return {
        "uncond": DTYPES[dtype],
        "cond": DTYPES[dtype],
        "weight": "fp32" if gap_only else "*fp32",
        "guided": None if gap_only else DTYPES[dtype],
        "gap": "*fp32",
        "partials": "*fp32" if split else None,
        "arrivals": "*i32" if split else None,
        "size": "i32",
        "tiles": "i32" if split else 1,
        "uncond_stride": "i32",
        "cond_stride": "i32",
        "weight_stride": None if gap_only else 1,
        "guided_stride": "i32",
    }


def _step_arguments(dtype: str, block: int, split: bool, finds: bool, meets: bool) -> dict[str, object]:
    """Arguments of `step_kernel` as its launcher passes them. The widest case: a two-step solver that scales its input."""
    return {
        "uncond": DTYPES[dtype],
        "cond": DTYPES[dtype],
        "table": "*fp32",
        "guided": None,
        "known": "*fp32" if split and finds and not meets else None,
        "model_input": DTYPES[dtype],
        "timestep": "*fp32",
        "apart": DTYPES[dtype],
        "history": "*fp32",
        "step": "*i64",
        "transition": "*i64",
        "gaps": "*fp32",
        "peak": "*fp32",
        "partials": "*fp32" if split else None,
        "arrivals": "*i32" if split else None,
        "batch": "i32",
        "steps": "i32",
        "size": "i32",
        "tiles": "i32" if split else 1,
        "uncond_stride": "i32",
        "cond_stride": "i32",
        "earliest": "i32",
        "latest": "i32",
        "keep": "fp32",
        "wait": "i32",
        "FINDS": finds,
        "MEETS": meets,
        "COLUMNS": len(Column),
        "PARTS": parts(block, getattr(torch, dtype).itemsize),
    }


@dataclass(frozen=True)
class Configuration:
    """One way a kernel is launched."""

    name: str
    kernel: object
    arguments: dict[str, object]
    block: int
    split: bool
    warps: int
    options: dict[str, object]


def configurations(dtype: str) -> Iterator[Configuration]:
    """Every way `dtype` predictions are launched."""

    sizes = [(block, warps, False) for block, warps in TILES.blocks] + [(*TILES.tile, True)]
    for name in ("guide", "noise_gap"):
        for block, warps, split in sizes:
            arguments = _guide_arguments(dtype, split, name == "noise_gap")
            yield Configuration(name, guide_kernel, arguments, block, split, warps, {})
    for block, warps, split in sizes:
        arguments = _step_arguments(dtype, block, split, finds=False, meets=False)
        yield Configuration("step", step_kernel, arguments, block, split, warps, {})
        arguments = _step_arguments(dtype, block, split, finds=True, meets=split)
        yield Configuration("step, first minimum", step_kernel, arguments, block, split, warps, RESIDENT if split else {})
    block, warps = TILES.tile
    arguments = _step_arguments(dtype, block, True, finds=True, meets=False)
    yield Configuration("step, gap known", step_kernel, arguments, block, True, warps, {})


def assembly(configuration: Configuration, target: str) -> dict[str, Any]:
    """What a kernel becomes for `target` on its way: "ptx", text, and "cubin", machine code, among others."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = configuration.arguments | {"BLOCK": configuration.block}
    types = {name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    # Pointers, sizes and strides are multiples of 16; the counts and steps are any integer.
    divisible = [i for i, (name, kind) in enumerate(types.items()) if kind[0] in "*i" and name not in ANY_INTEGER]
    source = ASTSource(configuration.kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in divisible})
    options = {"num_warps": configuration.warps, **OPTIONS, **configuration.options}
    return triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options).asm


def resources(code: bytes) -> dict[str, int]:
    """registers and spill_bytes (local memory) of a thread, and load_bits, the widest load from global memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    loads = re.findall(r"\bLDG(\.\S+)? ", text)
    return {
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "load_bits": max(_bits(modifiers) for modifiers in loads),
    }


def _bits(modifiers: str) -> int:
    """Width of a load from its SASS modifiers: .E.128 -> 128; no number means 32."""
    return max((int(bits) for bits in re.findall(r"\.[US]?(8|16|64|128|256)\b", modifiers)), default=32)


def rows(targets: Sequence[str] = TARGETS) -> Iterator[dict[str, object]]:
    """A row for each kernel, launch configuration, dtype and target, as it is compiled."""
    if triton is None or INTERPRETED:
        raise RuntimeError("compiling ahead of time needs triton, and TRITON_INTERPRET unset")
    for target in targets:
        for dtype in DTYPES:
            for launched in configurations(dtype):
                yield {
                    "kernel": launched.name,
                    "block": launched.block,
                    "split": launched.split,
                    "dtype": dtype,
                    "target": target,
                    "num_warps": launched.warps,
                    **resources(assembly(launched, target)["cubin"]),
                }


def report(targets: Sequence[str] = TARGETS) -> list[dict[str, object]]:
    """All `rows`. RuntimeError where triton is missing or interprets; subprocess.CalledProcessError if a tool fails."""
    return list(rows(targets))


def aligned(found: Sequence[dict[str, object]]) -> str:
    """Rows of equal keys as aligned text, a heading and a line a row."""
    cells = [list(found[0]), *([str(value) for value in row.values()] for row in found)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time and say what came out.")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    found = report()
    print(aligned(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
