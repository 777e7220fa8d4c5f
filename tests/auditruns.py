"""Runs of `basinescape audit`, and what they write."""

import csv
import json
import sys

import pytest
from basinescape.bench import cli


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["basinescape", "audit", "--no-progress", "--device", "cpu", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def rows_of(out):
    return list(csv.DictReader((out / "audit.csv").open(newline="", encoding="utf-8")))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
