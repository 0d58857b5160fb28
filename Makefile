# One place for the commands that people and CI run. uv is used when present, venv + pip otherwise.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null)
PIP    := $(if $(UV),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)
# torch is only the oracle of the parity tests, and only Python 3.11 has a CPU build that pip finds without CUDA.
TORCH  ?= torch==2.13.0

.PHONY: help setup setup-dev system-packages serve check test test-tpu-aot monitoring wheel clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(if $(UV),uv venv --quiet --seed --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))

$(VENV)/.setup: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Baton into $(VENV) (the first time takes a few minutes) ..."
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	@echo "Installing the test and lint tools ..."
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"; fi
	$(PIP) -c constraints.txt -r requirements-dev.txt
	@touch $@

setup: $(VENV)/.setup  ## Prepare .venv with everything Baton needs

setup-dev: $(VENV)/.setup-dev  ## ... and the test and lint tools

serve: setup  ## Start gateway + 1 prefill + 1 decode worker with the demo model (ARGS="..." adds options)
	@exec $(BIN)/baton serve $(ARGS)

check: setup-dev  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two files at a time, the long ones not last; then those with a cluster each, which wants the machine for itself.
# 5: ARGS left none of that kind.
test: setup-dev  ## All tests (ARGS="-k name" narrows)
	$(BIN)/python -m pytest -m "not aot_matrix and not ray" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS) || test $$? = 5
	$(BIN)/python -m pytest -m ray $(ARGS) || test $$? = 5

test-tpu-aot: setup-dev  ## Compile every kernel and whole steps of real models for every TPU generation; needs no TPU
	$(BIN)/python -m pytest -m "aot or aot_matrix" tests/benchmarks tests/engine_core tests/deploy $(ARGS)

# Tests that need one of these skip, and say so, where it can not be had.
system-packages:  ## Debian packages of the tests: Prometheus with promtool, and Chromium (needs root, does nothing elsewhere)
	@if command -v prometheus >/dev/null && command -v chromium >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ]; then \
	    echo "apt-get or root is missing: tests with Prometheus or Chromium will be skipped"; exit 0; fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus chromium \
	    >/dev/null || echo "not installed: tests with Prometheus or Chromium will be skipped"

monitoring: setup-dev  ## Write boards, rules, alerts and docs/metrics.md anew from the metric catalogue
	$(BIN)/python -m deploy.monitoring

wheel: setup  ## Build dist/baton-*.whl, which cluster files and Dockerfiles install
	rm -rf dist build && $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
