# `make help` lists what there is. Everything runs in an environment that make creates in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPTIMIZERS := two_level_kfac,kfac,adam,sgd
TRACKING ?= wandb
TRAIN_MLP := $(BIN)/python -m experiments.train -m problem=deep_linear_mlp optimizer=$(OPTIMIZERS) \
	hydra/launcher=joblib tracking=$(TRACKING)

.DEFAULT_GOAL := help
.PHONY: help setup reproduce-figure1 reproduce-figure2 runs-mlp figure1 figure2 test lint format \
	benchmark clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create the environment

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e '.[experiments,dev]'
	touch $@

runs-mlp: $(READY) ## train what is missing of the deep linear MLP, into runs/
	$(TRAIN_MLP)

reproduce-figure1: runs-mlp ## train what is missing and draw Figure 1 from it, with a verdict
	$(BIN)/python scripts/plot_figure1.py --records runs --reference results --output runs/figures

reproduce-figure2: runs-mlp ## the same for Figure 2 (same runs)
	$(BIN)/python scripts/plot_figure2.py --records runs --output runs/figures

figure1: $(READY) ## redraw Figure 1 from the committed records, without training
	$(BIN)/python scripts/plot_figure1.py --records results --reference results --output results/figures

figure2: $(READY) ## redraw Figure 2 from the committed records
	$(BIN)/python scripts/plot_figure2.py --records results --output results/figures

test: $(READY) ## the tests (minutes)
	$(BIN)/python -m pytest -n 2

lint: $(READY) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY) ## format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(READY) ## time the optimizers against each other and their peers
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[bench]'
	$(BIN)/python -m benchmarks.mlp
	$(BIN)/python -m benchmarks.depth

clean: ## remove the environment (records stay)
	rm -rf $(VENV)
