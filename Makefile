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

# Density models of text, on the rows of a baseline's table. Text files: make calm DATA=a.txt,b.txt
DATA  ?=
TEXT  := $(if $(DATA),--data=$(DATA))
WORDS ?= file,path,directory
.PHONY: calm
calm: SIZE := --hidden_size=64 --num_layers=2 --length=64 --batch_size=16 --steps=300
calm: OUT := $(RESULTS)/calm
calm: $(VENV)/.has-runtime ## Train, sample, evaluate and ablate small density models of text
	$(program) train_lm $(TEXT) $(SIZE) --vocab_size=1024 --output_dir=$(OUT)/baseline
	$(program) train_density $(TEXT) $(SIZE) --head=mixture --table_from=$(OUT)/baseline --output_dir=$(OUT)/mixture
	$(program) sample_density --model=$(OUT)/mixture --samples=2 --output_dir=$(OUT)/sample
	$(program) evaluate $(TEXT) --length=64 --models=$(OUT)/baseline,$(OUT)/mixture --output_dir=$(OUT)/eval
	$(ablate) $(TEXT) --length=64 --model=$(OUT)/mixture --codes=256 --output_dir=$(OUT)/ablation
ablate := $(program) compare_quantizers

.PHONY: calm-full
calm-full: OUT := $(RESULTS)/calm-full
calm-full: STEPS := --steps=400 --length=128 --batch_size=16
calm-full: FROM := --table_from=$(RESULTS)/calm-full/baseline
calm-full: $(VENV)/.has-runtime ## The README's table: a baseline and its densities, under an hour
	$(program) train_lm $(TEXT) $(STEPS) --output_dir=$(OUT)/baseline
	$(program) train_density $(TEXT) $(STEPS) $(FROM) --head=gaussian --output_dir=$(OUT)/gaussian
	$(program) train_density $(TEXT) $(STEPS) $(FROM) --head=mixture --head_settings=components=4 \
	  --output_dir=$(OUT)/mixture
	$(program) train_density $(TEXT) $(STEPS) $(FROM) --head=experts --head_settings=experts=4 \
	  --output_dir=$(OUT)/experts
	$(program) train_density $(TEXT) $(STEPS) $(FROM) --head=gaussian --token_loss_weight=0 \
	  --output_dir=$(OUT)/likelihood
	$(program) train_density $(TEXT) $(STEPS) --head=gaussian --output_dir=$(OUT)/learned
	$(program) evaluate $(TEXT) --output_dir=$(OUT)/eval --models=$(call commas,\
	  $(addprefix $(OUT)/,baseline gaussian mixture experts likelihood learned))
	$(ablate) $(TEXT) --model=$(OUT)/mixture --output_dir=$(OUT)/ablation
	$(program) sample_density --model=$(OUT)/mixture --samples=32 --towards=$(WORDS) \
	  --strengths=0,0.25,0.5,0.75,1,1.5,2 --output_dir=$(OUT)/steering
# Next-vector models: an autoencoder of K tokens, a model of its vectors, a baseline of equal size.
nv := $(RESULTS)/next-vector
.PHONY: next-vector
next-vector: SIZE := --hidden_size=64 --num_layers=2 --batch_size=16 --steps=200
next-vector: $(VENV)/.has-runtime ## Train, sample and judge small models of K = 4 tokens a vector
	$(program) train_autoencoder $(TEXT) --vocab_size=1024 --hidden_size=64 --latent_size=32 \
	  --batch_size=16 --steps=300 --output_dir=$(nv)/codec
	$(program) train_calm $(TEXT) --codec=$(nv)/codec $(SIZE) --length=16 --output_dir=$(nv)/calm
	$(program) train_lm $(TEXT) --tokenizer=$(nv)/codec $(SIZE) --length=64 \
	  --output_dir=$(nv)/baseline
	$(program) sample_calm --model=$(nv)/calm --samples=2 --output_dir=$(nv)/sample \
	  --between="the name of the file" --between="a list of numbers"
	$(program) evaluate $(TEXT) --models=$(nv)/baseline,$(nv)/calm --output_dir=$(nv)/eval
	$(ablate) $(TEXT) --model=$(nv)/calm --length=64 --output_dir=$(nv)/ablation

# K tokens a vector, each of 500 steps of 512 vectors; K = 4 for longer; and tokens, of like time.
nvf := $(RESULTS)/next-vector-full
KS  := 1 2 4 8
LONG := $(nvf)/calm-4-long
codecs := $(KS:%=$(nvf)/codec-%)
.PHONY: next-vector-full $(codecs) $(KS:%=$(nvf)/calm-%) $(LONG) $(nvf)/baseline
$(nvf)/codec-1: NEW := --vocab_size=1024
$(filter-out %-1,$(codecs)): NEW := --tokenizer=$(nvf)/codec-1
$(filter-out %-1,$(codecs)): $(nvf)/codec-1
$(codecs): $(nvf)/codec-%: $(VENV)/.has-runtime
	$(program) train_autoencoder $(TEXT) $(NEW) --chunk_size=$* --latent_size=64 \
	  --codec_settings=kl_weight=0.03 --batch_size=16 --steps=600 --output_dir=$@
$(KS:%=$(nvf)/calm-%): $(nvf)/calm-%: $(nvf)/codec-%
	$(program) train_calm $(TEXT) --codec=$< --length=32 --batch_size=16 --steps=500 \
	  --output_dir=$@
$(LONG): $(nvf)/codec-4
	$(program) train_calm $(TEXT) --codec=$< --length=32 --batch_size=16 --steps=2000 \
	  --output_dir=$@
$(nvf)/baseline: $(nvf)/codec-1
	$(program) train_lm $(TEXT) --tokenizer=$< --length=128 --batch_size=16 --steps=600 \
	  --output_dir=$@
next-vector-full: $(nvf)/baseline $(KS:%=$(nvf)/calm-%) $(LONG) ## The tables of K, under an hour
	$(program) evaluate $(TEXT) --positions=4096 --stride=8 --context=32 --output_dir=$(nvf)/eval \
	  --models=$(call commas,$(nvf)/baseline $(KS:%=$(nvf)/calm-%) $(LONG))
	$(ablate) $(TEXT) --model=$(call commas,$(KS:%=$(nvf)/calm-%)) --output_dir=$(nvf)/ablation
	$(program) sample_calm --model=$(LONG) --output_dir=$(nvf)/sample \
	  --between="the name of the file" --between="a list of numbers"
	$(program) compare_heads --output_dir=$(nvf)/heads

comma := ,
commas = $(subst $() $(),$(comma),$(strip $1))

embedded := $(RESULTS)/embedded
.PHONY: embedded
embedded: $(VENV)/.has-runtime ## Train the embedded model anew, with three seeds, and print its table
	for seed in 0 1 2; do \
	  $(program) train_apples --seed=$$seed --output_dir=$(embedded)/$$seed || exit; \
	done
	$(program) evaluate_apples --output_dir=$(embedded) \
	  --models=$(embedded)/0,$(embedded)/1,$(embedded)/2
	cp $(embedded)/0/* models/bundled/apples/

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
