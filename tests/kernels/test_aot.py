"""What the kernels compile to for GPUs this machine need not have."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.aot


def run(*arguments):
    """Python with `arguments`, compiling rather than interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True).stdout


# Every target and every dtype; the command's default is all with all.
ASKED = [(("sm_80",), ("float16",)), (("sm_90",), ("float32",)), (("sm_100",), ("bfloat16",))]
CASES = [case for targets, dtypes in ASKED for case in itertools.product(targets, dtypes)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("aot") / "report.json"

    def rows(targets, dtypes):
        asked = [word for target in targets for word in ("--target", target)]
        asked += [word for dtype in dtypes for word in ("--dtype", dtype)]
        arguments = ["basinescape", "aot", "--json", str(file), *asked]
        run("-c", f"import sys; from basinescape.bench import cli; sys.argv = {arguments}; cli.main()")
        return json.loads(file.read_text())

    return [row for asked in ASKED for row in rows(*asked)]


def test_report_covers_every_target_and_dtype(report):
    seen = {(row["kernel"], row["target"], row["dtype"]) for row in report}
    kernels = "guide", "noise_gap", "step", "step, first minimum", "step, gap known", "guide, rule", "step, rule", "sums"
    kernels = *kernels, "step, rule, sums known"
    assert seen == {(kernel, *case) for kernel in kernels for case in CASES}


def test_loads_are_16_bytes_and_nothing_spills(report):
    poor = [row for row in report if row["load_bits"] < 128 or row["spill_bytes"]]
    assert not poor


def test_every_program_fits_the_register_file(report):
    assert all(row["registers"] >= 16 and row["registers"] * 32 * row["num_warps"] <= 65536 for row in report)


def test_no_rule_spills():
    """Where the report has one for all, each at the block that leaves a thread the fewest registers."""
    script = """
from basinescape.kernels.aot import assembly, launches, resources
from basinescape.kernels.rules import RULES
for rule in sorted(RULES.keys() - {"cfg", "apg"}):
    for name, launch in launches("float32", rule, [(4, 64, 64)]):
        if name.endswith("rule"):
            print(resources(assembly(launch, "sm_90")["cubin"])["spill_bytes"])
"""
    found = run("-c", script).split()
    assert found and set(found) == {"0"}


def test_a_poor_configuration_is_seen():
    """One warp for 16,384 elements spills; one element a thread cannot be loaded 16 bytes at a time."""
    script = """
from dataclasses import replace
from basinescape.kernels.aot import assembly, launches, resources
_, good = next(launches("float16"))
for block, warps in ((16384, 1), (1024, 32)):
    options = good.options | {"BLOCK": block, "num_warps": warps}
    found = resources(assembly(replace(good, options=options), "sm_90")["cubin"])
    print(found["spill_bytes"], found["load_bits"])
"""
    crowded, sparse = (tuple(map(int, line.split())) for line in run("-c", script).splitlines())
    assert crowded[0] > 0
    assert sparse[1] < 128


def test_programs_that_meet_order_their_memory():
    """All GPUs' threads see what a program stored before it arrived, once they have seen it arrive."""
    script = """
from basinescape.kernels.aot import assembly, launches
for name, launch in launches("float16"):
    if launch.options.get("MEETS"):
        print(assembly(launch, "sm_90")["ptx"], "END OF KERNEL")
"""
    *kernels, _ = run("-c", script).split("END OF KERNEL")
    assert len(kernels) == 2  # plain guidance, and a rule with sums of its own
    for ptx in kernels:
        stores, arrives, waits, reads = (
            [match.start() for match in re.finditer(pattern, ptx)]
            for pattern in (
                r"st\.global",
                r"atom\.global\.gpu\.acq_rel\.add",
                r"(ld|atom)\.global\.gpu\.acquire",
                r"ld\.global\.cg",  # past the cache of one multiprocessor
            )
        )
        assert stores[0] < arrives[0] < waits[0] < reads[0] and len(arrives) == len(waits) == 1
        assert "bar.sync" in ptx[stores[0] : arrives[0]] and "bar.sync" in ptx[waits[0] : reads[0]]
