"""The benchmarks' rows, at the smallest size: every piece of work runs, and is timed beside its peer."""

import pytest
import torch
from basinescape.bench.speed.command import STOCK, command

pytestmark = pytest.mark.shipped


def test_the_command_is_timed_beside_stock_diffusers():
    rows = list(command(torch.device("cpu"), rounds=2, jobs=2, steps=5))
    works = {row["what"] for row in rows}
    assert len(works) == 8 and {what.split(",")[0] for what in works} == {"tiny", "flow"}
    for what in works:
        own, stock = (next(row for row in rows if row["what"] == what and row["peer"] == peer) for peer in ("generate", STOCK))
        assert own["median"] > 0 and own["ratio"] > 0 and stock["ratio"] == 1
