# Every target sets up what it needs; `make` alone lists them.
# PYTHON picks the interpreter for the environment, ARGS adds options to the program a target runs, NB picks notebooks.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS  ?=

# The first Python in PATH that is 3.10 to 3.12 and can make an environment. A version manager's shim that only
# prints an error is passed over, and so is a Debian Python without its venv package.
FIND_PYTHON = for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done
ifndef PYTHON
PYTHON := $(shell $(FIND_PYTHON))
endif

# In name order, with the README's notebook last: it shows results of the others.
NB ?= $(filter-out nbs/index.ipynb,$(sort $(wildcard nbs/*.ipynb))) $(sort $(wildcard nbs/pretrain/*.ipynb)) \
	$(sort $(wildcard nbs/paper/*.ipynb)) $(wildcard nbs/index.ipynb)
PRETRAIN = $(sort $(wildcard nbs/pretrain/*.ipynb))

# uv installs the locked versions several times as fast as pip. It stands here and not in the locks, because pip does
# without it where it cannot be had or cannot reach the packages (a package index that only pip is told of).
# The modules are compiled as pip does it: else each process would, wherever Python is told to write no bytecode.
UV := uv==0.13.9
with_uv = { $(BIN)/python -m pip install --quiet "$(UV)" && \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r $(1); }

# Kernels and commands are the environment's own: nothing is registered outside .venv, nothing found elsewhere comes first.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
unexport JUPYTER_PATH
unexport PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-faults test-browser site lab export notebooks readme pretrain reproduce bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv with the locked versions (once; about 1 minute and 7 GB)

$(STAMP): requirements.lock requirements-3.10.lock settings.ini setup.py
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.10, 3.11 or 3.12 with the venv module was found in PATH." >&2; \
		echo "Install one (Debian: apt install python3.11 python3.11-venv), or name it: make setup PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "$(PYTHON) is not a Python 3.10, 3.11 or 3.12; name another: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@lock=$$($(BIN)/python -c 'import sys; print("requirements-3.10.lock" if sys.version_info < (3, 11) else "requirements.lock")'); \
		echo "Installing $$lock into $(VENV)"; $(call with_uv,$$lock) || { \
		echo "uv could not; pip installs instead, which takes some minutes" >&2; $(BIN)/python -m pip install --quiet -r $$lock; }
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## run the main job: fine-tune a small CLIP with a diffusion teacher (ARGS="-p arch RN50")
	@mkdir -p out
	$(BIN)/papermill nbs/03_train.ipynb out/demo.ipynb $(ARGS)
	@echo
	@echo "The executed notebook, with every plot and number of this run: out/demo.ipynb"
	@echo "Open it:  make lab NB=out/demo.ipynb"

test: $(STAMP) ## run every check; ends with "N passed, M failed" (ARGS="--only lint")
	@$(BIN)/python tools/check.py $(ARGS)

test-gpu: $(STAMP) ## on a CUDA machine: the paper-scale job in three precisions on stand-ins, then the benchmarks
	@$(BIN)/python tools/paper_train_test.py --device cuda $(ARGS)
	@$(MAKE) --no-print-directory bench ARGS=

test-faults: $(STAMP) ## full disks, lost images, killed workers, no memory, signals; then 2,000 steps (about 10 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python tools/faults_test.py $(ARGS)

test-browser: $(STAMP) ## run 03_train and explore in JupyterLab, and read the site, in a browser (apt install chromium)
	$(BIN)/python tools/browser_test.py $(ARGS)

# Written anew each time: what Sphinx keeps from an earlier build does not know that the navigation has changed.
site: $(STAMP) ## write the notebooks as a static site to read and search: out/site/index.html
	@rm -rf out/site
	$(BIN)/sphinx-build --quiet --fail-on-warning --jobs auto --conf-dir tools/site nbs out/site

lab: $(STAMP) ## open JupyterLab on the notebooks (NB=nbs/03_train.ipynb opens that one)
	$(BIN)/jupyter lab $(if $(filter command line environment,$(origin NB)),$(NB),nbs/index.ipynb) $(ARGS)

export: $(STAMP) ## write the modules in sdsclip_nb/ from the notebooks
	$(BIN)/nbdev_export

notebooks: $(STAMP) ## execute the notebooks in place, clean them and write README.md (NB="nbs/01_mini.ipynb" for one)
	$(BIN)/python tools/render.py $(NB)
	$(BIN)/python tools/readme.py

readme: $(STAMP) ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

pretrain: $(STAMP) ## train the mini world's models again, in name order, into data/mini
	@mkdir -p out/pretrain
	@test -n "$(PRETRAIN)" || { echo "nbs/pretrain holds no notebooks" >&2; exit 1; }
	@set -e; for nb in $(PRETRAIN); do \
		echo $(BIN)/papermill $$nb out/pretrain/$$(basename $$nb) -p retrain True $(ARGS); \
		$(BIN)/papermill $$nb out/pretrain/$$(basename $$nb) -p retrain True $(ARGS); done

SCALE ?= mini
CORES ?= all
# Snakemake starts no more jobs at a time than fit into this machine's memory.
MEMORY = $(shell $(BIN)/python -c 'import psutil; print(psutil.virtual_memory().total // 2**20)')

reproduce: $(STAMP) ## make every table, figure and claim (SEEDS=5, SCALE=paper, CORES=2; ARGS=-n shows what would run)
	$(BIN)/snakemake --cores $(CORES) --keep-going --rerun-incomplete --quiet rules reason host --resources mem_mb=$(MEMORY) $(if $(filter paper,$(SCALE)),gpu=1) \
		--config scale=$(SCALE) $(if $(SEEDS),seeds=$(SEEDS) all_seeds=$(SEEDS)) $(ARGS)

bench: $(STAMP) ## measure speed and memory: figures/bench.json and bench.md (ARGS="--only efficiency plain")
	$(BIN)/python tools/bench.py $(ARGS)

clean: ## remove what can be made again, except .venv and downloaded data
	rm -rf out runs build dist *.egg-info .ruff_cache .snakemake
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
