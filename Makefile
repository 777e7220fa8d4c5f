PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test matrix lint types

install: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel torch triton
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,evaluate]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps k-diffusion  # its samplers alone are tested with
	touch $@

demo: install
	$(BIN)/basinescape demo --out out/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One package of links to the folders: type checkers and editors find it by its path.
types: install
	mkdir -p .venv/src/basinescape
	ln -sfn $(CURDIR)/sampler/* $(CURDIR)/kernels $(CURDIR)/bench .venv/src/basinescape/
	$(BIN)/mypy -p basinescape

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

matrix: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "whole or not whole" tests/schedulers/test_matrix.py
