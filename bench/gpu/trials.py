"""Everything there is to find out on a GPU, into one JSON file.

python -m basinescape.bench.gpu --out FILE.json [--minutes M]

What is worth most comes first: the kernels against float64 and under sanitizers, capture, waits and launches, then the
benchmarks. Each check and each bench runs in a process of its own, under a time limit: one that fails, crashes or hangs is
recorded, and the others go on. A row of a bench for which there is not enough memory is left out by name; a check that runs out
of it is "out of memory", which is neither passed nor failed. The file is written
anew with every result. With --minutes there are fewer sizes, and what is left when time is up is recorded as not reached. Where
diffusers is missing, what needs it is skipped. Checks run under compute-sanitizer where it is installed (`pip install
nvidia-cuda-sanitizer-api`), and under Triton's own sanitizers: GSan, from Triton 3.8 on, finds programs of a launch that share
memory one of them writes; "overflow" finds 32-bit numbers that overflow.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import speed
from ..speed.timing import out_of_memory, taken
from ..tables import writable
from .checks import CHECKS, Skipped
from .report import rendered

PROGRAM = Path(__file__).with_name("__main__.py")  # makes a trial in its own process
SAMPLER_CHECKS = ("sampler launches", "sampler synchronisation", "sampler capture", "sampler images", "sampler threads")
BENCH = "bench "
BENCHES = tuple(BENCH + name for name in speed.BENCHES)
NEED_DIFFUSERS = {*SAMPLER_CHECKS, *BENCHES} - {"bench kernel"}
FIRST = ("guide", "step", "rules", "batches", "guide, racecheck", "batches, gsan")
TOOLS = ("racecheck", "gsan", "memcheck", "overflow")
SANITIZED = {f"{check}, {tool}": (check, tool) for tool in TOOLS for check in ("guide", "batches")}
FOUND = 99  # what compute-sanitizer exits with where it has found something
# Our kernels alone, and no failed calls of the driver's: libraries ask it for what may not be there, and go on.
KERNELS = ("guide_kernel", "step_kernel", "tile_kernel", "record_kernel", "sums_kernel", "gap_kernel")
OURS = [f"--kernel-name=kernel_substring={kernel}" for kernel in KERNELS]
WATCH = ["--error-exitcode", str(FOUND), "--report-api-errors", "no", *OURS]
LIMITS = {False: {"check": 900, "bench": 4 * 3600}, True: {"check": 60, "bench": 150}}  # seconds, by whether time is short
OUT_OF_MEMORY = "out of memory"  # the status of a trial that the GPU has not enough memory for
LEAST = 10  # seconds in which a process can find anything out

Result = dict[str, Any]


def trial_names() -> list[str]:
    """Checks by their names, under a sanitizer before its name; benches after "bench ". What is worth most comes first."""
    return list(dict.fromkeys([*FIRST, *CHECKS, *SAMPLER_CHECKS, *BENCHES, *SANITIZED]))


def python(tool: str | None) -> list[str]:
    """Python, to be given a program: under a sanitizer, or as it is. Raises `Skipped` where the sanitizer is not installed."""
    if tool in ("racecheck", "memcheck"):
        program = sanitizer()
        if program is None:
            raise Skipped("compute-sanitizer is not installed")
        return [program, "--tool", tool, *WATCH, sys.executable]
    if tool == "gsan":
        if find_spec("triton") is None or find_spec("triton.tools.gsan") is None:
            raise Skipped("Triton has GSan from 3.8 on")
        return [sys.executable, "-m", "triton.tools.gsan"]
    return ["env", "TRITON_DEBUG=1", sys.executable] if tool == "overflow" else [sys.executable]


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
    device = torch.device("cuda")
    result: Result = {"status": "passed", "rows": []}
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
        status = OUT_OF_MEMORY if out_of_memory(error) else "failed"
        result |= {"status": status, "error": f"{type(error).__name__}: {error}"}
    write(out, result)


def isolated(name: str, quick: bool, limit: float, found: Callable[[Result], None] = lambda result: None) -> Result:
    """Make one trial in another process of at most `limit` seconds; its result, whatever becomes of it, and its seconds.

    found: called with what there is so far, while it runs.
    """
    check, tool = SANITIZED.get(name, (name, None))
    start = time.perf_counter()
    try:
        if name in NEED_DIFFUSERS and find_spec("diffusers") is None:
            raise Skipped("diffusers is not installed")
        command = [*python(tool), str(PROGRAM), "--only", check, *(["--minutes", "1"] if quick else [])]
    except Skipped as reason:
        return {"status": "skipped", "error": str(reason), "rows": [], "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        code = ending([*command, "--out", str(out)], limit, lambda: found(read(out)))
        result = read(out)
    explained = ("failed",) if code == FOUND else ("failed", OUT_OF_MEMORY)
    if result["status"] == "unfinished" or (code != 0 and result["status"] not in explained):
        error = f"not done after {limit:.0f} s" if code is None else f"ended with code {code}"
        result |= {"status": "failed", "error": f"{tool} has found errors" if tool and code == FOUND else error}
    return {**result, "seconds": time.perf_counter() - start}


def ending(command: Sequence[str], limit: float, meanwhile: Callable[[], None] = lambda: None) -> int | None:
    """The exit code of a command; None if it was not done after `limit` seconds. Nothing of it is left running."""
    process = subprocess.Popen(command, start_new_session=True)
    end = time.monotonic() + limit
    try:
        while True:
            try:
                return process.wait(min(5.0, max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= end:
                    return None
                meanwhile()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(path: Path) -> Result:
    """What a trial has written so far."""
    return json.loads(path.read_text()) if path.exists() else {"status": "unfinished", "rows": []}


def write(path: Path, data: Result) -> None:
    """Whoever reads the file finds the old or the new one, whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(data, indent=1) + "\n")
    new.replace(path)


