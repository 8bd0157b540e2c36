# `make help` lists the targets. The first one that runs makes .venv.
EXP ?= mini
ARGS ?=
AXIS ?= experiments/ablations/guided_subject.yaml
JOBS ?= 2
GPUS ?= 8
GPU_MEM ?= 80
SPLIT ?= train
LIMIT ?=
PYTHON ?= python3.11

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

INSTALLED := .venv/.installed
RUN := .venv/bin/python -m
EVAL := --config experiments/$(EXP)/eval.yaml
# The sweeps' own YAMLs name mini's.
SWEPT = $(if $(filter-out mini,$(EXP)),--config=experiments/$(EXP)/eval.yaml)
# A batch shared by two processes, where the experiment has a YAML for it.
TWO = $(addprefix --config ,$(wildcard experiments/$(EXP)/two_processes/$@.yaml))
STEPS := data stage1 stage2 tables
# In this order: each part builds on those before it.
FOUNDATION := autoencoder clip dino sam unet llava ip_adapter style views

.PHONY: $(STEPS) eval-dreambooth ablate-masking ablate-beta report cache-stage1 cache-stage2 fetch plan help reproduce validate-data inspect ablate sweep-beta sweep-masking seeds test lint bench mini-foundation clean

help: ## this list
	@echo "make <target> [EXP=mini] [ARGS='...']   EXP: a folder under experiments/; ARGS: extra arguments of the target's command"
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## ?/\1\t/' | awk -F '\t' '{printf "  %-16s %s\n", $$1, $$2}'

reproduce: $(INSTALLED) ## all of it, from shards to report, with the time each step took
	@if [ -n "$(ARGS)" ]; then echo "make reproduce takes no ARGS: give them to one of $(STEPS)" >&2; exit 2; fi
	@begun=$$SECONDS; for step in $(STEPS); do \
		from=$$SECONDS; $(MAKE) $$step EXP=$(EXP); echo "== $$step: $$((SECONDS - from)) s"; \
	done; echo "== reproduce: $$((SECONDS - begun)) s in all, see runs/$(EXP)/report/index.html"

fetch: $(INSTALLED) ## download the models that an experiment names, with digests in runs/EXP/fetched.json (mini needs none)
	models=$$($(RUN) evaluation models $(EVAL)); \
	$(RUN) moma_lightning fetch --experiment experiments/$(EXP) --out runs/$(EXP)/fetched.json --models "$$models" $(ARGS)

data: $(INSTALLED) ## triplet shards (mini: rendered, with the DreamBooth folder, LIMIT of them for training; openimages: SPLIT=train LIMIT=1000)
	@if [ "$(EXP)" != mini ] && [ ! -e experiments/$(EXP)/data.yaml ]; then \
		echo "make data renders the mini world or follows experiments/$(EXP)/data.yaml, which is missing: write it, or point the stages at shards of your own" >&2; exit 2; fi
	$(if $(wildcard experiments/$(EXP)/data.yaml),$(RUN) datamodules.openimages build --config experiments/$(EXP)/data.yaml \
		--split $(SPLIT) $(if $(LIMIT),--limit $(LIMIT)),$(RUN) datamodules.mini --out runs/$(EXP)/data $(if $(LIMIT),--train_count $(LIMIT))) $(ARGS)

validate-data: $(INSTALLED) ## check every shard of EXP: digests, decoding, masks, labels, duplicates, evaluation leakage
	$(RUN) datamodules.openimages validate --shards runs/$(EXP)/data/shards $(ARGS)

inspect: $(INSTALLED) ## one HTML page of EXP's shards: filter funnel, histograms, contact sheets
	$(RUN) datamodules.openimages inspect --shards runs/$(EXP)/data/shards $(ARGS)

stage1: $(INSTALLED) ## train the image-feature decoder; goes on from its last checkpoint
	$(RUN) moma_lightning fit --config experiments/$(EXP)/stage1.yaml $(TWO) $(ARGS)

stage2: $(INSTALLED) ## train the subject and context attention; goes on from its last checkpoint
	$(RUN) moma_lightning fit --config experiments/$(EXP)/stage2.yaml $(TWO) $(ARGS)

