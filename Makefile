# `make demo` and `make test` do all their own set-up, in .venv; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HOSTS := .venv-hosts
# the tests run in two processes, whose threads would get in each other's way
SERIAL := OMP_NUM_THREADS=1

.PHONY: demo test test-slow hosts quality timm-suite docs clean

demo: $(READY)
	$(BIN)/timm-spa demo

test: $(READY) quality
	$(SERIAL) $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(READY)
	$(SERIAL) $(BIN)/python -m pytest -m slow -n 2

# other people's tools with our nets, in an environment of their own; writes the table of docs/works_with.md
hosts: $(HOSTS)/.ready
	$(SERIAL) $(HOSTS)/bin/python -m pytest tests/hosts -m slow -n 2 --dist loadfile --table tests/hosts/table.md

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# timm's own model tests on our names: all of them, or NAMES="spa_resnet50 spa_mobilenetv2"
timm-suite: $(READY)
	$(BIN)/python tests/timm_suite.py $(NAMES)

# the pages, into build/docs
docs: $(READY)
	$(BIN)/python -m sphinx --fail-on-warning --quiet docs build/docs

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet --editable ".[train,test]"
	touch $@

$(HOSTS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --quiet --upgrade pip
	$(HOSTS)/bin/python -m pip install --quiet --quiet --editable ".[hosts]"
	touch $@

clean:
	rm -rf $(VENV) $(HOSTS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
