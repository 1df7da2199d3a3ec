# Everything a person or CI does here is a target; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup up test check bench soak gen lock openapi clean node emulators static format lint types pyright imports fast light debian

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# auto: a GPU engine where there is a GPU. `make setup ENGINE=cpu` overrules it.
ENGINE ?= auto
JOBS ?= 2
BIN := .venv/bin
NODE := tests/scenarios/node
DEBIAN := build/debian
XFS := xfsprogs libinih1 liburcu8
EMULATORS := tests/emulators/node
# Some environments, containers above all, forbid Python to keep compiled modules, and uv installs none: every process
# would compile anew what it imports, which for vLLM takes longer than to load it.
unexport PYTHONDONTWRITEBYTECODE
# Its wrapper asks PyPI for a newer version at each run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
PYTEST := $(BIN)/python -m pytest
# What loads a model or starts a mesh uses all cores, and waits: one of each at a time has the machine to itself. The rest
# runs in several processes.
LIGHT := not soak and not real_model and not scenario
HEAVY := not soak and (real_model or scenario)
# With ARGS="-k name" one of the two parts may have no such test.
OR_NONE = $(if $(ARGS),|| [ $$? -eq 5 ])

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create .venv and install everything that is locked (instant when nothing changed)
	@$(PYTHON) requirements/install.py --engine $(ENGINE)

up: setup ## Start the whole mesh on this machine; ARGS="--detach" and so on are passed on
	@$(BIN)/helios up $(ARGS)

# The light tests wait about as much as they compute, and the static checks take what they leave. All of it is run
# whatever of it fails.
test: setup node emulators debian ## Everything CI runs: static checks, then all tests with real processes and the real model
	@lights=0; $(MAKE) --no-print-directory -j$(JOBS) --keep-going light static || lights=$$?; \
	  { $(PYTEST) -n 2 --dist loadgroup -m "$(HEAVY)" --junit-xml=build/junit.xml $(ARGS) $(OR_NONE); } && exit $$lights

check: setup ## Static checks and the fast tests
	@$(MAKE) --no-print-directory -j$(JOBS) --output-sync=target --keep-going fast static

bench: setup ## Run the benchmarks, write build/bench.json, compare with tests/benchmarks/bars.toml
	@$(BIN)/python -m tests.benchmarks $(ARGS)

soak: setup node emulators ## The long forms of fault and cycle tests
	@mkdir -p build
	@$(PYTEST) -m soak --timeout 3600 --junit-xml=build/soak.xml $(ARGS)

gen: setup ## Regenerate gen/ from proto/
	@$(BIN)/python -m proto.generate

lock: setup ## Rewrite requirements/*.lock from pyproject.toml; UPGRADE=1 takes the newest versions
	@$(BIN)/python -m requirements.compile $(if $(UPGRADE),--upgrade)

openapi: setup ## Write build/openapi.json from the contracts
	@$(BIN)/python -m proto.openapi

clean: ## Remove what was built; .venv stays (rm -r .venv removes it)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis $(NODE)/node_modules $(EMULATORS)/node_modules
	find proto gen proxy worker storage registry mesh tests requirements -name __pycache__ -type d -prune -exec rm -rf {} +

# The parts of `test` and `check`; --output-sync prints each one's output in one piece.
static: pyright types lint format imports

format:
	@$(BIN)/ruff format --quiet --diff . || { echo "format: run .venv/bin/ruff format"; exit 1; }

lint:
	@$(BIN)/ruff check --quiet .

types:
	@$(BIN)/mypy --no-error-summary

pyright:
	@$(BIN)/pyright --warnings

imports:
	@$(BIN)/lint-imports --no-logo > build/imports.txt 2>&1 || { cat build/imports.txt; exit 1; }

fast: MARKS := $(LIGHT) and not slow
light: MARKS := $(LIGHT)
fast light:
	@mkdir -p build
	@$(PYTEST) -q -n $(JOBS) --dist worksteal -m "$(MARKS)" -p no:cacheprovider --junit-xml=build/junit-light.xml $(ARGS) $(OR_NONE)

debian: $(DEBIAN)/usr/bin/docker-registry $(DEBIAN)/sbin/mkfs.xfs

# Servers that no other place has, unpacked without being installed. Lists of packages may be missing in a container.
$(DEBIAN)/usr/bin/docker-registry:
	@mkdir -p $(DEBIAN)
	@cd $(DEBIAN) && { apt-get -qq download docker-registry || { apt-get -qq update && apt-get -qq download docker-registry; }; } 2> apt.log \
	  && dpkg -x docker-registry_*.deb . || { cat apt.log; echo "debian: one test that needs docker-registry will fail"; }

# Blocks that files share need a file system that can. Its test is skipped where nothing may be mounted, and nowhere else.
$(DEBIAN)/sbin/mkfs.xfs:
	@mkdir -p $(DEBIAN)
	@cd $(DEBIAN) && { apt-get -qq download $(XFS) || { apt-get -qq update && apt-get -qq download $(XFS); }; } 2> xfs.log \
	  && for package in $(XFS); do dpkg -x $${package}_*.deb .; done || { cat xfs.log; echo "debian: one test that needs xfsprogs will fail"; }

node: setup $(NODE)/node_modules/.package-lock.json

# Azurite, which brings 245 MB.
emulators: setup $(EMULATORS)/node_modules/.package-lock.json

%/node_modules/.package-lock.json: %/package-lock.json
	@cd $* && PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --silent
	@touch $@
