# `make demo` and `make test` are the two commands to know. Set PYTHON for another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests at a time, a file of them in each process.
WORKERS ?= 2
SOURCES := agl_trl tests examples model_cards spaces
# A folder with an installed torch for the environments of `make matrix`, which are several gigabytes each without it.
SHARE ?=

.PHONY: install demo test slow matrix lint fmt miniworld space-adapters space clean

# Reinstalled only when the project's own files change.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/agl-trl demo --output-dir outputs/demo

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

slow: install
	$(BIN)/python -m pytest -m slow

# Every set of versions in tests/matrix/constraints, in an environment of its own.
matrix: install
	$(BIN)/python -m tests.matrix $(if $(SHARE),--share-site-packages $(SHARE))

lint: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

fmt: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Rebuilds the embedded checkpoints that the package ships.
miniworld: install
	for size in large medium small; do $(BIN)/python -m agl_trl.miniworld.build --size $$size || exit 1; done

# Retrains the two adapters that the app shows by default.
space-adapters: install
	$(BIN)/python -m agl_trl.space.build

space: install
	$(BIN)/agl-trl space

clean:
	rm -rf $(VENV) build dist outputs *.egg-info
