# Names the stages. Whether there is work left is decided by the programs, by identity.
# `make` alone prints help.

TEACHER ?= digits-resnet20
STUDENT ?= digits-resnet8
METHOD  ?= cd+gkd+edt
SEED    ?= 0
SEEDS   ?= 0 1 2
METHODS ?=
DEVICE  ?= auto
CACHES  ?= caches
RUNS    ?= runs
ARGS    ?=
CACHE   ?=
RECHECK ?=
TRAIN_TEACHER ?=
BENCH   ?=
OUT     ?= exported
WORKERS ?=
FEED    ?= auto
JOBS    ?= 1
REDO    ?=

PYTHON  ?= python3

# make would silently ignore a misspelled variable: allow those set above and no others.
KNOWN   := $(shell sed -n 's/^\([A-Z_]*\) *?=.*/\1/p' $(firstword $(MAKEFILE_LIST)))
GIVEN   := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
ifneq ($(filter-out $(KNOWN),$(GIVEN)),)
  $(error unknown variable $(filter-out $(KNOWN),$(GIVEN)); known: $(KNOWN). Config keys go into ARGS="key.sub=value ...")
endif

VENV    := .venv
PY      := $(VENV)/bin/python

# The part of a student's ARGS that is for its teacher's file: teacher.dataset.limit=200 -> dataset.limit=200
TEACHER_ARGS = $(patsubst teacher.%,%,$(filter teacher.%,$(ARGS)))

# Options of the programs that read images.
READERS = --device '$(DEVICE)' $(if $(WORKERS),--workers '$(WORKERS)')

# Options of the programs that train students.
TRAINING = --feed '$(FEED)' $(if $(REDO),--redo)

# Train from this cache, without the teacher or its weights.
THIS_CACHE = $(if $(CACHE),--cache $(CACHE))

# Each word is quoted, so that the shell leaves [1,2] and {"kind":"onecycle"} alone.
OVERRIDES = $(foreach arg,$(ARGS),'$(arg)')

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env cache-teacher train-student ablation export-student verify-cache check-cache list-caches bench bench-store test lint

help: ## print this help
	@echo "Teach Once: run the teacher once, train as many students as you like."
	@echo
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Settings, as in make train-student METHOD=kd SEED=1:"
	@printf '  %-24s %s\n' \
	  'TEACHER=$(TEACHER)' 'a file of configs/teacher, or a path' \
	  'STUDENT=$(STUDENT)' 'a file of configs/student, or a path' \
	  'METHOD=$(METHOD)' 'how to train one student' \
	  'SEED=$(SEED)' 'of one student' \
	  'METHODS="ce kd"' 'of an ablation (default: all of the file)' \
	  'SEEDS="$(SEEDS)"' 'of an ablation' \
	  'JOBS=$(JOBS)' 'runs of an ablation side by side' \
	  'ARGS="key.sub=value ..."' 'config keys; teacher.key.sub=value is for the teacher of a student' \
	  'CACHES=$(CACHES)' 'folder of the caches' \
	  'CACHE=path' 'train from this cache, without the teacher; or check it' \
	  'RUNS=$(RUNS)' 'folder of the runs' \
	  'OUT=$(OUT)' 'folder of the exported student' \
	  'DEVICE=$(DEVICE)' 'auto, cpu, cuda, ...' \
	  'WORKERS=4' 'processes that read images' \
	  'FEED=$(FEED)' 'where the teacher outputs of a view are held: auto, device, host, window' \
	  'REDO=1' 'train finished runs again and replace them' \
	  'RECHECK=1' 'check every byte of a large finished cache' \
	  'TRAIN_TEACHER=1' 'agree to train a teacher for more than ten minutes'
	@echo
	@echo "Documentation: README.md, docs/commands.md"

env: ## create .venv, or update it if requirements.txt has changed
	@cmp -s requirements.txt $(VENV)/installed.txt || { \
	  echo "installing requirements.txt into $(VENV)"; \
	  $(PYTHON) -m venv $(VENV); \
	  $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
	  cp requirements.txt $(VENV)/installed.txt; }

