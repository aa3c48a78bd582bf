# From a clean clone and Python 3.11 or later, each target installs what it needs in $(VENV), once.

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    ?= .venv
RESULTS ?= results
WORKERS ?= 2
# Tests of processes wait for each other: on two cores a third worker fills the gaps.
TEST_WORKERS ?= 3

python := $(VENV)/bin/python
program := $(python) -m continuous_lm # NAME --flags
pytest := $(python) -m pytest -n $(TEST_WORKERS) --dist loadfile # fixtures are made once a file

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips in one environment get in each other's way
.DELETE_ON_ERROR:

# `make help` prints the headings that start with `##`, and each target with the text after its `##`.
.PHONY: help
help: ## List the commands
	@awk -F ':.*## ' '/^## / { print "\n" substr($$0, 4) } /^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

## First steps

.PHONY: counting
counting: $(VENV)/.has-runtime ## Shrink four apples and see the bundled model count them
	$(program) counting --output_dir=$(RESULTS)/counting

.PHONY: report
report: $(VENV)/.has-runtime ## Run every experiment on the bundled model and write one page
	$(program) report --output_dir=$(RESULTS)/report

## Recipes: the programs behind the tables of docs/

# Recipes of experiments/recipes/; text files: make calm DATA=a.txt,b.txt
DATA  ?=
WORDS ?= file,path,directory
recipe := $(program) recipe $(if $(DATA),--data=$(DATA)) --words=$(WORDS)
.PHONY: calm calm-full next-vector next-vector-full embedded
calm: $(VENV)/.has-runtime ## Small density models of text: train, sample, evaluate (3 minutes)
	$(recipe) --name=calm --output_dir=$(RESULTS)/calm
calm-full: $(VENV)/.has-runtime ## The tables of density models (under an hour)
	$(recipe) --name=calm_full --output_dir=$(RESULTS)/calm-full
next-vector: $(VENV)/.has-runtime ## Small next-vector models, K = 4: train, sample, evaluate (8 minutes)
	$(recipe) --name=next_vectors --output_dir=$(RESULTS)/next-vector
next-vector-full: $(VENV)/.has-runtime ## The tables of next-vector models (under an hour)
	$(recipe) --name=next_vectors_full --output_dir=$(RESULTS)/next-vector-full
embedded: $(VENV)/.has-runtime ## Train the bundled model again with three seeds
	$(recipe) --name=embedded --output_dir=$(RESULTS)/embedded

## Speed and devices

.PHONY: benchmark
benchmark: $(VENV)/.has-peers ## Measure speed against PyTorch, transformers and faiss
	$(program) benchmark --output_dir=$(RESULTS)/benchmark

# Uses an installed Python: that of $(VENV) if it has a CUDA jax.
has_cuda = import importlib.util as u; print(any(map(u.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))))
GPU_PYTHON ?= $(if $(filter True,$(shell $(python) -c '$(has_cuda)' 2>/dev/null)),$(python),python3)
GPU_FLAGS  ?= # --allow_cpu to try it without a GPU
needs := absl-py flax jax ml_dtypes numpy optax safetensors tokenizers tqdm
define absent
import sys
from importlib import metadata
gone = [name for name in "$(needs)".split() if not list(metadata.distributions(name=name))]
gone and sys.exit(f"error: {sys.executable} lacks {', '.join(gone)}: {sys.executable} -m pip install {' '.join(gone)}")
endef
export absent
.PHONY: gpu
gpu: ## Check this machine's GPU, at most eight minutes; installs nothing
	@$(GPU_PYTHON) -c "$$absent"
	$(GPU_PYTHON) -m continuous_lm gpu_check $(GPU_FLAGS) --output_dir=$(RESULTS)/gpu

.PHONY: growth
growth: $(VENV)/.has-runtime ## Compute costs of sweeps of 8B to 70B models on simulated devices
	$(program) device_costs --output_dir=$(RESULTS)/growth

## Development

.PHONY: setup
setup: $(VENV)/.has-dev ## Create .venv with everything: runtime, tests, linters, docs

.PHONY: format
format: $(VENV)/.has-lint ## Format the code, and fix what ruff can fix
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

.PHONY: lint
lint: $(VENV)/.has-lint ## Check style, format and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy -p continuous_lm
	$(python) -m tests.type_completeness

.PHONY: types
types: $(VENV)/.has-lint ## Check types only
	$(VENV)/bin/mypy -p continuous_lm

# The fast tests spend most of their time compiling. Compiling without optimisation halves it, and the
# older code generator of JAX for Python 3.11 takes a third of that. Programs are too small to compile
# them in parts. `test-all` compiles as programs do.
older_flags := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
older = $(shell $(python) -c "import sys; sys.version_info < (3, 12) and print('$(older_flags)')" 2>/dev/null)
user_flags := $(XLA_FLAGS)
test test-one test-core: export XLA_FLAGS = --xla_backend_optimization_level=0 $(older) $(user_flags)
TESTS ?= # files and folders; all if omitted

.PHONY: test
test: $(VENV)/.has-test ## The fast tests (TESTS=FILES for some)
	$(pytest) -m "not slow" $(TESTS)

.PHONY: test-one
test-one: $(VENV)/.has-test ## Test one file or test: make test-one T=tests/test_style.py
	$(python) -m pytest $(T)

.PHONY: test-all
test-all: $(VENV)/.has-test ## All tests, with the slow ones
	$(pytest)

.PHONY: test-core
test-core: $(VENV)/.has-test-core ## The fast tests without PyTorch
	$(pytest) -m "not slow" $(TESTS)

.PHONY: mutants
mutants: $(VENV)/.has-test ## Plant small defects and count those that the fast tests catch
	$(python) -m tests.mutants --workers=$(WORKERS) --output=$(RESULTS)/mutants.json
.PHONY: golden
golden: $(VENV)/.has-test ## Store the outputs of small runs of every program again
	$(python) -m tests.golden --write $(GROUPS)

.PHONY: docs docs-serve
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.has-docs ## Build the documentation into site/; a broken link is an error
	$(VENV)/bin/mkdocs build
docs-serve: $(VENV)/.has-docs ## Show the documentation in a browser while you edit it
	$(VENV)/bin/mkdocs serve

.PHONY: release-check
release-check: $(VENV)/.has-dev ## Build the wheel and check its contents and metadata
	rm -rf dist
	$(python) -m build
	$(python) -m twine check --strict dist/*
	$(python) -m pytest tests/test_packaging.py

.PHONY: clean
clean: ## Remove environments, builds and caches; results stay
	rm -rf .venv .venv-upper build dist site *.egg-info .hypothesis .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp .has-X: the environment holds the package, editable, with the extra X.
$(VENV)/.has-%: pyproject.toml constraints.txt | $(python)
	@echo "Installing ($*) into $(VENV), which may take minutes ..."
	@$(python) -m pip install -qq -c constraints.txt -e '.$(patsubst %,[%],$(filter-out runtime,$*))'
	@touch $@

$(python):
	@echo "Creating $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv $(VENV)
