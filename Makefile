PYTHON ?= python3
BIN := .venv/bin
PACKAGE := .venv/src/basinescape
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
QUICK := not aot and not interpreter and not process and not shipped and not slow

.PHONY: install demo lint links types check test sanitize matrix docs

install: .venv/installed

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel torch triton
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,evaluate,docs]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps k-diffusion  # the tests need only its samplers
	touch $@

demo: install
	$(BIN)/basinescape demo --out out/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders as one package of links, made anew each time: mypy, editors and the docs find `basinescape` in .venv/src.
links: install
	rm -rf $(PACKAGE)
	mkdir -p $(PACKAGE)
	ln -s $(CURDIR)/sampler/* $(CURDIR)/kernels $(CURDIR)/bench $(PACKAGE)/

# Not from here, where the folder `kernels` would pass for the package of that name, which diffusers imports.
types: links
	cd $(PACKAGE)/.. && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

# About a minute: what is quick, on small random models.
check: lint types
	$(PYTEST) -m "$(QUICK)" --ignore tests/schedulers/test_matrix.py

test: install
	$(PYTEST)

# The kernels as Triton compiles them, run on the CPU: out of bounds, unwritten, two programs at one address.
sanitize: install
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python ttsem==0.1.0  # runs on Python 3.11, too
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels/test_compiled.py

# Every scheduler with every option, prediction type, spacing and number of steps; bench.gpu whole on a pretended device.
matrix: install
	$(PYTEST) --matrix tests/schedulers/test_matrix.py tests/bench/test_gpu_whole.py

docs: links
	$(BIN)/python -m mkdocs build --strict --quiet
