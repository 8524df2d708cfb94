# make demo          environment, install, then one prompt with and without acceleration
# make test          environment, lint, types, and the tests that take seconds: every module
# make test-all      lint, types and every test: also wheels, browser, compilers, several processes,
#                    whole examples, and every supported family of models
# make pictures      every picture in assets/ anew: the contact sheet, the page, figures from numbers
# make test-oldest   the tests of the supported models again, with the oldest supported Diffusers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on
OLDEST := diffusers==0.38.0
# A process per core, a file of tests at a time: fixtures that a file shares are made once.
PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadfile

.PHONY: demo pictures test test-all test-oldest lint clean

demo: $(VENV)/installed-demo
	$(BIN)/vidaccel generate --compare --out out/demo.mp4

# The page's picture needs Chromium.
pictures: $(VENV)/installed-dev
	$(BIN)/python assets/draw_figures.py
	$(BIN)/vidaccel generate --compare --out out/pictures.mp4
	cp out/pictures-contact-sheet.png assets/demo-contact-sheet.png
	$(BIN)/python assets/photograph_page.py

test: lint
	$(PYTEST) -m "not slow and not browser and not repeats"

test-all: lint
	$(PYTEST)

# Diffusers alone, laid over the environment: everything else stays what it is.
test-oldest: $(VENV)/installed-oldest
	PYTHONPATH=$(abspath $(VENV))/oldest $(PYTEST) tests/engine/test_engine.py \
	  tests/engine/test_step_tracker.py tests/integration/test_dbcache.py \
	  tests/integration/test_families.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist out *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vidaccel needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: installing again only happens when pyproject.toml changes.
$(VENV)/installed-demo: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -e ".[metrics,demo]"
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -e ".[metrics,demo,plot,ray,bench,dev]"
	@touch $@ $(VENV)/installed-demo

$(VENV)/installed-oldest: $(VENV)/installed-dev Makefile
	rm -rf $(VENV)/oldest
	$(INSTALL) --no-deps --target $(VENV)/oldest $(OLDEST)
	@touch $@
