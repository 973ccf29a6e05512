# Needs Python 3.11 or later with its venv module, and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-long soak check format bench guests clean

demo: $(VENV)/.run
	$(BIN)/dirtylog demo --force --output demo.png

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# Also the tests of processes that are slow, or that other load upsets.
test-long: $(VENV)/.dev
	DIRTYLOG_LONG=1 $(BIN)/python -m pytest

# Ten million page reports of a process that churns, and of buffers of this process, against copies; some minutes.
soak: $(VENV)/.dev
	$(BIN)/python tests/soak_processes.py

check: $(VENV)/.dev
	$(BIN)/ruff format --diff .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python bench/run.py

# Rebuilds the guest programs; needs the cross binutils that .ci/run installs.
guests: $(VENV)/.dev
	$(BIN)/python tests/assemble.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dirtylog needs Python 3.11 or later, but $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.build: $(VENV)/.venv constraints.txt
	$(PIP) hatchling editables
	touch $@

$(VENV)/.run: $(VENV)/.build pyproject.toml
	$(PIP) --no-build-isolation --editable '.[emu,plot,elf]'
	touch $@

$(VENV)/.dev: $(VENV)/.build pyproject.toml
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@ $(VENV)/.run
