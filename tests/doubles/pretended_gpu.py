"""`python -m basinescape.bench.gpu` on a GPU that is not there: python tests/doubles/pretended_gpu.py --out FILE [--minutes M].

Each of its trials is a process of its own, which runs this file, too. Sizes are the smallest; a minute here is not a GPU's, so
only all trials together have a limit. xformers and Ray are there. The GPU is full where "bench step" times a loop in the
published style.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).parent))

import torch
from basinescape.bench.gpu import checks, trials
from basinescape.bench.speed import kernel, step
from packages import installed
from pretended import install_guard, pretended
from smallest import small_benches, small_checks, small_sampler_checks

torch.set_num_threads(1)


def python(tool: str | None, real=trials.python) -> list[str]:
    """GSan allocates the memory of a GPU."""
    if tool == "gsan":
        raise trials.Skipped("GSan needs a GPU")
    return real(tool)


def main() -> None:
    trials.PROGRAM, trials.python = Path(__file__), python
    trials.LIMITS = {short: {"check": 3600, "bench": 3600} for short in trials.LIMITS}
    kernel.backend = lambda device: "triton"  # it refuses to time the interpreter
    if {*sys.argv} & {*checks.CHECKS, "bench kernel"}:
        small_checks(setattr)
    small_sampler_checks(setattr)
    small_benches(setattr)
    with tempfile.TemporaryDirectory() as folder:
        install_guard(Path(folder))
        with pretended() as device, installed():
            if "bench step" in sys.argv:
                step.published = device.full()(step.published)
            trials.main()


if __name__ == "__main__":
    main()
