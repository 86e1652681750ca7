# Each target is a line or two to type by hand, once .venv is activated: . .venv/bin/activate
SCALE ?= cpu
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>&- && echo $$p && break; done)
PAPERS := $(notdir $(patsubst %/paper.yaml,%,$(wildcard projects/*/paper.yaml)))
BENCH := zo2/throughput zo2/sensitivity zo2/ablation flashdp/batch_size flashdp/sequence_length distzo2/throughput infinite_sampling/training sam_if/speed meta_if/cost ecif/cost
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1

SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
.PHONY: help reproduce $(PAPERS) bench report compare test lint

help:  ## this list
	@awk -F':.*  ## ' '/^[a-z$$].*  ## / {sub(/^\$$\(PAPERS\)/, "$(firstword $(PAPERS))", $$1); printf "make %-10s %s\n", $$1, $$2}' Makefile

reproduce: .venv/installed  ## everything: environment, data, experiments, tables, figures, claims, report [SCALE=smoke|cpu|gpu|paper]
# What cannot be fetched now (no apt, say) stops only what needs it: Snakemake tries again, names it and goes on with the rest.
	-repro data fetch --for all --scale $(SCALE)
	snakemake reproduce_all --cores all --config scale=$(SCALE)

$(PAPERS): .venv/installed  ## one paper's tables, figures and claims, likewise for every folder of projects/
	snakemake $@ --cores all --config scale=$(SCALE)

bench: .venv/installed  ## the headline ratios: what is timed, run and printed
	snakemake $(subst /,_,$(BENCH)) --cores all --config scale=$(SCALE)
	for table in $(BENCH); do repro table $$table --scale $(SCALE); done

report: .venv/installed  ## the page from what there is; prints its path
	repro report --scale $(SCALE)

compare: .venv/installed  ## your results against those in the repository
	repro compare results/$(SCALE) results/reference/$(SCALE)

test: .venv/installed  ## all tests, with a smoke run of the whole workflow
	$(THREADS) pytest -n 2 --dist loadfile

lint: .venv/installed  ## ruff and mypy
	ruff check . && ruff format --check . && mypy

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/pip || $(or $(PYTHON),$(error Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python)) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev,cluster,gpu,peers]' && touch $@
