# make demo   environment, install, then one prompt with and without acceleration
# make test   environment, lint, types, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on

.PHONY: demo test lint clean

demo: $(VENV)/installed-demo
	$(BIN)/vidaccel generate --compare --out out/demo.mp4

test: lint
	$(BIN)/python -m pytest

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
	$(INSTALL) -e ".[metrics]"
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -e ".[metrics,demo,dev]"
	@touch $@ $(VENV)/installed-demo
