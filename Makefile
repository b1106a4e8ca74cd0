# One target per thing a person does here. All of them work in a fresh clone: .venv makes itself.
# PYTHON=python3.12 chooses another interpreter for the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ZOO := .zoo/installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow check format coverage zoo clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(ZOO): benchmarks/requirements.txt $(INSTALLED)
	rm -rf .zoo
	$(BIN)/pip install --quiet --no-deps --target .zoo -r benchmarks/requirements.txt
	touch $@

install: $(INSTALLED)  ## make the environment in .venv

quickstart: install  ## compress a small CNN to 33 % of its MACs and report, in minutes
	$(BIN)/dyncompress run recipes/digits.yaml --target 33% --out runs/quickstart

test: install $(ZOO)  ## every fast test: CPU, offline, doctests included
	$(BIN)/pytest

test-slow: install  ## the tests that train for minutes
	$(BIN)/pytest -m slow

check: install  ## format, lint, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: install  ## let ruff rewrite what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

coverage: install  ## which lines of the package the fast tests reach
	$(BIN)/pytest --cov --cov-report=term-missing:skip-covered

zoo: install $(ZOO)  ## what works on which of 391 networks, torch-pruning beside it; hours, resumable
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.zoo --peer --limit 60
	$(BIN)/python -m benchmarks.table

clean:  ## remove caches and build output; .venv, .zoo and runs/ stay
	rm -rf build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
