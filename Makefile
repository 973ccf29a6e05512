# Needs Python 3.11 or later with its venv module, and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-long soak fuzz mutants explore check format bench guests clean

demo: $(VENV)/.run
	$(BIN)/dirtylog demo --force --output demo.png

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# Also the tests of processes that are slow, or that other load upsets.
test-long: $(VENV)/.dev
	DIRTYLOG_LONG=1 $(BIN)/python -m pytest

# Every source for its share of SECONDS, its writers never stopped, against an oracle; COUNT= bounds the page reports, SOURCES= chooses.
SECONDS ?= 300
soak: $(VENV)/.dev
	$(BIN)/python tests/soak.py --seconds $(SECONDS) $(if $(COUNT),--count $(COUNT)) $(if $(SOURCES),--sources $(SOURCES)) $(if $(SEED),--seed $(SEED)) $(if $(JSON),--json $(JSON))

# The properties of the fuzz tests under atheris, each for FUZZ_SECONDS. atheris has wheels for few Pythons, so it is apart from the rest.
FUZZ_SECONDS ?= 20
FUZZ := $(VENV)/fuzz
fuzz: $(FUZZ)/.installed
	$(FUZZ)/bin/python tests/fuzz/guided.py $(FUZZ_SECONDS)

# Every order of steps that can matter, with the stories of those that lose writes: docs/ordering.md.
explore: $(VENV)/.dev
	$(BIN)/python tests/explore.py

# Bugs that dirty page logging has had, put one by one into a copy of the source: the tests must notice each; five minutes.
mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py $(if $(JSON),--json $(JSON))

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

$(FUZZ)/.installed: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/python -m venv $(FUZZ)
	$(subst $(BIN),$(FUZZ)/bin,$(PIP)) --editable '.[emu,elf]' hypothesis pytest atheris==3.0.0
	touch $@

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dirtylog needs Python 3.11 or later, but $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.build: $(VENV)/.venv constraints.txt
	$(PIP) hatchling editables
	touch $@

$(VENV)/.run: $(VENV)/.build pyproject.toml
	$(PIP) --no-build-isolation --editable '.[emu,plot,elf,tui,report]'
	touch $@

$(VENV)/.dev: $(VENV)/.build pyproject.toml
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@ $(VENV)/.run
