# Tasks for a checkout of dsmtpd; `make` lists them.
#
# PYTHON is the Python to create the environment VENV with, as in
#     PYTHON=python3.12 VENV=.venv-3.12 make test
# By default, it is the one from mise or asdf if that is new enough, else python3 from the PATH.

VENV ?= .venv
RUN_VENV ?= .venv-run
BENCH_VENV ?= .venv-bench
export PYTHON

BIN := $(VENV)/bin
RECIPE := tests/recipes/github/tests.yml
# Some of the tests alone cannot reach full coverage.
COVERAGE ?= $(if $(ARGS),,--cov --cov-report=term-missing:skip-covered --cov-report=html)

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1#\2/p' $(MAKEFILE_LIST) | while IFS='#' read -r name text; \
	do printf '  %-12s %s\n' "$$name" "$$text"; done

.PHONY: run
run: ## Start dsmtpd; ARGS has its arguments.
	@.ci/environment $(RUN_VENV) --editable .
	$(RUN_VENV)/bin/dsmtpd $(ARGS)

.PHONY: environment
environment:
	@.ci/environment $(VENV) --requirement requirements-dev.txt --editable .

.PHONY: install-dev
install-dev: ## Create the environment and install the commit hooks.
	@git rev-parse --git-dir >/dev/null 2>&1 || \
	{ echo "No commit hooks to install, as this is not a Git repository: make test needs none" >&2; exit 1; }
	@$(MAKE) --no-print-directory environment
	install -m 755 .ci/pre-commit "$$(git rev-parse --git-path hooks)/pre-commit"

.PHONY: test
test: environment ## Run the tests and check the coverage; ARGS selects some tests.
	$(BIN)/python -m pytest -n auto --dist worksteal --ignore tests/clients --ignore tests/recipes \
	$(COVERAGE) $(ARGS)

.PHONY: clients
clients: environment ## Test mail clients and the snippets of README.rst, after .ci/install-clients.
	$(BIN)/python -m pytest -n auto --dist worksteal tests/clients tests/recipes $(ARGS)

.PHONY: promises
promises: environment ## Prove the promises of README.rst in Python's development mode.
	$(BIN)/python -X dev -W error -m pytest tests/promises $(ARGS)

.PHONY: soak
soak: override ARGS += --soak
soak: promises ## Prove them at length, for about nine minutes.

.PHONY: lint
lint: environment ## Check the code and the workflows.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/zizmor --offline --quiet .github $(RECIPE)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml $(RECIPE)
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

.PHONY: lint-fix
lint-fix: environment ## Fix what ruff can fix, and format the code.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: format
format: environment ## Format the code.
	$(BIN)/ruff format

.PHONY: typecheck
typecheck: environment ## Check the types, as on Linux, macOS and (without the tests) Windows.
	$(BIN)/mypy --platform linux
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 dsmtpd

.PHONY: bench
bench: ## Compare speed and memory with other servers, for about six minutes.
	@.ci/environment $(BENCH_VENV) --editable .
	$(BENCH_VENV)/bin/python benchmarks/bench.py $(ARGS)

.PHONY: build
build: environment clean-build ## Build the source distribution and the wheel in dist/.
	$(BIN)/python -m build

.PHONY: check-dist
check-dist: build ## Build, and check that the package index will accept and render it.
	$(BIN)/twine check --strict dist/*

.PHONY: clean
clean: clean-build clean-venv ## Remove build results and environments.

.PHONY: clean-build
clean-build: ## Remove build results.
	rm -rf build dist htmlcov .coverage

.PHONY: clean-venv
clean-venv: ## Remove the environments.
	rm -rf $(VENV) $(RUN_VENV) $(BENCH_VENV) .venv-clients benchmarks/.cache
