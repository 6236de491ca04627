# Every target sets up .venv by itself on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: status help train test test-slow bench lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

train: $(VENV)/ready ## train on drawn cars; again continues
	$(BIN)/python train.py experiment=cars

test: $(VENV)/ready ## all tests but the slow campaigns
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/ready ## the slow campaigns
	$(BIN)/python -m pytest -m slow -n 2

bench: $(VENV)/ready ## what saving, starting again, shards and other programs cost training; minutes, on a quiet machine
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/starting.py
	$(BIN)/python benchmarks/sharding.py
	$(BIN)/python benchmarks/busy.py

lint: $(VENV)/ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

status: $(VENV)/ready ## what the checkpoints of a run hold: make status RUN=cars
	$(BIN)/python -m exact_resume status runs/$(or $(RUN),cars)

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
