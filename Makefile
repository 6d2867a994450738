# make demo   the whole road on real weights: import, upcycle, train, evaluate
# make test   everything that CI checks; make check: the part that takes some two minutes
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0

export OMP_NUM_THREADS ?= $(shell nproc)
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup demo check lint test test-full gpu soak bench clean

help:
	@sed -n 's/^# //p' Makefile; grep -oE '^[a-z-]+:' Makefile | tr -d ':' | paste -sd ' '

setup: $(VENV)/.ready

# torch comes first and alone: on a CPU-only index its wheel must not be replaced by a later resolve
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "$(TORCH)" -e ".[dev]"
	touch $@

demo: setup
	launch/demo.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy moe

check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not full and not gpu"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not full and not gpu"

test-full: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not gpu"

# for a machine with a GPU, with the Python that it has: nothing is set up, nothing downloaded
gpu:
	$(PYTHON) bench/gpu.py $(if $(ONLY),--only $(ONLY)) $(if $(RESULTS),--results $(RESULTS)) \
	    $(if $(PEERS),--peers $(PEERS))

# random kills, signals and full disks for SOAK_MINUTES
soak: setup
	PYTHONPATH=. $(BIN)/python tests/soak.py --minutes $(or $(SOAK_MINUTES),30) --out bench/results

bench: setup
	bench/run.sh

clean:
	rm -rf $(VENV) build dist *.egg-info demo
