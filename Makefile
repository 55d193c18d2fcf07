# `make demo` and `make test` do all their own set-up, in .venv; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# the tests run in two processes, whose threads would get in each other's way
SERIAL := OMP_NUM_THREADS=1

.PHONY: demo test test-slow quality timm-suite timm-patch docs clean

demo: $(READY)
	$(BIN)/timm-spa demo

test: $(READY) quality
	$(SERIAL) $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(READY)
	$(SERIAL) $(BIN)/python -m pytest -m slow -n 2

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# timm's own model tests on our names: all of them, or NAMES="spa_resnet50 spa_mobilenetv2"
timm-suite: $(READY)
	$(BIN)/python tests/timm_suite.py $(NAMES)

# a patch that brings SPA-A into timm's newest source, and timm's model tests with it, in build/timm_patch
timm-patch: $(READY)
	$(BIN)/python docs/upstream/timm_patch.py

# the pages, into build/docs
docs: $(READY)
	$(BIN)/python -m sphinx --fail-on-warning --quiet docs build/docs

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet --editable ".[train,test]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
