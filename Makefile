# Names the commands. Whether there is work left is decided by them, by identity.
# `make` alone prints help.

TEACHER ?= digits-resnet20
STUDENT ?= digits-resnet8
METHOD  ?= cd+gkd+edt
SEED    ?= 0
SEEDS   ?= 0 1 2
METHODS ?=
DEVICE  ?= auto
CACHES  ?= caches
MIRROR  ?=
MIRROR_GB ?=
RUNS    ?= runs
ARGS    ?=
CACHE   ?=
FULL_CHECK ?=
TRAIN_TEACHER ?=
BENCH   ?=
EXPORT_DIR ?= exported
WORKERS ?=
PLACEMENT ?= auto
JOBS    ?= 1
SHARED_LOADING ?=
RETRAIN ?=
FILL_CACHE ?=
LOGGER  ?=
QUIET   ?=
NPROC   ?=
CLUSTER ?=
GPUS_PER_WORKER ?=
CPUS_PER_WORKER ?=
GPUS_PER_RUN ?=
CPUS_PER_RUN ?=

PYTHON  ?= python3

# make would silently ignore a misspelled variable: allow those set above and no others.
KNOWN   := $(shell sed -n 's/^\([A-Z_]*\) *?=.*/\1/p' $(firstword $(MAKEFILE_LIST)))
GIVEN   := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
# Of GIVEN:MEANT, the names that are here, for names of earlier versions.
RENAMED := GPUS:NPROC OUT:EXPORT_DIR REDO:RETRAIN TRACK:LOGGER RECHECK:FULL_CHECK FEED:PLACEMENT \
  SHARE:SHARED_LOADING verify-cache:check-recompute check-cache:check-checksums
meant   = $(if $(filter $1:%,$(RENAMED)),did you mean $(patsubst $1:%,%,$(filter $1:%,$(RENAMED)))? )
UNKNOWN := $(firstword $(filter-out $(KNOWN),$(GIVEN)))
ifneq ($(UNKNOWN),)
  $(error unknown variable $(UNKNOWN): $(call meant,$(UNKNOWN))make help-all lists all; config keys go into ARGS="key.sub=value ...")
endif

# What each target reads, besides PYTHON. It refuses any other variable of the command line.
READS_CACHES  := CACHES MIRROR MIRROR_GB
READS_PASS    := $(READS_CACHES) DEVICE WORKERS FULL_CHECK TRAIN_TEACHER NPROC CLUSTER GPUS_PER_WORKER \
  CPUS_PER_WORKER QUIET ARGS
READS_RUNS    := $(READS_PASS) STUDENT CACHE RUNS PLACEMENT RETRAIN LOGGER
reads-cache-teacher  := TEACHER $(READS_PASS)
reads-train-student  := METHOD SEED FILL_CACHE $(READS_RUNS)
reads-ablation       := METHODS SEEDS JOBS SHARED_LOADING GPUS_PER_RUN CPUS_PER_RUN $(READS_RUNS)
reads-export-student := STUDENT METHOD SEED EXPORT_DIR RUNS DEVICE ARGS $(READS_CACHES)
reads-check-recompute := TEACHER DEVICE WORKERS ARGS $(READS_CACHES)
reads-check-checksums := CACHE CACHES
reads-list-caches    := CACHES
reads-bench          := DEVICE BENCH
reads-bench-scale    := DEVICE BENCH
reads-bench-store    := TEACHER DEVICE BENCH ARGS
reads-help           := $(KNOWN)
reads-help-all       := $(KNOWN)

# Variables that are taken for one another: of GIVEN:MEANT, the one that was meant.
CONFUSED := METHOD:METHODS METHODS:METHOD SEED:SEEDS SEEDS:SEED TEACHER:STUDENT STUDENT:TEACHER \
  CACHE:CACHES CACHES:CACHE JOBS:NPROC NPROC:JOBS GPUS_PER_RUN:NPROC CPUS_PER_RUN:JOBS
