PYTHON ?= python3
BIN := .venv/bin
DATA ?=
OUT ?= demo
WONDERS := $(wildcard ../shared/data/wonders11.tar)
TRUTH := ../shared/data/groundtruth/wonders11/gnd_wonders11.pkl

.DEFAULT_GOAL := help
.PHONY: help demo cluster-demo test test-slow chaos check format serve-demo bench bench-distractors clean

help: ## show this
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# Made when it is missing, and again when what it is made from has changed.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "iir_dist needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (once; a few minutes, about 8 GB with the GPU builds of torch and faiss)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.stamp ## raw photos to a report on this machine; DATA=DIR for real photos
	$(BIN)/iir demo --out $(OUT) $(if $(DATA),--data $(DATA))

serve-demo: .venv/.stamp ## search by photo: an address where a photo finds its landmark
	$(BIN)/python -m iir_dist.serve.demo --out serve-demo $(if $(WONDERS),--photos $(WONDERS) --groundtruth $(TRUTH))
	@echo "photos to search with: serve-demo/queries"
	$(BIN)/iir serve serve-demo/index --images serve-demo/images --encoder serve-demo/encoder --local

test: .venv/.stamp ## the tests: CPU, offline, deterministic
	$(BIN)/python -m pytest

test-slow: .venv/.stamp ## the tests that take minutes; real photos where ../shared/data is there
	$(BIN)/python -m pytest -m slow

chaos: .venv/.stamp ## kill nodes, drivers, heads and the store in the middle of every step; a table of what it cost
	rm -f chaos.jsonl
	CHAOS_TABLE=chaos.jsonl $(BIN)/python -m pytest -m chaos -o timeout=1800 tests/cluster
	$(BIN)/python tests/cluster/fault_table.py chaos.jsonl

cluster-demo: .venv/.stamp ## the demo as a job on three nodes that lose one; its figures against those of this machine alone
	$(BIN)/python tests/cluster/demo.py --out cluster-demo $(if $(DATA),--data $(DATA),$(if $(WONDERS),--data ../shared/data))

check: .venv/.stamp ## lint, format, types, deployment files; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/infra

format: .venv/.stamp ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.stamp ## seconds and peak memory of each stage; DATA=DIR for real photos
	$(BIN)/python benchmarks/chain.py $(if $(DATA),--data $(DATA))

bench-distractors: .venv/.stamp ## mAP and cost of search among up to a million distractors; DATA=DIR with the real photos
	$(BIN)/python benchmarks/distractors.py $(if $(DATA),--data $(DATA)) --out bench-distractors

clean: ## remove the environment, the demo's output and all caches
	rm -rf .venv demo cluster-demo chaos.jsonl serve-demo bench-distractors .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
