# One target per thing a person does here. All of them work in a fresh clone: .venv makes itself.
# PYTHON=python3.12 chooses another interpreter for the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ZOO := .zoo/installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow trust check format coverage mutants zoo bench matrix clean

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

test: install $(ZOO)  ## every fast test: CPU, offline, doctests included; two at a time
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: install  ## the tests that train for minutes
	$(BIN)/pytest -m slow

check: install  ## format, lint, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: install  ## let ruff rewrite what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

trust: install  ## every promise of docs/reliability.md, slow ones too; writes the page
	$(BIN)/pytest -m "not gpu" tests/trust -o junit_family=xunit1 --junit-xml=.trust.xml; status=$$?; \
	$(BIN)/python -m benchmarks.reliability --trust .trust.xml && exit $$status

coverage: install $(ZOO)  ## which lines and branches of the package the fast tests reach
	$(BIN)/pytest --cov --cov-report=term-missing:skip-covered --cov-report=json:.coverage.json
	$(BIN)/python -m benchmarks.reliability --coverage .coverage.json

mutants: install  ## mutation testing of plan, cost and budget: does a test notice each small change?
	$(BIN)/pip install --quiet -c constraints.txt mutmut==3.8.1
	$(BIN)/python -m mutmut run --max-children 2
	$(BIN)/python -m mutmut results --all true > .mutants.txt
	$(BIN)/python -m benchmarks.reliability --mutants .mutants.txt

zoo: install $(ZOO)  ## what works on which of 391 networks, torch-pruning beside it; hours, resumable
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.zoo --peer --limit 60
	$(BIN)/python -m benchmarks.table

bench: install $(ZOO)  ## how fast it is: sections that have no results yet; BENCH="--fresh --only networks" and more of --help
	$(BIN)/python -m benchmarks.speed $(BENCH)

matrix: install  ## the tests with oldest and newest releases, and each Lightning package alone; downloads gigabytes
	$(BIN)/python -m benchmarks.matrix

clean:  ## remove caches and build output; .venv, .zoo, .matrix and runs/ stay
	rm -rf build dist *.egg-info .coverage .coverage.json .trust.xml .mutants.txt mutants .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.matrix/*' -exec rm -rf {} +
