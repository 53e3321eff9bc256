SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

DEPS := settings.ini setup.py constraints.txt
PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder# else the longest file, of few tests, comes last
WRITTEN := tests setup.py# spd/ is generated: ruff checks it, but never formats it

.PHONY: help install install-dev run bench test test-all check type format docs-check clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

install: .venv/installed  ## Create .venv and install the package in it

install-dev: .venv/installed-dev  ## The same with the development tools and the pre-commit hooks
	@if test -e .git; then pre-commit install; fi

run: .venv/installed  ## Main job: train a ResidMLP, decompose it, say whether the result is right
	@echo 'This takes six to ten minutes. To follow it from another terminal: tail -f runs/*/training.log'
	papermill nbs/10_resid_mlp.ipynb out.ipynb -p n_layers 2
	@spd-run report out.ipynb

bench: .venv/installed  ## Time steps, memory, compiling, importing and logging on this machine: about ten minutes
	papermill nbs/90_benchmarks.ipynb out.ipynb

test test-all: export OMP_NUM_THREADS := 1# as many run side by side as there are cores; their threads would wait for each other

test: .venv/installed-dev  ## Notebooks and tests, without the slow ones
	nbdev_test
	$(PYTEST) -m "not slow"

test-all: .venv/installed-dev  ## Notebooks and tests, all of them
	nbdev_test --flags slow
	$(PYTEST)

check: .venv/installed-dev  ## pre-commit on all files: nbdev_clean, ruff, pyright
	pre-commit run --all-files

type: .venv/installed-dev  ## pyright on all files
	pyright

format: .venv/installed-dev  ## ruff formatter and fixes on the files written by hand
	ruff format $(WRITTEN)
	ruff check --fix $(WRITTEN)

docs-check: .venv/installed-dev  ## Process every notebook as the docs site does (needs no Quarto)
	pytest tests/test_docs.py

clean:  ## Remove what was built, except .venv
	rm -rf _proc _docs build *.egg-info .pytest_cache .ruff_cache nbs/nbdev.yml nbs/sidebar.yml
	find spd tests -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "Could not make .venv. On Debian: apt-get install python3 python3-venv (Python 3.11 or newer)" >&2; exit 1; }

.venv/installed: $(DEPS) | .venv/bin/pip
	@echo 'Installing into .venv: a few minutes the first time'
	pip install -q -c constraints.txt -e .
	@touch $@

.venv/installed-dev: $(DEPS) | .venv/bin/pip
	@echo 'Installing into .venv: a few minutes the first time'
	pip install -q -c constraints.txt -e ".[dev]"
	@touch .venv/installed $@
