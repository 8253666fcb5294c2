# Two commands for a fresh machine: `make demo` and `make test`. Both make .venv and install what they need.
#
#   make demo                      train on Chinese reviews that arrive with a package, compare, report, serve
#   make demo ARGS="--minutes 1 --no-serve"
#   make test                      lint, types, every test
#   make bench-smoke               a few benchmarks in their shortest form: that they run, not how fast
#   TORCH=...                      another torch build, e.g. TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test lint bench-smoke clean

demo: $(VENV)/.with-demo
	$(BIN)/multihead demo $(ARGS)

test: $(VENV)/.with-dev lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/mypy multihead

bench-smoke: $(VENV)/.with-dev
	$(BIN)/python benchmarks/run.py --smoke

$(VENV)/.with-torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

$(VENV)/.with-demo: $(VENV)/.with-torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,serve,eval]'
	@touch $@

$(VENV)/.with-dev: $(VENV)/.with-torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
