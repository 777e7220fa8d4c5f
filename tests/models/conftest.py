"""Pipelines of every family, small and with random weights."""

import copy

import pytest
from families import CASES


@pytest.fixture(scope="module")
def pipes(pipe):
    """Fresh copies of pipelines by the name of their case."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = CASES[name].make(pipe.tokenizer)
        return copy.deepcopy(made[name])

    return of
