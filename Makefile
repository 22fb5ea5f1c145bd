# What can be done with a checkout of dsmtpd; `make` lists it.
#
# PYTHON is the Python that the environment in VENV is made with, as in
#     PYTHON=python3.12 VENV=.venv-3.12 make test
# By default it is the one that mise or asdf offer here, else the python3 of the PATH.

VENV ?= .venv
PYTHON ?= $(shell mise which python3 2>/dev/null || asdf which python3 2>/dev/null || echo python3)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.install-timestamp

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
	$(BIN)/python -m pytest $(ARGS)

.PHONY: lint
lint: $(INSTALLED) ## Check the code and the workflows.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
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

.PHONY: build
build: $(INSTALLED) clean-build ## Build the source distribution and the wheel in dist/.
	$(BIN)/python -m build

.PHONY: check-dist
check-dist: build ## Build, and check that the package index will take and render it.
	$(BIN)/twine check --strict dist/*

.PHONY: clean
clean: clean-build clean-venv ## Remove what has been built, and the environment.

.PHONY: clean-build
clean-build: ## Remove what has been built.
	rm -rf build dist htmlcov .coverage

.PHONY: clean-venv
clean-venv: ## Remove the environment.
	rm -rf $(VENV)

$(INSTALLED): pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt --editable .
	touch $@
