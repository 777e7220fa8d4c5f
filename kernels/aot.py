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
from pathlib import Path

from .dispatch import INTERPRETED, triton
from .guide import BLOCKS, OPTIONS, TILE, guide_kernel

TARGETS = ("sm_80", "sm_90", "sm_100")
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


def _compile(kernel: object, arguments: dict[str, object], target: str, warps: int) -> bytes:
    """The cubin of `kernel` for `target`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    # Pointers, sizes and strides are multiples of 16; only the number of tiles is any integer.
    divisible = [i for i, (name, kind) in enumerate(types.items()) if kind[0] in "*i" and name != "tiles"]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in divisible})
    capability = int(target.removeprefix("sm_"))
    options = {"num_warps": warps, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def resources(cubin: bytes) -> dict[str, int]:
    """registers and spill_bytes (local memory) of a thread, and load_bits, the widest load from global memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
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
    configurations = [(block, warps, False) for block, warps in BLOCKS] + [(*TILE, True)]
    for target in targets:
        for dtype in DTYPES:
            for name in ("guide", "noise_gap"):
                for block, warps, split in configurations:
                    arguments = _guide_arguments(dtype, split, name == "noise_gap") | {"BLOCK": block}
                    yield {
                        "kernel": name,
                        "block": block,
                        "split": split,
                        "dtype": dtype,
                        "target": target,
                        "num_warps": warps,
                        **resources(_compile(guide_kernel, arguments, target, warps)),
                    }


def report(targets: Sequence[str] = TARGETS) -> list[dict[str, object]]:
    """All `rows`. RuntimeError where triton is missing or interprets; subprocess.CalledProcessError if a tool fails."""
    return list(rows(targets))


def table(found: Sequence[dict[str, object]]) -> str:
    """A report as aligned text, a heading and a line a row."""
    cells = [list(found[0]), *([str(value) for value in row.values()] for row in found)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time and say what came out.")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    found = report()
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
