# `make help` lists what there is. Everything runs in an environment that make creates in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OPTIMIZERS := two_level_kfac,kfac,adam,sgd
TRACKING ?= wandb
TRAIN_MLP := $(BIN)/python -m experiments.train -m problem=deep_linear_mlp optimizer=$(OPTIMIZERS) \
	hydra/launcher=processes tracking=$(TRACKING)

SWEEP_MLP = $(BIN)/python -m experiments.train -m problem=deep_linear_mlp sweep=paper_grid \
	hydra/launcher=processes tracking=$(TRACKING)
COMMA := ,

TRAIN_RESNET = $(BIN)/python scripts/train_resnet.py --scale=$(SCALE) $(if $(SEEDS),--seeds=$(SEEDS)) \
	tracking=$(TRACKING)
HAVE_CIFAR10 := $(BIN)/python scripts/get_cifar10.py

# Of the ResNet: SCALE=preview|reduced|full on the command line. Otherwise it is found out when a recipe
# needs it, because torch comes with the environment.
ifneq ($(origin SCALE),undefined)
ifneq ($(words $(SCALE) $(filter preview reduced full,$(SCALE))),2)
$(error SCALE=$(SCALE): choose preview, reduced or full)
endif
DRAWN_SCALE := --scale=$(SCALE)
endif
SCALE ?= $(shell $(BIN)/python -c 'import torch; print("full" if torch.cuda.is_available() else "preview")')

.DEFAULT_GOAL := help
.PHONY: help setup reproduce-figure1 reproduce-figure2 reproduce-figure3 runs-mlp runs-resnet \
	runs-resnet-control runs-resnet-where-possible sweep-mlp sweep-figures study study-figures figure1 figure2 figure3 test lint format benchmark clean
.NOTPARALLEL: # every training uses all cores itself

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create the environment

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@# compat: scripts and notebooks find experiments/ too, which is not installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--config-settings editable_mode=compat -e '.[experiments,dev]'
	touch $@

runs-mlp: $(READY) ## train what is missing of the deep linear MLP, into runs/
	$(TRAIN_MLP)

runs-resnet: $(READY) ## train what is missing of the ResNet at SCALE=preview|reduced|full, into runs/
	$(HAVE_CIFAR10)
	@$(TRAIN_RESNET) optimizer=$(OPTIMIZERS)

runs-resnet-control: $(READY) ## the same for SGD and Adam at the batch size of K-FAC
	$(HAVE_CIFAR10)
	@$(TRAIN_RESNET) optimizer=sgd,adam training.batch_size=128

runs-resnet-where-possible: $(READY)
	@$(HAVE_CIFAR10); status=$$?; \
	if [ $$status -eq 0 ]; then $(TRAIN_RESNET) optimizer=$(OPTIMIZERS); \
	elif [ $$status -eq 3 ]; then \
		echo "no CIFAR-10: the ResNet is not trained, and drawn from the records there are (runs/, else results/)"; \
	else exit $$status; fi

reproduce-figure1: runs-mlp runs-resnet-where-possible ## train what is missing, draw Figure 1, with a verdict
	$(BIN)/python scripts/plot_figure1.py --records runs --reference results --output runs/figures --scale=$(SCALE)

reproduce-figure2: runs-mlp ## the same for Figure 2 (the MLP of Figure 1)
	$(BIN)/python scripts/plot_figure2.py --records runs --output runs/figures

reproduce-figure3: runs-resnet-where-possible ## the same for Figure 3 (the ResNet of Figure 1)
	$(BIN)/python scripts/plot_figure3.py --records runs --reference results --output runs/figures --scale=$(SCALE)

sweep-mlp: $(READY) ## the paper's grid of the MLP: train what is missing (an hour or two), table, winners, figures
	@status=0; for optimizer in $(subst $(COMMA), ,$(OPTIMIZERS)); do \
		$(SWEEP_MLP) optimizer=$$optimizer || status=1; \
	done; \
	$(BIN)/python -m experiments.select sweep=paper_grid runs=runs && \
	$(BIN)/python scripts/plot_sweep.py --records runs --output runs/figures && exit $$status

sweep-figures: $(READY) ## the grid's table, winners and figures again from the committed records
	$(BIN)/python -m experiments.select sweep=paper_grid runs=results
	$(BIN)/python scripts/plot_sweep.py --records results --output results/figures

study: $(READY) ## the study of the coarse space: train and measure what is missing (two to three hours), tables, figures
	@status=0; $(BIN)/python scripts/run_study.py tracking=$(TRACKING) || status=1; \
	$(BIN)/python scripts/plot_study.py --records runs --output runs/study && exit $$status

study-figures: $(READY) ## the study's tables and figures again from the committed records
	$(BIN)/python scripts/plot_study.py --records results/study --output results/study

figure1: $(READY) ## redraw Figure 1 from the committed records, without training
	$(BIN)/python scripts/plot_figure1.py --records results --reference results --output results/figures $(DRAWN_SCALE)

figure2: $(READY) ## redraw Figure 2 from the committed records
	$(BIN)/python scripts/plot_figure2.py --records results --output results/figures

figure3: $(READY) ## redraw Figure 3 from the committed records
	$(BIN)/python scripts/plot_figure3.py --records results --reference results --output results/figures $(DRAWN_SCALE)

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
	$(BIN)/python -m benchmarks.resnet

clean: ## remove the environment (records stay)
	rm -rf $(VENV)
