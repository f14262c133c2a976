# `make demo` and `make test` need Python ≥ 3.11 and pip; PYTHON=python3.12 selects another version.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo and the page need less than tests, lint and docs.
READY := $(VENV)/installed
DEVELOPMENT := $(VENV)/installed-for-development
# Processes share the cores, so each has one thread.
TEST_PROCESSES ?= 2

.PHONY: demo test check docs dist format docs-keys clean

demo: $(READY)
	$(BIN)/moma demo $(DEMO)

# Without bytecode each of the processes would compile all modules again.
test: check
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(TEST_PROCESSES)

check: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEVELOPMENT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site in site/; no broken link and no page outside the navigation.
docs: $(DEVELOPMENT)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and source distribution in dist/.
dist: $(DEVELOPMENT)
	$(BIN)/python -m build

# The tables of recipe keys in the docs, from the docstrings of the configurations.
docs-keys: $(READY)
	$(BIN)/moma schema --markdown > $(VENV)/keys.md
	sed -i -e '/<!-- keys: begin/,/<!-- keys: end/{//!d}' -e '/<!-- keys: begin/r $(VENV)/keys.md' docs/recipes.md

# The pip that comes with Python may need minutes to find versions that fit together.
$(READY): pyproject.toml constraints.txt
	@echo 'installing into $(VENV): about 2 GB, some minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,serve]'
	touch $(READY)

$(DEVELOPMENT): $(READY)
	@echo 'installing what tests, lint and docs need: about 1 GB'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[clean,demo,dev,docs,lm-eval,ray,s3,serve]'
	touch $(DEVELOPMENT)

# Not runs/: trained models stay.
clean:
	rm -rf $(VENV) site dist
