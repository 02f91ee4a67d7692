# `make` runs the checks that a change must pass. PYTHON is the interpreter of an environment with the dev extra.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
BROWSER = chromium chromium-driver
SLURM = slurmctld slurmd slurm-client munge

.PHONY: all dev links lint types test slow slurm-test browser-test coverage bench docs

all: lint types test

dev:  ## create a virtual environment with an editable install, the links and the git hook
	python3 -m venv .venv
	.venv/bin/python -m pip install --editable '.[dev]'
	$(MAKE) links
	if git rev-parse --git-dir >/dev/null 2>&1; then .venv/bin/pre-commit install; fi

links:  ## mypy, import-linter and editors do not follow the package map of pyproject.toml: two untracked links
	ln -sfn ../backbones stbench/backbones
	ln -sfn ../recipes stbench/recipes

lint: links  ## style and import rules
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	PYTHONPATH=. $(dir $(PYTHON))lint-imports

types: links
	$(PYTHON) -m mypy stbench examples

test:
	$(PYTHON) -m pytest

slow:  ## tests that take minutes
	$(PYTHON) -m pytest -m "slow and not benchmark"

slurm-test:  ## install Slurm from the distribution (needs root) and run a sweep on a cluster of two nodes
	for program in slurmctld slurmd sbatch munged; do command -v $$program >/dev/null || missing=1; done; \
	  [ -z "$$missing" ] || { apt-get update && apt-get install --yes --no-install-recommends $(SLURM); }
	$(PYTHON) -m pytest --numprocesses 0 -m "slow or not slow" -v tests/sweep/test_slurm*.py

browser-test:  ## install Chromium from the distribution (needs root) and test the report page in it
	for program in chromium chromedriver; do command -v $$program >/dev/null || missing=1; done; \
	  [ -z "$$missing" ] || { apt-get update && apt-get install --yes --no-install-recommends $(BROWSER); }
	$(PYTHON) -m pip install --quiet 'selenium>=4.25'
	$(PYTHON) -m pytest --numprocesses 0 -m "slow or not slow" -v tests/report/test_browser.py

coverage:  ## the default tests, with coverage of the three packages
	$(PYTHON) -m pytest --cov --cov-report=term:skip-covered

bench:  ## timings only
	$(PYTHON) -m pytest tests/benchmarks -m benchmark --benchmark-enable --numprocesses 0

docs:  ## generate docs/cli.md from the help of the command line
	$(PYTHON) -m typer stbench.cli.app utils docs --name stbench --output docs/cli.md
