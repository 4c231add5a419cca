# The checks that CI and pre-commit run: `make check` for all of them.
# `make reference` writes docs/reference anew after flags, signatures or docstrings have changed.
PYTHON ?= python

.PHONY: check format format-check lint types test reference

check: format-check lint types test

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix-only --quiet .

format-check:
	$(PYTHON) -m ruff format --check .

lint:
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

reference:
	$(PYTHON) docs/reference/write.py