GOALS    := $(or $(MAKECMDGOALS),help)
READS    := PYTHON $(foreach goal,$(GOALS),$(reads-$(goal)))
UNREAD   := $(firstword $(filter-out $(READS),$(GIVEN)))
ifneq ($(UNREAD),)
  MEANT  := $(filter $(READS),$(patsubst $(UNREAD):%,%,$(filter $(UNREAD):%,$(CONFUSED))))
  $(error make $(GOALS) does not read $(UNREAD)$(if $(MEANT),: did you mean $(MEANT)?,;) \
    $(if $(MEANT),It,it) reads: $(READS))
endif

VENV    := .venv
PY      := $(VENV)/bin/python

# $(call q,NAME): a variable as one word of the shell, quoted; make expands nothing in it.
# $(call q-words,NAME): each of its words like that.
q       = '$(subst ','\'',$(value $1))'
q-words = $(foreach each,$(value $1),'$(subst ','\'',$(each))')

# Programs get no copy of these variables in their environment: make would expand it.
unexport $(KNOWN)

# The programs cut ARGS into words themselves.
OVERRIDES = $(if $(value ARGS),--args=$(call q,ARGS))

# Options of the programs that read images.
READERS = --device $(call q,DEVICE) $(if $(value WORKERS),--workers $(call q,WORKERS))

# Where the caches are; the folder through which what lies at a URL is read, and its size.
MIRRORED = --caches $(call q,CACHES) $(if $(value MIRROR),--mirror $(call q,MIRROR)) \
  $(if $(value MIRROR_GB),--mirror-gb $(call q,MIRROR_GB))

# Options of the programs that train students; with CACHE=path they need no teacher.
STUDENTS = $(MIRRORED) $(if $(value CACHE),--cache $(call q,CACHE)) --runs $(call q,RUNS) \
  $(READERS) --placement $(call q,PLACEMENT)
AGAIN    = $(if $(value RETRAIN),--retrain) $(foreach each,$(call q-words,LOGGER),--logger $(each))
SHARED   = $(if $(filter 0,$(value SHARED_LOADING)),--no-shared-loading,$(if $(value SHARED_LOADING),--shared-loading))
RUN      = $(call q,STUDENT) --method $(call q,METHOD) --seed $(call q,SEED)
STUDY    = $(call q,STUDENT) --seeds $(call q,SEEDS) --methods $(call q,METHODS) --jobs $(call q,JOBS)

# With NPROC=N, N processes of this machine train each network together and run the teacher: one
# for each GPU, or on its CPUs, of which each takes its part. With CLUSTER=address, the nodes of a
# Ray cluster run the teacher, and train the runs of an ablation.
TEACHING = $(if $(value QUIET),--quiet) $(if $(value FULL_CHECK),--full-check) $(if $(value TRAIN_TEACHER),--train-teacher) \
  $(if $(value NPROC),--nproc $(call q,NPROC)) $(if $(value CLUSTER),--cluster $(call q,CLUSTER) \
  $(if $(value GPUS_PER_WORKER),--gpus-per-worker $(call q,GPUS_PER_WORKER)) \
  $(if $(value CPUS_PER_WORKER),--cpus-per-worker $(call q,CPUS_PER_WORKER)))
RUNS_ON_CLUSTER = $(if $(value CLUSTER), \
  $(if $(value GPUS_PER_RUN),--gpus-per-run $(call q,GPUS_PER_RUN)) \
  $(if $(value CPUS_PER_RUN),--cpus-per-run $(call q,CPUS_PER_RUN)))

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env cache-teacher train-student ablation export-student check-recompute check-checksums list-caches bench bench-scale bench-store test test-quick test-long docs lint

# Prints the comments of these targets, in the order of this file.
describe = awk -v names=" $1 " 'BEGIN {FS = ":.*\#\# "} \
  /^[a-z-]+:.*\#\# / && index(names, " " $$1 " ") {printf "  make %-15s %s\n", $$1, $$2}' Makefile
USING      := cache-teacher train-student ablation export-student check-recompute check-checksums list-caches
DEVELOPING := env test test-quick lint docs bench
RARE       := env-cluster test-long bench-scale bench-store

