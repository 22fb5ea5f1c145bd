# What can be done with a checkout of dsmtpd; `make` lists it.
#
# PYTHON is the Python that the environment in VENV is made with, as in
#     PYTHON=python3.12 VENV=.venv-3.12 make test
# By default it is the one that mise or asdf offer here, else the python3 of the PATH.

VENV ?= .venv
BENCH_VENV ?= .venv-bench
PYTHON ?= $(shell mise which python3 2>/dev/null || asdf which python3 2>/dev/null || echo python3)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.install-timestamp
RECIPE := tests/recipes/github/tests.yml
BENCH_INSTALLED := $(BENCH_VENV)/.install-timestamp

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1#\2/p' $(MAKEFILE_LIST) | while IFS='#' read -r name text; \
	do printf '  %-12s %s\n' "$$name" "$$text"; done

.PHONY: run
run: $(INSTALLED) ## Start dsmtpd; ARGS holds its arguments.
	$(BIN)/dsmtpd $(ARGS)

.PHONY: install-dev
install-dev: $(INSTALLED) ## Make the environment and install the hooks: a clone is ready.
	$(BIN)/prek install

.PHONY: test
test: $(INSTALLED) ## Run the tests, with coverage in the terminal and in htmlcov/.
	$(BIN)/python -m pytest -n auto --dist worksteal --ignore tests/clients --ignore tests/recipes $(ARGS)

.PHONY: clients
clients: $(INSTALLED) ## Try mail clients, and what README.rst shows, after .ci/install-clients.
	$(BIN)/python -m pytest --no-cov -n auto --dist worksteal tests/clients tests/recipes $(ARGS)

.PHONY: promises
promises: $(INSTALLED) ## Prove the promises of README.rst, in Python's development mode.
	$(BIN)/python -X dev -W error -m pytest --no-cov tests/promises $(ARGS)

.PHONY: soak
soak: override ARGS += --soak
soak: promises ## Prove them at length, in about nine minutes.

.PHONY: lint
lint: $(INSTALLED) ## Check the code and the workflows.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/zizmor --offline --quiet .github $(RECIPE)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml $(RECIPE)
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

.PHONY: lint-fix
lint-fix: $(INSTALLED) ## Mend what can be mended, and format.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: format
format: $(INSTALLED) ## Format the code.
	$(BIN)/ruff format

.PHONY: typecheck
typecheck: $(INSTALLED) ## Check the types.
	$(BIN)/mypy

.PHONY: bench
bench: $(BENCH_INSTALLED) ## Measure speed and memory against other servers; ARGS holds its arguments.
	$(BENCH_VENV)/bin/python benchmarks/bench.py $(ARGS)

.PHONY: build
build: $(INSTALLED) clean-build ## Build the source distribution and the wheel in dist/.
	$(BIN)/python -m build

.PHONY: check-dist
check-dist: build ## Build, and check that the package index will take and render it.
	$(BIN)/twine check --strict dist/*

.PHONY: clean
clean: clean-build clean-venv ## Remove what has been built, and the environments.

.PHONY: clean-build
clean-build: ## Remove what has been built.
	rm -rf build dist htmlcov .coverage

.PHONY: clean-venv
clean-venv: ## Remove the environments.
	rm -rf $(VENV) $(BENCH_VENV) .venv-clients benchmarks/.cache

$(INSTALLED): pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt --editable .
	touch $@

# One of its own, in which the checkout is installed as users have it: in .venv, tools such as coverage
# hook into the start of Python.
$(BENCH_INSTALLED): pyproject.toml benchmarks/requirements.txt $(wildcard dsmtpd/*.py)
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --requirement benchmarks/requirements.txt .
	touch $@
