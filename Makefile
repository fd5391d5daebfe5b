# Every target makes what it needs: `make demo` and `make test` work in a fresh clone.
#
#   PYTHON=python3.12   interpreter for the environment
#   PIP_ARGS=...        extra arguments for pip, e.g. an index of CPU-only torch wheels
#   ARGS=...            extra arguments for pytest, the demo or the benchmarks, e.g. make test ARGS="-x -k losses"

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DEMO := configs/synthetic/sdxl_diffusion_dpo_anchored_full.yaml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-learning lint format bench assets

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with mmalign (editable) and the development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"mmalign is tested on Python 3.11 and newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## align the bundled tiny SDXL on a CPU; prints the grid, the report and the headline
	$(BIN)/mmalign train $(DEMO) output_dir=runs/demo $(ARGS)

test: $(STAMP) ## every test but the learning matrix; tests that need a GPU are listed as skipped
	$(BIN)/python -m pytest -m "not learning" $(ARGS)

test-learning: $(STAMP) ## train on the tiny world over three seeds and require measured gains
	$(BIN)/python -m pytest -m learning $(ARGS)

lint: $(STAMP) ## ruff, mypy and codespell, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## side-by-side benchmarks, one of them against trl; they print ratios
	@$(BIN)/python -c 'import trl' 2>/dev/null || \
	  $(BIN)/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python bench/run.py $(ARGS)

assets: $(STAMP) ## train the bundled tiny models again (a CPU is enough)
	$(BIN)/python assets/build/all.py $(ARGS)
