# Everything runs in .venv, made on first use. Another Python: make test PYTHON=python3.12
# Arguments for what is run: make test ARGS="-k watermark"

PYTHON ?= python3
ARGS ?=
# Test files at work at the same time; JOBS=0: one after the other, and ARGS=-s shows what they print.
JOBS ?= 2
QUICK ?=
HOURS ?=
SEED ?=
# torch's usual build comes with CUDA, gigabytes of it: name another one if you have it at hand.
PEERS_TORCH ?= torch
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint types bench torture clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.has-demo  ## the whole story on this machine, with an embedded MLflow
	@$(BIN)/mlflow-relay demo $(ARGS)

test: $(VENV)/.has-test  ## the tests
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.has-dev  ## ruff: rules and format
	@$(BIN)/ruff check . $(ARGS)
	@$(BIN)/ruff format --check .

types: $(VENV)/.has-dev  ## mypy, strict
	@$(BIN)/mypy $(ARGS)

bench: $(VENV)/.has-bench $(if $(QUICK),,$(PEERS)/.made)  ## the benchmarks, beside peers; QUICK=1: the ratios, in 3 minutes
	@$(BIN)/python -m tests.benchmarks $(if $(QUICK),--quick,--report) \
	  $(if $(wildcard $(PEERS)/.made)$(if $(QUICK),,whole),--peers $(PEERS)/bin/python) $(ARGS)

torture: $(VENV)/.has-test  ## kills, cuts and corruption for a long time: HOURS=1 SEED=…; docs/reliability.md
	@$(BIN)/python -m tests.crash --report $(if $(HOURS),--hours $(HOURS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

clean:  ## remove the environment, caches and what was built
	@rm -rf $(VENV) $(PEERS) dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find client daemon tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra: a second call is quick, a changed pyproject.toml installs again.
$(VENV)/.has-%: pyproject.toml | $(VENV)/.made
	@echo "Installing mlflow-relay[$*] into $(VENV); this takes a minute or two, once."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# What this project is compared with, away from what it needs itself.
$(PEERS)/.made: | $(VENV)/.made
	@echo "Installing the peers of the benchmarks into $(PEERS); this takes some minutes, once."
	@$(PYTHON) -m venv --clear $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  pyzmq msgpack mlflow wandb neptune-scale trackio tensorboardX mlflow-export-import tabulate numpy
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check '$(PEERS_TORCH)' || \
	  echo "without torch: its scalars are not measured"
	@touch $@

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), 3.10 or newer is needed: make PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make environments: install its venv package (Debian, Ubuntu: apt install python3-venv)"; \
	  exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=21.3'  # editable installs
	@touch $@
