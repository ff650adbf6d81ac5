# Names the stages; every decision (is there work left?) is the programs', by identity.
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

# A misspelt variable would be ignored in silence: those set above and no others.
KNOWN   := $(shell sed -n 's/^\([A-Z_]*\) *?=.*/\1/p' $(firstword $(MAKEFILE_LIST)))
GIVEN   := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
ifneq ($(filter-out $(KNOWN),$(GIVEN)),)
  $(error unknown variable $(filter-out $(KNOWN),$(GIVEN)); known: $(KNOWN). Keys of the configs go into ARGS="key.sub=value ...")
endif

VENV    := .venv
PY      := $(VENV)/bin/python

# Of a student's ARGS, those for the teacher's file: teacher.dataset.limit=200 -> dataset.limit=200
TEACHER_ARGS = $(patsubst teacher.%,%,$(filter teacher.%,$(ARGS)))

# Of the programs that read images.
READERS = --device '$(DEVICE)' $(if $(WORKERS),--workers '$(WORKERS)')

# Of the programs that train students.
TRAINING = --feed '$(FEED)' $(if $(REDO),--redo)

# A student then trains from this one, with neither the teacher nor its weights.
THIS_CACHE = $(if $(CACHE),--cache $(CACHE))

# Each word quoted, so that the shell leaves [1,2] and {"kind":"onecycle"} alone.
OVERRIDES = $(foreach arg,$(ARGS),'$(arg)')

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env cache-teacher train-student ablation export-student verify-cache check-cache list-caches bench bench-store test lint

help: ## print this
	@echo "Teach Once: run the teacher once, train as many students as you like."
	@echo
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Settings (make train-student METHOD=kd SEED=1):"
	@echo "  TEACHER=$(TEACHER)  STUDENT=$(STUDENT)  METHOD=$(METHOD)  SEED=$(SEED)"
	@echo "  SEEDS=\"$(SEEDS)\"  METHODS=\"ce kd\" (default: all)  DEVICE=$(DEVICE)  JOBS=$(JOBS) (runs side by side)  WORKERS=4 (read images)"
	@echo "  TRAIN_TEACHER=1 (agrees to train a teacher for more than ten minutes)  CACHE=path (train from this one)"
	@echo "  FEED=$(FEED) (device, host, window: where a view's teacher outputs are held)"
	@echo "  REDO=1 (train again, replacing the runs asked for)"
	@echo "  CACHES=$(CACHES)  RUNS=$(RUNS)  ARGS=\"key.sub=value ...\" overrides keys of the config;"
	@echo "  a student's ARGS reach its teacher's file as teacher.key.sub=value"


env: ## make or renew .venv, if it is missing or requirements.txt has changed
	@cmp -s requirements.txt $(VENV)/installed.txt || { \
	  echo "installing requirements.txt into $(VENV)"; \
	  $(PYTHON) -m venv $(VENV); \
	  $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
	  cp requirements.txt $(VENV)/installed.txt; }

cache-teacher: env ## run the teacher TEACHER over every view, once (trains it if it can and must)
	@$(PY) -m train teacher '$(TEACHER)' --caches '$(CACHES)' $(READERS) \
	  $(if $(TRAIN_TEACHER),--train-teacher) $(OVERRIDES)
	@$(PY) -m precompute '$(TEACHER)' --caches '$(CACHES)' $(READERS) \
	  $(if $(RECHECK),--recheck) $(OVERRIDES)

train-student: env ## train STUDENT with METHOD and SEED; makes what is missing first
	@$(PY) -m train plan '$(STUDENT)' --method '$(METHOD)' --seed '$(SEED)' \
	  --caches '$(CACHES)' $(THIS_CACHE) --runs '$(RUNS)' $(READERS) --feed '$(FEED)' --no-trial $(OVERRIDES)
	@$(if $(CACHE),,$(MAKE) --no-print-directory cache-of-student)
	@$(PY) -m train student '$(STUDENT)' --method '$(METHOD)' --seed '$(SEED)' \
	  --caches '$(CACHES)' $(THIS_CACHE) --runs '$(RUNS)' $(READERS) $(TRAINING) $(OVERRIDES)

ablation: env ## train every method of STUDENT with every one of SEEDS; the report
	@$(PY) -m train check '$(STUDENT)' --seeds "$(SEEDS)" --methods "$(METHODS)" --jobs '$(JOBS)' \
	  --caches '$(CACHES)' $(THIS_CACHE) --runs '$(RUNS)' $(READERS) --feed '$(FEED)' $(OVERRIDES)
	@$(if $(CACHE),,$(MAKE) --no-print-directory cache-of-student)
	@$(PY) -m train ablation '$(STUDENT)' --seeds "$(SEEDS)" --methods "$(METHODS)" --jobs '$(JOBS)' \
	  --caches '$(CACHES)' $(THIS_CACHE) --runs '$(RUNS)' $(READERS) $(TRAINING) $(OVERRIDES)

.PHONY: cache-of-student
cache-of-student:
	@teacher=$$($(PY) -m configs teacher-of '$(STUDENT)' $(OVERRIDES)); \
	$(MAKE) --no-print-directory cache-teacher TEACHER="$$teacher" ARGS='$(TEACHER_ARGS)'

export-student: env ## the finished student STUDENT, METHOD, SEED as plain weights and program, into OUT
	@$(PY) -m train export '$(STUDENT)' '$(OUT)' --method '$(METHOD)' --seed '$(SEED)' \
	  --caches '$(CACHES)' --runs '$(RUNS)' --device '$(DEVICE)' $(OVERRIDES)

verify-cache: env ## run TEACHER again on 512 records of its cache and compare
	@$(PY) -m precompute.verify '$(TEACHER)' --caches '$(CACHES)' $(READERS) $(OVERRIDES)

check-cache: env ## read every byte of CACHE=path (default: of all caches) and compare checksums
	@$(PY) -m store check $(CACHE) --caches $(CACHES)

list-caches: env ## every cache: teacher, dataset, views, size, how far
	@$(PY) -m store list --caches '$(CACHES)'

bench: env ## measure against every target, into docs/benchmarks.md (BENCH=--quick: a few rounds)
	@$(PY) -m benchmarks --device '$(DEVICE)' $(BENCH)

bench-store: env ## measure reading and tap dtypes (of TEACHER), into docs/benchmarks.md
	@$(PY) -m benchmarks.read $(BENCH)
	@$(PY) -m train teacher '$(TEACHER)' --device '$(DEVICE)' $(OVERRIDES)
	@$(PY) -m benchmarks.dtypes '$(TEACHER)' --device '$(DEVICE)' $(OVERRIDES)

test: env lint ## run all checks and tests
	@$(PY) -m pytest

lint: env ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
