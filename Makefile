PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP_DEMO := $(VENV)/.demo
STAMP_DEV := $(VENV)/.dev
PYPROJECTS := pyproject.toml $(wildcard schemas/pyproject.toml core/pyproject.toml plugins/*/pyproject.toml)

.PHONY: quickstart test test-all lint format docs bench clean

quickstart: $(STAMP_DEMO)  ## install and run the main job
	$(BIN)/rarefy quickstart

test: $(STAMP_DEV)  ## install and run the tests
	$(BIN)/pytest -n 2

test-all: $(STAMP_DEV)  ## the slow tests too
	$(BIN)/pytest -n 2 -m ""

lint: $(STAMP_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP_DEV)  ## write the generated pages of docs/
	$(BIN)/python docs/generate.py

bench: $(STAMP_DEV)  ## measure what docs/benchmarks.md shows
	$(BIN)/python -m benchmarks.spine
	$(BIN)/python -m benchmarks.page

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("rarefy needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(STAMP_DEMO): $(VENV)/bin/python $(PYPROJECTS)
	$(BIN)/pip install --disable-pip-version-check -q -e '.[demo]'
	touch $@

$(STAMP_DEV): $(VENV)/bin/python $(PYPROJECTS)
	$(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	touch $@ $(STAMP_DEMO)
