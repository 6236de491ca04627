# Every target sets up .venv by itself on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help train test test-unit test-slow test-cluster bench structure lint format status clean
.PHONY: new # make new

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

train: $(VENV)/ready ## train on drawn cars; the same command continues
	$(BIN)/python train.py experiment=cars

test: $(VENV)/ready ## all tests but the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-unit: $(VENV)/ready ## the tests that start no process
	$(BIN)/python -m pytest -m 'not slow and not cluster and not processes' -n 2

test-slow: $(VENV)/ready ## the slow tests; hours
	$(BIN)/python -m pytest -m slow -n 2

test-cluster: $(VENV)/ready ## lose machines, cables and jobs for real (torchrun, SLURM, NFS), as root on Linux; an hour
	$(BIN)/python -m pytest -m cluster -rs

bench: $(VENV)/ready ## measure what saving, restarting, shards and other programs cost
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/starting.py
	$(BIN)/python benchmarks/restarting.py
	$(BIN)/python benchmarks/sharding.py
	$(BIN)/python benchmarks/finetuning.py
	$(BIN)/python benchmarks/busy.py
	$(BIN)/python benchmarks/serving.py

structure: $(VENV)/ready ## measure the source: lines, names, circles, the way to the loss
	$(BIN)/python benchmarks/structure.py

lint: $(VENV)/ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready ## let ruff repair what it can, and write the generated pages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/generate.py

status: $(VENV)/ready ## list the checkpoints of a run: make status RUN=cars
	$(BIN)/python -m exact_resume status runs/$(or $(RUN),cars)

new: ## make new NAME=planes DIR=../planes: a new project from this template, renamed
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) new.py '$(NAME)' '$(or $(DIR),../$(NAME))'

.PHONY: docs
docs: $(VENV)/ready ## build the documentation into site/; a broken link fails
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m mkdocs build --strict

clean: ## remove caches, never runs
	rm -rf .pytest_cache .ruff_cache .mypy_cache build src/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
