# From a clean clone and Python 3.11 or later, each of these sets up what it needs in $(VENV), once.

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    ?= .venv
RESULTS ?= results
WORKERS ?= 2

python := $(VENV)/bin/python
program := $(python) -m continuous_lm # NAME --flags
pytest := $(python) -m pytest -n $(WORKERS) --dist loadfile # fixtures are made once a file

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips in one environment get in each other's way
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: counting
counting: $(VENV)/.has-runtime ## Shrink four apples and see the embedded model count them
	$(program) counting --output_dir=$(RESULTS)/counting

.PHONY: report
report: $(VENV)/.has-runtime ## Run every experiment on the embedded model and write the report
	$(program) report --output_dir=$(RESULTS)/report

# Recipes of experiments/recipes/; text files: make calm DATA=a.txt,b.txt
DATA  ?=
WORDS ?= file,path,directory
recipe := $(program) recipe $(if $(DATA),--data=$(DATA)) --words=$(WORDS)
.PHONY: calm calm-full next-vector next-vector-full embedded
calm: $(VENV)/.has-runtime ## Train, sample, evaluate and ablate small density models of text
	$(recipe) --name=calm --output_dir=$(RESULTS)/calm
calm-full: $(VENV)/.has-runtime ## The README's table: a baseline and its densities, under an hour
	$(recipe) --name=calm_full --output_dir=$(RESULTS)/calm-full
next-vector: $(VENV)/.has-runtime ## Train, sample and evaluate small models of K = 4 tokens a vector
	$(recipe) --name=next_vectors --output_dir=$(RESULTS)/next-vector
next-vector-full: $(VENV)/.has-runtime ## The tables of K, under an hour
	$(recipe) --name=next_vectors_full --output_dir=$(RESULTS)/next-vector-full
embedded: $(VENV)/.has-runtime ## Train the embedded model anew, with three seeds, and print its table
	$(recipe) --name=embedded --output_dir=$(RESULTS)/embedded

.PHONY: benchmark
benchmark: $(VENV)/.has-peers ## How fast it is, beside PyTorch, transformers, faiss
	$(program) benchmark --output_dir=$(RESULTS)/benchmark

# With a python that is there, and nothing installed: the one of $(VENV) if it has a CUDA jax.
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
gpu: ## Check this machine's GPU, in eight minutes at most; installs nothing
	@$(GPU_PYTHON) -c "$$absent"
	$(GPU_PYTHON) -m continuous_lm gpu_check $(GPU_FLAGS) --output_dir=$(RESULTS)/gpu

.PHONY: growth
growth: $(VENV)/.has-runtime ## What sweeps of 8B to 70B models cost, and which devices hold them
	$(program) device_costs --output_dir=$(RESULTS)/growth

# Most of the fast tests' time is compiling: without optimisation it is half, and with the older code
# generator, which JAX for Python 3.11 still has, a third of that. `test-all` compiles as programs do.
older = $(shell $(python) -c "import sys; sys.version_info < (3, 12) and print('--xla_cpu_use_fusion_emitters=false')" 2>/dev/null)
given := $(XLA_FLAGS)
test test-core: export XLA_FLAGS = --xla_backend_optimization_level=0 $(older) $(given)
TESTS ?= # of these files and folders; of all if left out

.PHONY: test
test: $(VENV)/.has-test ## The fast tests
	$(pytest) -m "not slow" $(TESTS)

.PHONY: test-all
test-all: $(VENV)/.has-test ## All tests
	$(pytest)

.PHONY: test-core
test-core: $(VENV)/.has-test-core ## The fast tests, without installing PyTorch for those that need it
	$(pytest) -m "not slow" $(TESTS)

.PHONY: mutants
mutants: $(VENV)/.has-test ## Put small defects into the code and count those that the fast tests see
	$(python) -m tests.mutants --workers=$(WORKERS) --output=$(RESULTS)/mutants.json
.PHONY: golden
golden: $(VENV)/.has-test ## Store anew what every program writes when it is run small
	$(python) -m tests.golden --write $(GROUPS)

.PHONY: lint
lint: $(VENV)/.has-lint ## Style, format, imports, types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy -p continuous_lm
	$(python) -m tests.type_completeness

.PHONY: clean
clean: ## Remove what was set up, built and cached; results stay
	rm -rf .venv .venv-upper build dist *.egg-info .hypothesis .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp .has-X: the environment holds the package, editable, with the extra X.
$(VENV)/.has-%: pyproject.toml constraints.txt | $(python)
	@echo "Installing ($*) into $(VENV), which may take minutes ..."
	@$(python) -m pip install -qq -c constraints.txt -e '.$(patsubst %,[%],$(filter-out runtime,$*))'
	@touch $@

$(python):
	@echo "Creating $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv $(VENV)
