# The commands to remember: make demo, make test. Both set up .venv first.
# PIP_ARGS passes further arguments to pip, for example an index with PyTorch's CPU builds (see README.md).
PYTHON ?= python3.11
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test test-full lint clean

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_ARGS) -r requirements.txt
	$(BIN)/pip install --quiet $(PIP_ARGS) --no-deps --editable .
	touch $@

test: .venv/ready lint
	$(BIN)/pytest -m "not slow"

test-full: .venv/ready
	$(BIN)/pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist demo .pytest_cache .hypothesis .mypy_cache .ruff_cache
