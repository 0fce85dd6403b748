# A fresh machine needs Python 3.10 or newer with pip, and one of these two commands:
#   make demo   ask the assistant a question that it answers with a tool
#   make test   run all tests on two cores (make test-unit: those that need no model, in about a minute)
# Both make .venv first and use it again afterwards; it is brought up to date when pyproject.toml or constraints.txt
# change. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Tests of one file share their models, so they stay on one core.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: demo test test-dtypes test-unit lint format clean

# With a terminal the assistant answers a first request and stays; without one it answers three and ends.
demo: $(INSTALLED)
	@if [ -t 0 ] && [ -t 1 ]; then \
		$(BIN)/loragen-agents chat --root examples/files --stay "Compute 17 * 23"; \
	else \
		printf '%s\n' "Compute 17 * 23" "Convert 5 miles to kilometres" "Read the file shopping.txt" \
			| $(BIN)/loragen-agents chat --root examples/files --lines; \
	fi

test: $(INSTALLED)
	$(PYTEST)

# All tests in both dtypes: what dtype="auto" stands for depends on the CPU, and CI may have either kind.
test-dtypes: $(INSTALLED)
	LORAGEN_AGENTS_DTYPE=float32 $(PYTEST)
	LORAGEN_AGENTS_DTYPE=bfloat16 $(PYTEST)

test-unit: $(INSTALLED)
	$(PYTEST) tests/unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy loragen_agents tests
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and alone, so that pip settles on the pinned build before anything else asks for one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes some minutes"
	$(PIP) torch
	$(PIP) --editable ".[dev]"
	@touch $@