cache-stage1: $(INSTALLED) ## run stage 1's frozen models over its shards once (mini: ARGS='--model.init_args.edits.rate 0')
	$(RUN) datamodules.caches --config experiments/$(EXP)/stage1.yaml $(ARGS)

cache-stage2: $(INSTALLED) ## run stage 2's frozen models over its shards once (docs/data.md, "Caches for training")
	$(RUN) datamodules.caches --config experiments/$(EXP)/stage2.yaml $(ARGS)

eval-dreambooth: $(INSTALLED) ## make the pictures that are missing, and score them
	$(RUN) evaluation dreambooth $(EVAL) $(ARGS)

plan: $(INSTALLED) ## memory and time of EXP's stages on GPUS=8 GPUs of GPU_MEM=80 GB, without one; GPUS='[8,64,512]' for a table
	@for stage in $(or $(wildcard experiments/$(EXP)/stage1.yaml experiments/$(EXP)/stage2.yaml),experiments/$(EXP)/stage2.yaml); do \
		$(RUN) moma_lightning plan --stage $$stage --gpus '$(GPUS)' --gpu_mem $(GPU_MEM) $(ARGS); echo; \
	done

tables: $(INSTALLED) ## eval-dreambooth, ablate-masking, ablate-beta and report in one process, which imports once
	$(RUN) evaluation dreambooth $(EVAL) $(ARGS) then ablate $(EVAL) --config experiments/ablations/masking.yaml $(ARGS) \
		then ablate $(EVAL) --config experiments/ablations/beta.yaml $(ARGS) then report $(EVAL) $(ARGS)

report: $(INSTALLED) ## the paper's figures, and one HTML page of them and all tables
	$(RUN) evaluation report $(EVAL) $(ARGS)

ablate-beta: $(INSTALLED) ## the paper's Table 4: strength of the subject attention
	$(RUN) evaluation ablate $(EVAL) --config experiments/ablations/beta.yaml $(ARGS)

ablate-masking: $(INSTALLED) ## the paper's Table 3: strength of the masks
	$(RUN) evaluation ablate $(EVAL) --config experiments/ablations/masking.yaml $(ARGS)

ablate: $(INSTALLED) ## one further axis: AXIS=experiments/ablations/steps.yaml, ...
	$(RUN) evaluation ablate $(EVAL) --config $(AXIS) $(ARGS)

sweep-beta: $(INSTALLED) ## a wandb sweep over beta; without a key its grid runs here, offline
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(RUN) experiments.sweep experiments/sweeps/beta.yaml $(SWEPT) $(ARGS)

sweep-masking: $(INSTALLED) ## the same over the strength of the masks
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(RUN) experiments.sweep experiments/sweeps/masking.yaml $(SWEPT) $(ARGS)

seeds: $(INSTALLED) ## the recipe under three training seeds, every prompt, pooled: runs/EXP/seeds/table.md
	$(RUN) experiments.seeds --exp $(EXP) $(ARGS)

test: $(INSTALLED) ## the tests, on JOBS=2 processes
	OMP_NUM_THREADS=1 WANDB_MODE=offline .venv/bin/pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED) ## ruff, mypy and the rules of what may import what
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

bench: $(INSTALLED) ## how long the parts take, as ratios to known things (docs/performance.md), into runs/bench.json
	$(RUN) experiments.bench $(ARGS)

mini-foundation: $(INSTALLED) ## train the shipped mini base models again (about 4 hours on 2 cores; goes on where it stopped)
	@for part in $(FOUNDATION); do echo "== $$part"; case $$part in \
		unet) for round in "" "--second-round --steps 9000 --lr 1e-3"; do \
			OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc_per_node $(JOBS) -m experiments.mini.recipe.unet $$round $(ARGS); done ;; \
		*) $(RUN) experiments.mini.recipe.$$part $(ARGS) ;; esac; done
	$(RUN) experiments.mini.recipe.ship
	$(RUN) experiments.mini.recipe.check_encoders
	$(RUN) experiments.mini.recipe.check_base

clean: ## remove runs/EXP
	rm -rf runs/$(EXP)

$(INSTALLED): pyproject.toml
	@echo "setting up .venv: some minutes, PyTorch is large"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
