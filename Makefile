# What can be done with a checkout of dsmtpd; `make` lists it.
#
# PYTHON is the Python that the environment in VENV is made with, as in
#     PYTHON=python3.12 VENV=.venv-3.12 make test
# By default it is the one that mise or asdf offer here if it is new enough, else the python3 of the PATH.

VENV ?= .venv
RUN_VENV ?= .venv-run
BENCH_VENV ?= .venv-bench
export PYTHON

BIN := $(VENV)/bin
RECIPE := tests/recipes/github/tests.yml
# Some of the tests cannot show that each line is tested.
COVERAGE ?= $(if $(ARGS),,--cov --cov-report=term-missing:skip-covered --cov-report=html)

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1#\2/p' $(MAKEFILE_LIST) | while IFS='#' read -r name text; \
	do printf '  %-12s %s\n' "$$name" "$$text"; done

.PHONY: run
run: ## Start dsmtpd; ARGS holds its arguments.
	@.ci/environment $(RUN_VENV) --editable .
	$(RUN_VENV)/bin/dsmtpd $(ARGS)

.PHONY: environment
environment:
	@.ci/environment $(VENV) --requirement requirements-dev.txt --editable .

.PHONY: install-dev
install-dev: ## Make the environment and install the hooks: a clone is ready.
	@git rev-parse --git-dir >/dev/null 2>&1 || \
	{ echo "This is no clone of the repository, so there are no commits to check" >&2; exit 1; }
	@$(MAKE) --no-print-directory environment
	install -m 755 .ci/pre-commit "$$(git rev-parse --git-path hooks)/pre-commit"

.PHONY: test
test: environment ## Run the tests, and show each line that none runs; ARGS picks some of them.
	$(BIN)/python -m pytest -n auto --dist worksteal --ignore tests/clients --ignore tests/recipes \
	$(COVERAGE) $(ARGS)

.PHONY: clients
clients: environment ## Try mail clients, and what README.rst shows, after .ci/install-clients.
	$(BIN)/python -m pytest -n auto --dist worksteal tests/clients tests/recipes $(ARGS)

.PHONY: promises
promises: environment ## Prove the promises of README.rst, in Python's development mode.
	$(BIN)/python -X dev -W error -m pytest tests/promises $(ARGS)

.PHONY: soak
soak: override ARGS += --soak
soak: promises ## Prove them at length, in about nine minutes.

.PHONY: lint
lint: environment ## Check the code and the workflows.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/zizmor --offline --quiet .github $(RECIPE)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml $(RECIPE)
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

.PHONY: lint-fix
lint-fix: environment ## Fix what can be fixed, and format.
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
bench: ## Measure speed and memory against other servers; ARGS holds its arguments.
	@.ci/environment $(BENCH_VENV) --editable .
	$(BENCH_VENV)/bin/python benchmarks/bench.py $(ARGS)

.PHONY: build
build: environment clean-build ## Build the source distribution and the wheel in dist/.
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
	rm -rf $(VENV) $(RUN_VENV) $(BENCH_VENV) .venv-clients benchmarks/.cache
