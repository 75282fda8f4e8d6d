# Two commands set everything up: `make demo` (the main job, small) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= demo

.PHONY: demo test lint clean

demo: $(VENV)/.ready            ## synthetic shards -> train `tiny` -> benchmark -> report -> a clip
	$(BIN)/vfi demo --out $(DEMO)

WORKERS ?= $(shell nproc)

test: $(VENV)/.ready            ## all tests (those that need a GPU skip with their reason)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 5 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.ready            ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip install --quiet --upgrade pip  # one of 2023 takes half a minute longer to choose versions
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	# on all cores, but for what hardly anything here imports; files that are no Python of this version stay as they are
	-$(BIN)/python -m compileall -qq -j 0 -x '/(tests|testing/_internal|transformers/models|onnxruntime|lexers|mypyc?|pip)/' $(VENV)/lib
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
