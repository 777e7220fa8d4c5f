"""The table of hosts is whole: every host has its tests, and a row of the users' table."""

from pathlib import Path

import pytest
from hosts_tested import HOSTS

HERE = Path(__file__).parent
TABLE = (HERE.parent.parent / "examples" / "README.md").read_text(encoding="utf-8")
HOW = {"package", "own code", "stand-in"}


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_a_host_has_tests_and_a_row(host):
    assert (HERE / host.file).exists() and host.how in HOW
    words = {"diffusers pipelines": "stock diffusers pipelines", "diffusers modular": "modular pipelines"}
    assert words.get(host.name.split(":")[0], host.name) in TABLE


def test_no_file_of_a_hosts_tests_is_left_out():
    ours = {"test_own_loop.py", "test_hosts_tested.py"}  # the loop that all of them share, and this
    more = {"test_callbacks.py", "test_guard.py", "test_stable_diffusion.py", "test_comfyui_steps.py"}
    more |= {"test_threads.py"}  # further ones
    assert {path.name for path in HERE.glob("test_*.py")} - ours - more == {host.file for host in HOSTS}
