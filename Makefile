.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?=
ARGS ?=
WORKERS ?= 2
DATA ?= ../shared/data
POLICIES ?= jailbreak jailbreak-sae toxicity
bin := .venv/bin

.PHONY: help
help: ## List these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

.PHONY: install
install: ## Make .venv from locks/cpu.txt (nothing to do when that is done; PYTHON=… names an interpreter)
	@PYTHON="$(PYTHON)" locks/install.sh

.PHONY: run
run: install ## Start engine and gateway on 127.0.0.1:8000 (ARGS="--port 9000 …" for more)
	@exec $(bin)/mechctl serve $(ARGS)

.PHONY: test
test: install ## Run the tests, real engine included (ARGS="-m 'not engine'" leaves that out; see docs/testing.md)
	@$(bin)/python -m pytest -n $(WORKERS) --dist loadfile --durations=10 -m "not long" $(ARGS)

.PHONY: test-long
test-long: install ## Run the tests that take minutes each, one after another
	@$(bin)/python -m pytest --durations=10 -m long $(ARGS)

.PHONY: check
check: install ## Style, types, layers, lock: all that needs no model
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@cd tests && MYPYPATH=.. ../$(bin)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache/simulation -p simulation
	@$(bin)/lint-imports --no-logo --no-cache
	@$(bin)/python locks/lock.py check
	@$(bin)/python -m pytest -q tests/test_import_contract.py tests/test_lock.py

.PHONY: bench
bench: install ## What steering costs, against vLLM alone in the same run (result: benchmarks/results)
	@$(bin)/python -m benchmarks.steering $(ARGS)

.PHONY: bench-gateway
bench-gateway: install ## What the gateway adds, against the same requests sent direct (result: benchmarks/results)
	@$(bin)/python -m benchmarks.gateway $(ARGS)

.PHONY: cards
cards: install ## Measure the shipped policies anew and publish their Risk Cards (DATA=… the folder of public data)
	@for policy in $(POLICIES); do \
	  $(bin)/mechctl eval --policy $$policy --data-folder "$(DATA)" --max-tokens 40 --baseline-limit 60 \
	    --publish $(ARGS); \
	done

.PHONY: soak
soak: install ## Half an hour of mixed load and reloads: does anything grow? (ARGS="--minutes 5"; result: benchmarks/results)
	@$(bin)/python -m benchmarks.soak $(ARGS)

.PHONY: faults
faults: install ## Break one part after another under traffic; the last line tells what came of it
	@PYTHONPATH=tests/support $(bin)/python -m faults $(ARGS)

.PHONY: simulate
simulate: install ## Let everything go wrong in a simulation, seed by seed (ARGS="--seeds 10000"; "--seed 17" replays one)
	@PYTHONPATH=tests $(bin)/python -m simulation $(ARGS)

.PHONY: fuzz
fuzz: install ## Feed hostile bytes to every parser that meets any (FUZZ_EXAMPLES=20000 of them each)
	@FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-20000} $(bin)/python -m pytest -q tests/fuzz $(ARGS)

.PHONY: lock
lock: install ## Resolve pyproject.toml into locks/*.txt anew, keeping pins that still fit
	@$(bin)/python locks/lock.py

.PHONY: docs
docs: install ## Write the generated reference pages, the capacity tables and the dashboard anew
	@$(bin)/python -m interpretops.settings.reference > docs/configuration.md
	@$(bin)/mechctl policy reference > docs/policy-reference.md
	@$(bin)/python -m proxy.openai_api.fields_reference > docs/fields.md
	@$(bin)/python -m benchmarks.capacity --write docs/scaling.md
	@$(bin)/python deploy/grafana/generate.py > deploy/grafana/interpretops.json

.PHONY: clean
clean: ## Remove .venv and what tools left behind (the model cache stays)
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
