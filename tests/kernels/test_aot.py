"""What the kernels compile to for GPUs this machine need not have."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("triton")
GSAN = find_spec("triton.tools.gsan")
pytestmark = pytest.mark.aot


def run(*arguments):
    """Python with `arguments`, compiling rather than interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True).stdout


# Every dtype; the command's default is all targets with all dtypes.
ASKED = [("sm_80", "float16"), ("sm_90", "float32"), ("sm_100", "bfloat16")]
OTHERS = [("sm_86", "bfloat16"), ("sm_89", "float16"), ("sm_120", "float32"), ("gfx942", "float16"), ("gfx1100", "bfloat16")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("aot") / "report.json"

    def rows(target, dtype):
        arguments = ["basinescape", "aot", "--json", str(file), "--target", target, "--dtype", dtype]
        run("-c", f"import sys; from basinescape.bench import cli; sys.argv = {arguments}; cli.main()")
        return json.loads(file.read_text())

    return [row for asked in ASKED for row in rows(*asked)]


def test_report_covers_every_kernel(report):
    seen = {(row["kernel"], row["target"], row["dtype"]) for row in report}
    kernels = "guide", "guide, rule", "noise_gap", "step", "step, first minimum", "step, rule"
    kernels = *kernels, "sums", "sums, rule", "gap", "record", "record, first minimum"
    for one in ("step, one prediction", "guide_step, one prediction"):
        kernels = *kernels, one, f"record of {one}"
    assert seen == {(kernel, *case) for kernel in kernels for case in ASKED}


def narrow(kernel):
    """Whether it loads numbers of a sample alone, one at a time: with one prediction there are no sums to add up."""
    return kernel.startswith("record of")


def test_loads_are_16_bytes_and_nothing_spills(report):
    poor = [row for row in report if (row["load_bits"] < 128 and not narrow(row["kernel"])) or row["spill_bytes"]]
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
            print(resources(assembly(launch, "sm_90"))["spill_bytes"])
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
    found = resources(assembly(replace(good, options=options), "sm_90"))
    print(found["spill_bytes"], found["load_bits"])
"""
    crowded, sparse = (tuple(map(int, line.split())) for line in run("-c", script).splitlines())
    assert crowded[0] > 0
    assert sparse[1] < 128


@pytest.mark.parametrize(("target", "dtype"), OTHERS)
def test_other_cards_spill_nothing(target, dtype):
    """Consumer cards and AMD's, at the largest block and in tiles; 16 bytes a load there, too."""
    script = f"""
from basinescape.kernels.aot import SHAPES, assembly, launches, resources
for name, launch in launches("{dtype}", shapes=SHAPES[-2:]):
    print(name, *resources(assembly(launch, "{target}")).values(), sep=";")
"""
    rows = [(name, *map(int, numbers)) for name, *numbers in (line.split(";") for line in run("-c", script).splitlines())]
    assert len(rows) == 23
    for name, registers, spilled, bits in rows:
        copies = name.startswith("guide_step") and target == "gfx942"  # which copies 8 bytes at a time
        least = 0 if narrow(name) else 64 if copies else 128
        assert registers <= 128 and not spilled and bits >= least, name


SANITIZED = """
import re, sys
from dataclasses import replace
from types import SimpleNamespace
from basinescape.kernels.aot import SHAPES, assembly, launches
from triton.runtime import driver

shared = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 232448})
driver.set_active(SimpleNamespace(get_current_device=lambda: 0, utils=shared))
for name, launch in launches("float16", shapes=(SHAPES[0], SHAPES[-1])):
    made = assembly(replace(launch, options=launch.options | OPTIONS), "sm_90")
    print(name, launch.options.get("BLOCK"), FOUND, sep=";")
"""


def sanitized(options, found):
    lines = run("-c", SANITIZED.replace("OPTIONS", repr(options)).replace("FOUND", found)).splitlines()
    assert len(lines) == 23
    return [line.split(";") for line in lines]


def test_overflows_of_32_bit_numbers_are_looked_for():
    """With TRITON_DEBUG=1: programs of large samples are counted, and their sums walked through, in 32 bits."""
    checked = sanitized({"debug": True, "sanitize_overflow": True}, "'__assertfail' in made['ptx']")
    assert {name for name, _, found in checked if found == "True"} >= {"gap", "record", "sums, rule", "guide, rule"}


@pytest.mark.skipif(GSAN is None, reason="Triton has GSan from 3.8 on")
def test_gsan_sees_the_loads_and_stores_of_every_kernel():
    looked = r"[len(re.findall(rf'call .*@__triton_gsan_{kind}_tensor', made['llir'])) for kind in ('load', 'store')]"
    for name, block, found in sanitized({"instrumentation_mode": "gsan"}, looked):
        loads, stores = json.loads(found)
        assert loads and stores, (name, block)