# Settings and what they mean, as words of the shell: those of most calls, and all others.
COMMON_SETTINGS = \
  TEACHER=$(call q,TEACHER) 'a file of configs/teacher, or a path' \
  STUDENT=$(call q,STUDENT) 'a file of configs/student, or a path' \
  METHOD=$(call q,METHOD) 'method of a student' \
  SEED=$(call q,SEED) 'seed of a student' \
  'METHODS="ce kd"' 'methods of an ablation (default: all in the file)' \
  'SEEDS="'$(call q,SEEDS)'"' 'seeds of an ablation' \
  'ARGS="key.sub=value ..."' 'config keys; teacher.key.sub=value is for the teacher of a student' \
  DEVICE=$(call q,DEVICE) 'auto, cpu, cuda, ...'
OTHER_SETTINGS = \
  JOBS=$(call q,JOBS) 'runs of an ablation that train in parallel' \
  'SHARED_LOADING=1' 'train the runs of a seed together, reading each image once (0: apart)' \
  CACHES=$(call q,CACHES) 'folder of the caches, or s3://bucket/prefix' \
  'MIRROR=mirror' 'local folder for data fetched from s3://...' \
  'MIRROR_GB=50' 'maximum size of that folder' \
  'CACHE=path' 'train from this cache, without the teacher; or check it' \
  RUNS=$(call q,RUNS) 'folder of the runs' \
  EXPORT_DIR=$(call q,EXPORT_DIR) 'folder of the exported student' \
  'WORKERS=4' 'processes that read images' \
  PLACEMENT=$(call q,PLACEMENT) "where a view's teacher outputs are kept: auto, device, host, window" \
  'RETRAIN=1' 'train finished runs again and replace them' \
  'FILL_CACHE=1' 'train at once: missing views are computed in the loop and added to the cache' \
  'NPROC=8' 'processes that train one network together, and run the teacher: one for each GPU' \
  'CLUSTER=auto' 'a Ray cluster, or its address: its nodes run the teacher and an ablation' \
  'GPUS_PER_WORKER=1' 'GPUs of each worker that runs the teacher there; also CPUS_PER_WORKER' \
  'GPUS_PER_RUN=0.5' 'GPUs of each run of an ablation there; also CPUS_PER_RUN' \
  'LOGGER=wandb' 'also log the metrics of each epoch there: tensorboard, wandb, mlflow' \
  'QUIET=1' 'print errors only' \
  'FULL_CHECK=1' 'list image folders again, check every byte of a large finished cache' \
  'TRAIN_TEACHER=1' 'agree to train a teacher for more than ten minutes of processor time'

help: ## print this help
	@echo "Teach Once: run the teacher once, train as many students as you like."
	@echo; echo "Train students:"
	@$(call describe,$(USING))
	@echo; echo "Settings, as in make train-student METHOD=kd SEED=1:"
	@printf '  %-24s %s\n' $(COMMON_SETTINGS)
	@echo; echo "Develop:"
	@$(call describe,$(DEVELOPING))
	@echo; echo "All targets and settings: make help-all, docs/reference/commands.md"

.DEFAULT:
	@echo "error: unknown target $@: $(call meant,$@)make help-all lists all" >&2; exit 2

.PHONY: help-all
help-all:
	@$(call describe,help $(USING) $(DEVELOPING) $(RARE))
	@echo; echo "Settings:"
	@printf '  %-24s %s\n' $(COMMON_SETTINGS) $(OTHER_SETTINGS)

env: ## create .venv, or update it if requirements.txt has changed
	@cmp -s requirements.txt $(VENV)/installed.txt || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(PYTHON) is older than Python 3.11"; echo "  fix: make env PYTHON=python3.11"; exit 2; } >&2; \
	  echo "installing requirements.txt into $(VENV): PyTorch is large, so this takes a few minutes"; \
	  $(PYTHON) -m venv $(VENV); \
	  $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .; \
	  cp requirements.txt $(VENV)/installed.txt; \
	  echo "to use its python in this shell: . $(VENV)/bin/activate"; }

cache-teacher: env ## run TEACHER once over every view and cache its outputs (trains it if it has no weights)
	@$(PY) -m teach_once cache-teacher $(call q,TEACHER) $(MIRRORED) $(READERS) $(TEACHING) $(OVERRIDES)

