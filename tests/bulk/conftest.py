"""Runs with their stages in threads, as beside a GPU, and in the caller's thread, as on a CPU."""

import pytest


@pytest.fixture(params=["in turns", "in threads"])
def ways(request, monkeypatch):
    monkeypatch.setattr("basinescape.bulk.executor.threaded", lambda sampler: request.param == "in threads")
