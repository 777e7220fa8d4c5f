PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test sanitize matrix lint types

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

# The kernels as Triton compiles them, run on the CPU: out of bounds, unwritten, two programs at one address.
sanitize: install
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python ttsem==0.1.0  # runs on Python 3.11, too
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels/test_compiled.py

matrix: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "whole or not whole" tests/schedulers/test_matrix.py
