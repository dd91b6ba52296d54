# A fresh machine needs two commands: `make quickstart` and `make test`. Both make their own virtual environment.
PYTHON ?= python3
ARGS ?= --overwrite
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check format bench-data clean

quickstart: $(VENV)/installed
	$(BIN)/fm9g quickstart $(ARGS)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2  # a process a core

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-data: $(VENV)/installed  # about ten minutes and 6 GB of disk, on a machine that does nothing else
	for name in indexing reading encoding; do $(BIN)/python benchmarks/data/$$name.py || exit 1; done

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) quickstart build *.egg-info .mypy_cache .ruff_cache .pytest_cache
