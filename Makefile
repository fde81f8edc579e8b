PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
DEV := $(VENV)/.ready-dev
BROKER := $(patsubst docs/examples/shop/%.toml,%,$(filter docs/examples/shop/%.toml,$(EVENTBUS_CONFIG)))
DEMO := $(or $(wildcard $(DEV)),$(VENV)/.ready-demo$(BROKER:%=-%))
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q
TOO_OLD = eventbus needs Python 3.11 or newer, and $(PYTHON) is not: try make PYTHON=python3.13

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint bench bench-peers mutants brokers format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

setup: $(DEV) ## Install the development tools into .venv

demo: $(DEMO) ## Serve the example shop and print its address
	@$(BIN)/python docs/examples/shop/serve.py $(ARGS)

test: $(DEV) ## Run the tests, all but the long and the packaging ones
	@$(BIN)/python -m pytest -m "not long and not packaging" $(ARGS)

check: lint ## Run all that must pass before a change lands
	@$(BIN)/python -m pytest $(ARGS)

lint: $(DEV) ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/pyright --pythonpath $(BIN)/python

mutants: $(DEV) ## Break one line at a time and see that a test notices
	@$(BIN)/python -m tests.mutants $(ARGS)

bench: $(DEV) ## Print the benchmarks
	@$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(VENV)-peers/.ready ## Print this library beside its peers, in an environment that has them
	@$(VENV)-peers/bin/python -m benchmarks.peers $(ARGS)

brokers: $(DEV) ## Start the test servers that are installed, until Ctrl-C
	@$(BIN)/python -m tests.servers $(ARGS)

format: $(DEV) ## Rewrite the code in the house style
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

clean: ## Remove what these commands made
	rm -rf $(VENV) $(VENV)-peers .ci/venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "$(TOO_OLD)"; exit 1; }
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.ready-demo$(BROKER:%=-%): $(VENV)/.pip pyproject.toml constraints.txt
	@echo "Installing what the demo needs ..."
	@$(PIP) install -e '.$(BROKER:%=[%])' --group demo -c constraints.txt
	@touch $@

$(VENV)-peers/.ready: benchmarks/peers/requirements.txt
	@echo "Making $(VENV)-peers ..."
	@$(PYTHON) -m venv $(VENV)-peers
	@while read -r peer; do \
	    $(VENV)-peers/bin/python -m pip --disable-pip-version-check --no-input -q install "$$peer" || echo "could not be installed: $$peer"; \
	done < $<
	@touch $@

$(DEV): $(VENV)/.pip pyproject.toml constraints.txt
	@echo "Installing the development tools ..."
	@$(PIP) install -e . --group dev -c constraints.txt
	@touch $@
