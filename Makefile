# `make help` lists what there is. Everything runs in an environment that make creates in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRACKING ?= wandb
# Of the ResNet, on the command line: SCALE=preview|reduced|short|full, SEEDS=3,4.
RESNET = $(if $(filter-out undefined,$(origin SCALE)),--scale="$(SCALE)") $(if $(SEEDS),--seeds=$(SEEDS))
REPRODUCE = @$(BIN)/python scripts/reproduce.py
TRAIN = $(RESNET) tracking=$(TRACKING)

.DEFAULT_GOAL := help
.NOTPARALLEL: # every training uses all cores itself
FIGURES := figure1 figure2 figure3
COMMITTED := figures $(FIGURES) sweep-figures study-figures
RUNS := runs-mlp runs-resnet runs-resnet-control
.PHONY: help setup test lint format benchmark docs clean sweep sweep-mlp study $(FIGURES:%=reproduce-%) $(COMMITTED) $(RUNS)

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / && !/^help/ {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create the environment

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@# compat: scripts and notebooks find experiments/ too, which is not installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--config-settings editable_mode=compat -e '.[experiments,dev]'
	touch $@

test: $(READY) ## the tests (minutes)
	$(BIN)/python -m pytest -n 2

lint: $(READY) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

reproduce-figure1: $(READY) ## train what is missing, draw Figure 1, with a verdict
	$(REPRODUCE) figure1 $(TRAIN)

reproduce-figure2: $(READY) ## the same for Figure 2 (the MLP of Figure 1)
	$(REPRODUCE) figure2 $(TRAIN)

reproduce-figure3: $(READY) ## the same for Figure 3 (the ResNet of Figure 1; SCALE=preview|reduced|short|full)
	$(REPRODUCE) figure3 $(TRAIN)

sweep: $(READY) ## the paper's grid of the MLP: train what is missing (an hour or two), table, winners, figures
	$(REPRODUCE) sweep $(TRAIN)

study: $(READY) ## the study of the coarse space: train and measure what is missing (hours), tables, figures
	$(REPRODUCE) study $(TRAIN)

figures: $(READY) ## all figures and tables again from the committed records, without training
	$(REPRODUCE) $@ --committed $(RESNET)

benchmark: $(READY) ## time the optimizers against each other and their peers
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[bench]'
	$(BIN)/python -m benchmarks.mlp
	$(BIN)/python -m benchmarks.depth
	$(BIN)/python -m benchmarks.resnet
	$(BIN)/python -m benchmarks.distributed
	$(BIN)/python -m benchmarks.transformers
	$(BIN)/python -m benchmarks.losses

# Parts of the above.
$(RUNS): $(READY)
	$(REPRODUCE) $(@:runs-%=%) $(TRAIN)

$(FIGURES) sweep-figures study-figures: $(READY)
	$(REPRODUCE) $(@:%-figures=%) --committed $(RESNET)

sweep-mlp: sweep

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) # the site, into site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--config-settings editable_mode=compat -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: # the environment; records stay
	rm -rf $(VENV)
