"""Everything there is to find out on a GPU: checks first, then under a sanitizer, then the benchmarks, into one JSON file.

python -m basinescape.bench.gpu --out FILE.json [--quick]

Each check and each bench runs in a process of its own, under a time limit: one that fails, crashes or hangs is recorded, and
the others go on. The file is written anew after each. Where compute-sanitizer is installed (`pip install
nvidia-cuda-sanitizer-api`), checks run under it, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import speed
from ..speed.timing import taken
from ..tables import tables
from .checks import CHECKS, Skipped

SAMPLER_CHECKS = ("sampler synchronisation", "sampler launches", "sampler capture", "sampler images")
NEED_DIFFUSERS = (*SAMPLER_CHECKS, "bench step", "bench images")
BENCH = "bench "
SANITIZED = {f"{check}, {tool}": (check, tool) for tool in ("memcheck", "racecheck") for check in ("guide", "batches")}
FOUND = 99  # what compute-sanitizer exits with where it has found something
# Our kernels alone, and no failed calls of the driver's: libraries ask it for what may not be there, and go on.
OURS = [f"--kernel-name=kernel_substring={kernel}" for kernel in ("guide_kernel", "step_kernel")]
WATCH = ["--error-exitcode", str(FOUND), "--report-api-errors", "no", *OURS]
LIMITS = {False: {"check": 900, "bench": 4 * 3600}, True: {"check": 300, "bench": 550}}  # seconds, by whether it is quick


def trial_names() -> list[str]:
    """Checks by their names, under a sanitizer before its tool; benches after "bench "."""
    return [*CHECKS, *SAMPLER_CHECKS, *SANITIZED, *(BENCH + name for name in speed.BENCHES)]


def sanitizer() -> str | None:
    """compute-sanitizer, of the CUDA toolkit or the package."""
    try:
        files = metadata.files("nvidia-cuda-sanitizer-api") or []
    except metadata.PackageNotFoundError:
        files = []
    packaged = [str(file.locate()) for file in files if file.match("bin/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next(iter(packaged), None)


def perform(name: str, out: Path, quick: bool) -> None:
    """Make one trial in this process and write {status, figures | error, rows} to `out`; rows as they come."""
    device, result = torch.device("cuda"), {"status": "passed", "rows": []}
    try:
        if name.startswith(BENCH):
            for row in speed.run([name.removeprefix(BENCH)], device, "quick" if quick else "cuda"):
                result["rows"].append(row)
                write(out, {**result, "status": "unfinished"})
        else:
            checks = CHECKS if name in CHECKS else import_module(".checks_sampler", __package__).CHECKS
            result["figures"] = checks[name](device)
    except Skipped as reason:
        result |= {"status": "skipped", "error": str(reason)}
    except Exception as error:
        traceback.print_exc()
        result |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    write(out, result)


def isolated(name: str, quick: bool) -> dict[str, Any]:
    """Make one trial in another process; its result, whatever becomes of it, and the seconds it took."""
    if name in NEED_DIFFUSERS and find_spec("diffusers") is None:
        return {"status": "skipped", "error": "diffusers is not installed", "rows": [], "seconds": 0.0}
    check, tool = SANITIZED.get(name, (name, None))
    watcher = []
    if tool is not None:
        if (program := sanitizer()) is None:
            return {"status": "skipped", "error": "compute-sanitizer is not installed", "rows": [], "seconds": 0.0}
        watcher = [program, "--tool", tool, *WATCH]
    limit = LIMITS[quick]["bench" if name.startswith(BENCH) else "check"]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [sys.executable, "-m", __package__, "--only", check, "--out", str(out), *(["--quick"] if quick else [])]
        code = ending([*watcher, *command], limit)
        result = json.loads(out.read_text()) if out.exists() else {"status": "unfinished", "rows": []}
    if result["status"] == "unfinished" or (code != 0 and result["status"] != "failed"):
        error = f"not done after {limit} s" if code is None else f"ended with code {code}"
        result |= {"status": "failed", "error": f"{tool} has found errors" if tool and code == FOUND else error}
    return {**result, "seconds": time.perf_counter() - start}


def ending(command: list[str], limit: float) -> int | None:
    """The exit code of a command; None if it was not done after `limit` seconds. Nothing of it is left running."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check, then time, on the GPU of this machine.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="fewer sizes: minutes instead of hours")
    parser.add_argument(
        "--only",
        choices=[name for name in trial_names() if name not in SANITIZED],
        metavar="TRIAL",
        help="one trial, in this process",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"basinescape.bench.gpu: torch {torch.__version__} sees no CUDA GPU here, and these checks are for one")
    if args.only:
        return perform(args.only, args.out, args.quick)
    report: dict[str, Any] = {**taken(torch.device("cuda")), "quick": args.quick, "checks": [], "rows": []}
    for name in trial_names():
        result = isolated(name, args.quick)
        rows = result.pop("rows")
        report["checks"].append({"check": name, **result})
        report["rows"] += rows
        write(args.out, report)
        print(f"{result['status']:8} {name}, {result['seconds']:.0f} s  {result.get('error', '')}", flush=True)
        if rows:
            print(tables(rows), flush=True)
    if any(check["status"] == "failed" for check in report["checks"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