def trials(minutes: float | None, report: Callable[[str, Result], None]) -> Iterator[tuple[str, Result]]:
    """(name, result) of one trial after another. report: called with what a trial has found so far, while it runs."""
    end = time.monotonic() + (sys.maxsize if minutes is None else 60 * minutes)
    quick = minutes is not None
    for name in trial_names():
        limit = min(LIMITS[quick]["bench" if name.startswith(BENCH) else "check"], end - time.monotonic())
        if limit < LEAST:
            yield name, {"status": "not reached", "rows": [], "seconds": 0.0}
        else:
            yield name, isolated(name, quick, limit, partial(report, name))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check, then time, on the GPU of this machine.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--minutes", type=float, metavar="M", help="end after so many, with fewer sizes; default: hours")
    parser.add_argument("--only", choices=[*CHECKS, *SAMPLER_CHECKS, *BENCHES], metavar="TRIAL", help="one, in this process")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit(f"basinescape.bench.gpu: torch {torch.__version__} sees no CUDA GPU here, and these checks are for one")
    try:
        writable(args.out, "--out")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.only:
        return perform(args.only, args.out, args.minutes is not None)
    taken_here, results = taken(torch.device("cuda")), {}

    def report(name: str, result: Result) -> None:
        results[name] = result
        checks = [
            {"check": name, **{key: value for key, value in found.items() if key != "rows"}} for name, found in results.items()
        ]
        rows = [row for found in results.values() for row in found["rows"]]
        write(args.out, {**taken_here, "minutes": args.minutes, "checks": checks, "rows": rows})

    for name, result in trials(args.minutes, report):
        report(name, result)
        print(f"{result['status']:13} {name}, {result['seconds']:.0f} s  {result.get('error', '')}", flush=True)
    print(rendered(json.loads(args.out.read_text())))
    if any(result["status"] == "failed" for result in results.values()):
        sys.exit(1)
