# make demo   the whole thing on the pocket model, in a minute, without a download
# make test   the tests        (one of them: make test ARGS="tests/test_sites.py -k olmoe")
# make lint   ruff and mypy
# make clean  remove what the targets above made, the environment included

PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell command -v $(p) 2>/dev/null)))
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# Small models: more threads only get into each other's way. Nothing is fetched from a hub.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile | head -4

demo: $(VENV)/.installed-core
	@$(BIN)/ttrouting demo $(ARGS)

test: $(VENV)/.installed-test
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.installed-lint build/mypy/ttrouting/strategies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	@rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# mypy reads folders and knows nothing of package-dir: the link puts `strategies/` where it is imported.
build/mypy/ttrouting/strategies:
	@mkdir -p $(@D) && ln -sfn ../../../strategies $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No python3 was found. ttrouting needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is $$($(PYTHON) -V), ttrouting needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)

# `core` is the package alone, any other name is one of its extras. A stamp is as new as the last install.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "Installing ttrouting ($*) into $(VENV); the first time, PyTorch makes this take minutes"
	@$(PIP) install -c constraints.txt -e '.$(if $(filter-out core,$*),[$*])'
	@touch $@