train-student: env ## train STUDENT with METHOD and SEED from the cache (builds whatever is missing first)
	@$(PY) -m teach_once train-student $(RUN) $(STUDENTS) $(TEACHING) $(AGAIN) $(if $(value FILL_CACHE),--fill-cache) $(OVERRIDES)

ablation: env ## train STUDENT with each of METHODS and SEEDS, then write the report
	@$(PY) -m teach_once ablation $(STUDY) $(STUDENTS) $(TEACHING) $(SHARED) $(RUNS_ON_CLUSTER) $(AGAIN) $(OVERRIDES)

export-student: env ## write a finished student (STUDENT, METHOD, SEED) to EXPORT_DIR as plain weights and as a program
	@$(PY) -m train export $(call q,STUDENT) $(call q,EXPORT_DIR) --method $(call q,METHOD) --seed $(call q,SEED) \
	  $(MIRRORED) --runs $(call q,RUNS) --device $(call q,DEVICE) $(OVERRIDES)

check-recompute: env ## compute 512 records of TEACHER's cache again and compare
	@$(PY) -m precompute.verify $(call q,TEACHER) $(MIRRORED) $(READERS) $(OVERRIDES)

check-checksums: env ## compare every byte of CACHE=path (default: of all caches) with its checksum
	@$(PY) -m store check $(call q-words,CACHE) --caches $(call q,CACHES)

list-caches: env ## list all caches: teacher, dataset, views, size, state
	@$(PY) -m store list --caches $(call q,CACHES)

bench: env ## measure every speed target, into the benchmarks page (BENCH=--quick: a few rounds)
	@$(PY) -m benchmarks --device $(call q,DEVICE) $(call q-words,BENCH)

bench-scale: env ## measure what ImageNet's number of samples costs, into the benchmarks page (BENCH="--samples 20000": fewer)
	@$(PY) -m benchmarks scale --device $(call q,DEVICE) $(call q-words,BENCH)

bench-store: env ## measure reading speed and TEACHER's tap dtypes, into the benchmarks page
	@$(PY) -m benchmarks read $(call q-words,BENCH)
	@$(PY) -m train teacher $(call q,TEACHER) --device $(call q,DEVICE) $(OVERRIDES)
	@$(PY) -m benchmarks dtypes $(call q,TEACHER) --device $(call q,DEVICE) $(OVERRIDES)

.PHONY: env-examples
env-examples: env
	@cmp -s requirements-examples.txt $(VENV)/installed-examples.txt || { \
	  echo "installing requirements-examples.txt into $(VENV)"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check -r requirements-examples.txt -c requirements.txt; \
	  cp requirements-examples.txt $(VENV)/installed-examples.txt; }

.PHONY: env-cluster
env-cluster: env ## install Ray, for CLUSTER=...
	@cmp -s requirements-cluster.txt $(VENV)/installed-cluster.txt || { \
	  echo "installing requirements-cluster.txt into $(VENV)"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check -r requirements-cluster.txt -c requirements.txt; \
	  cp requirements-cluster.txt $(VENV)/installed-cluster.txt; }

.PHONY: env-docs
env-docs: env
	@cmp -s requirements-docs.txt $(VENV)/installed-docs.txt || { \
	  echo "installing requirements-docs.txt into $(VENV)"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt -c requirements.txt; \
	  cp requirements-docs.txt $(VENV)/installed-docs.txt; }

docs: env-docs ## build the documentation's site into site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "site/index.html"

test: env-examples env-cluster lint ## run all checks and tests, with what the examples and clusters need
	@$(PYTEST)

test-quick: env-examples ## run the most telling tests, while you work
	@$(PYTEST) -n 2 -m quick $$($(PY) -m tests.support.selection)

test-long: env-examples env-cluster ## run the long sweeps, of which test runs a sample
	@$(PYTEST) -m long -o faulthandler_timeout=1800

# The tests of a group share a worker; the longest start first: tests/support/selection.py.
PYTEST = $(PY) -m pytest -n 3 --max-worker-restart 0 --no-loadscope-reorder

lint: env ## run ruff, mypy and the check of English
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m tests.support.english
