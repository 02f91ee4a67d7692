# `make` checks what a change must pass. PYTHON is the interpreter of an environment with the dev extra.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: all dev links lint types test bench docs

all: lint types test

dev:  ## a virtual environment, the package in it (editable), the checkers' links, the git hook
	python3 -m venv .venv
	.venv/bin/python -m pip install --editable '.[dev]'
	$(MAKE) links
	if git rev-parse --git-dir >/dev/null 2>&1; then .venv/bin/pre-commit install; fi

links:  ## mypy and editors cannot follow the package map of pyproject.toml: two untracked links
	ln -sfn ../backbones stbench/backbones
	ln -sfn ../recipes stbench/recipes

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: links
	$(PYTHON) -m mypy stbench examples

test:
	$(PYTHON) -m pytest

bench:  ## timings only
	$(PYTHON) -m pytest tests/benchmarks -m benchmark --benchmark-enable

docs:  ## docs/cli.md from the command line's own help
	$(PYTHON) -m typer stbench.cli.app utils docs --name stbench --output docs/cli.md