cache-teacher: env ## run TEACHER once over every view and cache its outputs (trains it if it has no weights)
	@$(PY) -m train teacher '$(TEACHER)' --caches '$(CACHES)' $(READERS) \
	  $(if $(TRAIN_TEACHER),--train-teacher) $(OVERRIDES)
	@$(PY) -m precompute '$(TEACHER)' --caches '$(CACHES)' $(READERS) \
	  $(if $(RECHECK),--recheck) $(OVERRIDES)

train-student: env ## train STUDENT with METHOD and SEED from the cache (builds whatever is missing first)
	@$(PY) -m train plan '$(STUDENT)' --method '$(METHOD)' --seed '$(SEED)' \
	  --caches '$(CACHES)' $(THIS_CACHE) --runs '$(RUNS)' $(READERS) --feed '$(FEED)' --no-trial $(OVERRIDES)
	@$(if $(CACHE),,$(MAKE) --no-print-directory cache-of-student)
	@$(PY) -m train student '$(STUDENT)' --method '$(METHOD)' --seed '$(SEED)' \
	  --caches '$(CACHES)' $(THIS_CACHE) --runs '$(RUNS)' $(READERS) $(TRAINING) $(OVERRIDES)

ablation: env ## train STUDENT with each of METHODS and SEEDS, then write the report
	@$(PY) -m train check '$(STUDENT)' --seeds "$(SEEDS)" --methods "$(METHODS)" --jobs '$(JOBS)' \
	  --caches '$(CACHES)' $(THIS_CACHE) --runs '$(RUNS)' $(READERS) --feed '$(FEED)' $(OVERRIDES)
	@$(if $(CACHE),,$(MAKE) --no-print-directory cache-of-student)
	@$(PY) -m train ablation '$(STUDENT)' --seeds "$(SEEDS)" --methods "$(METHODS)" --jobs '$(JOBS)' \
	  --caches '$(CACHES)' $(THIS_CACHE) --runs '$(RUNS)' $(READERS) $(TRAINING) $(OVERRIDES)

.PHONY: cache-of-student
cache-of-student:
	@teacher=$$($(PY) -m configs teacher-of '$(STUDENT)' $(OVERRIDES)); \
	$(MAKE) --no-print-directory cache-teacher TEACHER="$$teacher" ARGS='$(TEACHER_ARGS)'

export-student: env ## write a finished student (STUDENT, METHOD, SEED) to OUT as plain weights and as a program
	@$(PY) -m train export '$(STUDENT)' '$(OUT)' --method '$(METHOD)' --seed '$(SEED)' \
	  --caches '$(CACHES)' --runs '$(RUNS)' --device '$(DEVICE)' $(OVERRIDES)

verify-cache: env ## compute 512 records of TEACHER's cache again and compare
	@$(PY) -m precompute.verify '$(TEACHER)' --caches '$(CACHES)' $(READERS) $(OVERRIDES)

check-cache: env ## compare every byte of CACHE=path (default: of all caches) with its checksum
	@$(PY) -m store check $(CACHE) --caches $(CACHES)

list-caches: env ## list all caches: teacher, dataset, views, size, state
	@$(PY) -m store list --caches '$(CACHES)'

bench: env ## measure every speed target, into docs/benchmarks.md (BENCH=--quick: a few rounds)
	@$(PY) -m benchmarks --device '$(DEVICE)' $(BENCH)

bench-store: env ## measure reading speed and TEACHER's tap dtypes, into docs/benchmarks.md
	@$(PY) -m benchmarks.read $(BENCH)
	@$(PY) -m train teacher '$(TEACHER)' --device '$(DEVICE)' $(OVERRIDES)
	@$(PY) -m benchmarks.dtypes '$(TEACHER)' --device '$(DEVICE)' $(OVERRIDES)

test: env lint ## run all checks and tests
	@$(PY) -m pytest

lint: env ## run ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
