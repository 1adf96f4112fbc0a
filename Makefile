# The same entry points for people and for CI. Needs python3 (3.11 or newer) and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The trackers that the bench compares with: an environment of their own, which nothing else sees.
PEERS := .venv-bench
PEERS_PIP := $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# DASHBOARD=0: `make demo` ends after the reports.
DASHBOARD ?= 1

.PHONY: help demo test check bench corpus evaluate clean

help:
	@echo "make demo    train the demonstration runs, print their reports, serve the dashboard (DASHBOARD=0: do not)"
	@echo "make test    run the tests"
	@echo "make check   lint, format, types, content of the wheel"
	@echo "make bench   print what the measurements, the recorder and the store cost, beside other trackers"
	@echo "make corpus  train what is missing of the corpus, label and pack it (half an hour from nothing on two cores)"
	@echo "make evaluate  score the detectors on the corpus beside other rules, write the figures into the README"
	@echo "make clean   remove what the above made, runs excepted"

demo: $(VENV)/.installed
	$(BIN)/diagnostics demo $(if $(filter 0,$(DASHBOARD)),--no-dashboard)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_wheel.py
	$(BIN)/python -m sample_runs.evaluate --check

# tests/bench/store_*.py are the parts of store.py.
bench: $(VENV)/.installed-dev $(PEERS)/.installed
	@set -e; for file in $(filter-out tests/bench/store_%,$(sort $(wildcard tests/bench/*.py))); do \
		echo "== $$file"; $(BIN)/python "$$file"; done

# Resumable: a run that is finished and whose recipe is the same is left alone. ONLY='gpt-*' chooses, JOBS=1 goes easy.
corpus: $(VENV)/.installed-corpus
	$(BIN)/python -m sample_runs.corpus.make --only '$(or $(ONLY),*)' $(if $(JOBS),--jobs $(JOBS))

# From the committed tables, a few minutes. CHECK=1: only say whether the figures are those of the present sources;
# BANDS=1: fit the bands that ship first.
evaluate: $(VENV)/.installed
	$(BIN)/python -m sample_runs.evaluate $(if $(CHECK),--check) $(if $(BANDS),--write-bands)

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find diagnostics app cli tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: pip then takes the pinned build where one lies at hand, and nothing that follows
# can make it choose another.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev,zoo]'
	touch $@

$(VENV)/.installed-corpus: $(VENV)/.installed
	$(PIP) -e '.[corpus]'
	touch $@

# One after the other: the bench says of a tracker that cannot be installed that it was not measured, and why.
$(PEERS)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m venv $(PEERS)
	$(PEERS_PIP) torch
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"], sep="\n")' \
		| while read -r peer; do $(PEERS_PIP) "$$peer" || echo "$$peer cannot be installed here"; done
	touch $@
