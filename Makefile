# make train   set up everything and run the main job on real text
# make test    set up everything and run lint, types, import floors and tests
# make test-all    the long tests too
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/sample
PROCESSES ?= 2

.PHONY: setup train test test-all lint clean

setup: $(VENV)/.installed

# torch first and alone: the version is pinned, so that no newer, larger build is pulled in by another package.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "narrowgauge needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sample,dev]'
	touch $@

train: setup
	$(BIN)/python scripts/prepare_data.py data=sample
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m trainer run.dir=$(RUN_DIR)

# Two workers share the cores: threads that wait must not spin.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

test-all: TESTS = -m ""
test-all: test

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
