# make demo   install into .venv and run the demonstration
# make test   install into .venv and run linters, type checks, import contracts and tests (what CI runs)
# make lint | format | clean
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
PACKAGING := pyproject.toml setup.py constraints.txt

.PHONY: demo test lint format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# One thread a worker: several workers with several threads each would fight for the same cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp a set of extras: a second run installs nothing, a change of the packaging files installs again.
$(VENV)/.%: $(PACKAGING) | $(BIN)/python
	$(PIP) -e '.[$*]'
	@touch $@
