# `make demo` and `make test` set up .venv on the first call and reuse it afterwards. `make demo` installs less.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_FOR_DEMO := $(VENV)/.ready-demo
HOSTS := .venv-hosts
# one thread per process, because the tests run in two processes
SERIAL := OMP_NUM_THREADS=1

.PHONY: demo test test-slow export-targets hosts more-hosts more-hosts-images more-hosts-mm quality timm-suite \
	timm-patch test-lowest test-newest sbom tables docs clean

demo: $(READY_FOR_DEMO)
	$(BIN)/timm-spa demo

test: $(READY) quality
	$(SERIAL) $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(READY)
	$(SERIAL) $(BIN)/python -m pytest -m slow -n 2

# tests of our models in other tools, in a separate environment; writes the table of docs/works_with.md
hosts: $(HOSTS)/.ready
	$(SERIAL) $(HOSTS)/bin/python -m pytest tests/hosts --ignore tests/hosts/by_name -m slow -n 2 --dist loadfile \
		--table tests/hosts/table.md
	$(SERIAL) $(HOSTS)/bin/python -m pytest tests/test_mmdet.py

# programs that take the name of a model, by their own command lines: groups that can be installed together, each in an
# environment of 8 GB that is removed before the next is made. The versions are those of the table in docs/works_with.md
MORE_HOSTS := more-hosts-images more-hosts-mm
more-hosts: $(MORE_HOSTS)
more-hosts-images: PACKAGES := anomalib==2.7.0 lightly-train==0.18.0 open_clip_torch[training]==3.3.0 timmx[onnx]==0.10.1
more-hosts-mm: PACKAGES := onedl-mmpretrain==1.3.6 onedl-mmcv==2.3.6 onedl-mmengine==0.10.12
$(MORE_HOSTS): ENVIRONMENT = build/$@
$(MORE_HOSTS):
	$(PYTHON) -m venv --clear $(ENVIRONMENT)
	$(ENVIRONMENT)/bin/python -m pip install --quiet --quiet --editable . pytest $(PACKAGES)
	$(SERIAL) $(ENVIRONMENT)/bin/python -m pytest tests/hosts/by_name -m slow
	rm -rf $(ENVIRONMENT)

# slow tests of exported files for ONNX Runtime, OpenVINO and LiteRT, in an environment of 7 GB that is removed afterwards.
# The other formats need environments of their own: TARGETS=executorch,ncnn or TARGETS=coreml
TARGETS := int8,litert
export-targets: ENVIRONMENT = build/export-targets
export-targets:
	$(PYTHON) -m venv --clear $(ENVIRONMENT)
	$(ENVIRONMENT)/bin/python -m pip install --quiet --quiet pytest pytest-timeout pytest-xdist scikit-image \
		--editable ".[export,$(TARGETS)]"
	$(SERIAL) $(ENVIRONMENT)/bin/python -m pytest -n 2 -m slow tests/test_export_targets.py \
		$(if $(findstring int8,$(TARGETS)),tests/test_export.py tests/test_export_graphs.py tests/test_export_comparison.py \
		tests/test_onnx_graphs.py -k "not every_model and not aoti")
	rm -rf $(ENVIRONMENT)

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# timm's model tests on our names: all names, or NAMES="spa_resnet50 spa_mobilenetv2"
timm-suite: $(READY)
	$(BIN)/python tests/timm_suite.py $(NAMES)

# writes build/timm_patch/spa.patch, which adds SPA-A to timm's newest source, and runs timm's tests with it
timm-patch: $(READY)
	$(BIN)/python docs/upstream/timm_patch.py

# the quick tests with the lowest versions that pyproject.toml allows, and with the newest compatible versions; each target
# creates its own environment of 6 GB, which `make clean` removes
test-lowest: VERSIONS := --extra app --no-deps --resolution lowest-direct
test-newest: VERSIONS := --extra test --resolution highest
test-lowest test-newest: ENVIRONMENT = build/$@
test-lowest test-newest:
	$(PYTHON) -m venv --clear $(ENVIRONMENT)
	$(ENVIRONMENT)/bin/python -m pip install --quiet setuptools uv
	$(ENVIRONMENT)/bin/uv pip compile pyproject.toml --extra train $(VERSIONS) --quiet \
		--python $(ENVIRONMENT)/bin/python --no-annotate --output-file $(ENVIRONMENT)/constraints.txt
	$(ENVIRONMENT)/bin/uv pip install --quiet --python $(ENVIRONMENT)/bin/python \
		--constraint $(ENVIRONMENT)/constraints.txt --editable ".[train,test]"
	$(SERIAL) PATH="$(CURDIR)/$(ENVIRONMENT)/bin:$$PATH" $(ENVIRONMENT)/bin/python -m pytest -m "not slow" -n 2

# writes components, licenses and digests of all dependencies of package and tests to build/sbom
sbom: $(READY)
	$(PYTHON) -m venv --clear build/sbom/tools
	build/sbom/tools/bin/python -m pip install --quiet cyclonedx-bom pip-licenses uv
	build/sbom/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file build/sbom/sbom.json $(BIN)/python
	build/sbom/tools/bin/pip-licenses --python $(BIN)/python --format csv --order license \
		--output-file build/sbom/licences.csv
	build/sbom/tools/bin/uv pip freeze --quiet --exclude-editable --python $(BIN)/python > build/sbom/versions.txt
	build/sbom/tools/bin/uv pip compile build/sbom/versions.txt --quiet --generate-hashes --no-deps --no-annotate \
		--no-header --python $(BIN)/python --output-file build/sbom/requirements.txt

# writes the generated tables of docs/models.md and docs/command_line.md
tables: $(READY)
	$(BIN)/python docs/tables.py

# builds the pages in build/docs, and fails on warnings and dead links
docs: $(READY)
	$(BIN)/python -m sphinx --fail-on-warning --quiet docs build/docs
	$(BIN)/python docs/dead_links.py build/docs

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet --editable ".[train,test]"
	touch $@ $(READY_FOR_DEMO)

# pip does not compile the modules: most of them are not imported by the demo
$(READY_FOR_DEMO): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile --editable ".[demo]"
	touch $@

$(HOSTS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --quiet --upgrade pip
	$(HOSTS)/bin/python -m pip install --quiet --quiet --editable ".[hosts]"
	touch $@

clean:
	rm -rf $(VENV) $(HOSTS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
