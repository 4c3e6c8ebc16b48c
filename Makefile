# Every target makes the virtual environment it needs. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A process per core; a process that is done takes over tests of another.
PARALLEL := -n auto --dist worksteal
# FOLLOW=--follow-lines also does what each printed fix: and next: line says; make check sets it.
FOLLOW ?=
# SLOW="slow and not long" leaves out the longest; CI sets it.
SLOW ?= slow

.PHONY: demo test slow lint check torture faults clean

# The six commands on handwritten digits: data, training, tables, pictures.
demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/demo.sh demo

# What a change breaks first: all but the tests marked slow.
test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) $(FOLLOW) -m "not slow"

# Sweeps of damage, kills, ranks, jobs, the browser, whole runs: the rest of the tests.
slow: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) $(FOLLOW) -m "$(SLOW)"

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: FOLLOW := --follow-lines
check: lint test slow

# Two hundred SIGKILLs in all phases, each followed by the same command: prints kills, resumes, differences.
torture: $(READY)
	$(BIN)/python tests/torture.py

faults: $(READY)
	$(BIN)/python tests/faults.py

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("cpmix needs Python 3.11 or newer: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo build dist
