# A fresh machine needs two commands: `make quickstart` and `make test`. Both create the virtual environment.
PYTHON ?= python3
ARGS ?= --overwrite
GPU ?= A100
SCALE ?= 1
times = $(shell awk 'BEGIN { print int($(1) * $(SCALE) + 0.5) }')
VENV := .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= $(BIN)/python
# If the variable is set, every process compiles its imports: half a minute for peft.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test test-all test-faults test-gpu check format bench-data bench-engine bench-convert bench-train bmtrain docs clean

quickstart: $(VENV)/installed
	$(BIN)/fm9g quickstart $(ARGS)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

test-all: check  # also the tests marked slow: every engine over 50 steps, the guide's chapter, the wheel, more faults
	OMP_NUM_THREADS=1 FM9G_ENGINE_STEPS=50 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "slow or not slow"

test-faults: $(VENV)/installed  # two hours of kills, small disks, clocks, signals, bad inputs, memory; SCALE=0.1: a tenth
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign_commands.py --scale $(SCALE)
	$(BIN)/python tests/faults/campaign_inputs.py --attempts $(call times,2000)
	$(BIN)/python tests/faults/campaign_memory.py --steps $(call times,2000)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign_runs.py \
		--kills $(call times,200) --faults $(call times,100)

# Both engines on the NVIDIA GPUs of this machine. GPU_PYTHON=python3 installs nothing first: for a machine without a
# package index, whose wheels tools/gpu_wheels.py fetches elsewhere.
test-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/installed)
	$(GPU_PYTHON) -m pytest -q --durations=0 tests/gpu

bmtrain: $(VENV)/installed  # for the GPUs of this machine; for other GPUs: make bmtrain BMTRAIN="--arch 9.0"
	tools/build_bmtrain.sh --python $(BIN)/python $(BMTRAIN)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed  # the pages generated from the source
	$(BIN)/python docs/arguments.py
	$(BIN)/python docs/dialects.py

bench-data: $(VENV)/installed  # about ten minutes and 6 GB of disk, on an idle machine
	for name in indexing reading encoding chats; do $(BIN)/python benchmarks/data/$$name.py || exit 1; done

bench-engine: $(VENV)/installed  # on the GPU if there is one; GPU=H100 sets the peak for the MFU
	for engine in torch bmtrain; do $(BIN)/python benchmarks/engine/construction.py --engine $$engine --scale $(SCALE) || exit 1; done
	$(BIN)/python benchmarks/engine/throughput.py --gpu $(GPU)

bench-convert: $(VENV)/installed  # twenty minutes and 25 GB of disk; ARGS="--gigabytes 1" for less
	$(BIN)/python benchmarks/convert/conversion.py $(filter-out --overwrite,$(ARGS))

bench-train: $(VENV)/installed  # ten minutes
	for name in checkpoint_cost logging_cost; do $(BIN)/python benchmarks/train/$$name.py || exit 1; done

# The tests on CPUs need the Python code of bmtrain, which has wheels for these Pythons. Its dependencies stay out:
# nvidia-nccl-cu11 would overwrite the NCCL of torch. OpenDelta's dependencies are outdated, and not needed.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps -c constraints.txt \
		"bmtrain; python_version < '3.12' and sys_platform == 'linux' and platform_machine == 'x86_64'" opendelta
	touch $@

clean:
	rm -rf $(VENV) quickstart build *.egg-info .mypy_cache .ruff_cache .pytest_cache
