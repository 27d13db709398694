# `make` lists the verbs. All of them set up .venv first where that is needed; pip's own settings (pip.conf, PIP_*) apply.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed
# The libraries that saepipe is compared with need versions of their own.
PEERS := .venv-peers
# The interpreter that .venv is made with; without it, the first fitting one of CANDIDATES.
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python python3.12 python3.11 python3.13)
# Further arguments of demo, acceptance, test and its kin, peers and ground-truth, e.g. `make test ARGS="-k shards"`.
ARGS ?=
# Tests that run at once, a file at a time.
JOBS ?= 2
# How much of what is promised under faults `make prove` tries.
KILLS ?= 20
FLIPS ?= 1000
# What of it: CI leaves out what takes many minutes.
PROVE ?= prove
# How often `make test-cluster` preempts a run.
PREEMPTIONS ?= 3

FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.DEFAULT_GOAL := help
.PHONY: help setup docs demo demo-model acceptance check format test prove test-pages test-cluster test-gpu test-tl3 peers ground-truth wheel clean clean-all

help: ## List the verbs
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## Create .venv with the pinned dependencies (PYTHON=... chooses the interpreter)

demo: $(READY) ## Cache, train, evaluate and open up features of the embedded language model
	$(BIN)/python -m saepipe.demo $(ARGS)

demo-model: $(READY) ## Train the embedded language model anew
	$(BIN)/python -m saepipe.demo.train_model $(ARGS)

acceptance: $(READY) ## Judge whether SAEs find what is there: labels of the demo's corpus, known features; pass or fail (minutes)
	$(BIN)/python -m saepipe.demo.acceptance $(ARGS)

test: $(READY) ## Run the tests (ARGS="-k shards" runs some)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

prove: $(READY) ## Run what is promised in full: the demo from a fresh clone, the README, kills, faults (KILLS=20 FLIPS=1000; minutes)
	PROVE_KILLS=$(KILLS) PROVE_FLIPS=$(FLIPS) $(BIN)/python -m pytest -s -m "$(PROVE)" tests $(ARGS)

test-pages: $(READY) ## Use the feature page in Chromium as a reader does (as root, installs it with apt where it lacks)
	$(BIN)/python -m pytest -s -m pages tests/pages $(ARGS)

test-cluster: $(READY) ## Bring up a real SLURM and run pipelines on it (as root; installs it with apt; minutes)
	CLUSTER_PREEMPTIONS=$(PREEMPTIONS) $(BIN)/python -m pytest -s -m cluster tests/cluster $(ARGS)

test-gpu: $(READY) ## Run training, kernels and models on a CUDA device (fails without one)
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

peers: $(PEERS)/installed ## Compare losses, formats and figures with SAELens, dictionary_learning and sparsify, in an environment of its own
	$(PEERS)/bin/python -m pytest -q tests/peers $(ARGS)

# Apart from the peers' tests (`make peers`): nnsight, which one of them imports, patches torch's own classes.
test-tl3: $(PEERS)/installed ## Run the tests in the peers' environment, which has TransformerLens 3.9
	$(PEERS)/bin/python -m pytest -n $(JOBS) --dist loadfile --ignore tests/peers $(ARGS)

ground-truth: $(PEERS)/installed ## Train on samples of known features beside SAELens, and print the table of docs/ground_truth.md
	$(PEERS)/bin/python docs/ground_truth.py $(ARGS)

docs: $(READY) ## Build the API reference into build/docs
	$(BIN)/python docs/api.py

check: $(READY) ## Lint, formatting, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(READY) ## Format the code and put right what the linter can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

wheel: $(READY) ## Build the wheel into dist/
	$(BIN)/python -m build --no-isolation --wheel

clean: ## Remove caches and build outputs; stores, runs and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-all: clean ## ... and .venv
	rm -rf $(VENV) $(PEERS)

# The stamp is written last, so that an interrupted set-up goes on at the next call and a finished one is instant.
$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c '$(FITS)' >/dev/null 2>&1; then \
	    for python in $(CANDIDATES); do \
	        if $$python -c '$(FITS)' >/dev/null 2>&1; then \
	            echo "creating $(VENV) with $$($$python -V) ($$python)"; \
	            exec $$python -m venv --clear $(VENV); \
	        fi; \
	    done; \
	    echo "no Python 3.11, 3.12 or 3.13 with venv and ensurepip among: $(CANDIDATES);" \
	        "install one (on Debian and Ubuntu with its python3-venv), or name it: make setup PYTHON=/path/to/python" >&2; \
	    exit 1; \
	fi
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

# nnsight asks for torchvision, whose build may not be torch's, and nothing here imports it.
$(PEERS)/installed: tests/peers/requirements.txt constraints-peers.txt $(READY)
	$(BIN)/python -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install -c constraints-peers.txt -r $< -e '.[dev]'
	$(PEERS)/bin/python -m pip uninstall -y torchvision
	@touch $@
