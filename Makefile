# gpt2lab: every target first creates the environment that it needs in .venv.
#
#   make quickstart   install, download Shakespeare, run the posenc ablation at nano scale, write its report
#   make baseline     estimate what GPT-2 124M by its published recipe takes on this machine, and train it;
#                     STEPS=20 BATCH_TOKENS=4096 CORPUS=shakespeare for a short run; MAX_DAYS=7 NPROC=8 RUNS=runs
#   make test         the fast tests
#   make test-all     all tests but those that need a GPU or a service
#   make bench        measure the tables of docs/performance.md and write them there; NANOGPT=../nanoGPT THREADS=1
#   make bench ARGS="step --config a"    one benchmark against another implementation (benchmarks/README.md)
#   make check        format, lint, types, every shipped YAML
#   make clean        remove the environment and caches; runs, reports and data stay

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
JOBS ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')

# $(call option,BATCH_TOKENS) is --batch-tokens with its value, or nothing if it has none
option = $(if $($(1)),--$(subst _,-,$(shell echo $(1) | tr A-Z a-z)) $($(1)))

.PHONY: quickstart baseline test test-all bench check clean

quickstart: .venv/.installed
	$(BIN)/gpt2lab run ablations/posenc.yaml --scale nano --arms learned,rotary,none
	@echo "report: reports/posenc@nano/index.html    curves in MLflow: $(BIN)/gpt2lab ui"

baseline: .venv/.installed$(if $(filter shakespeare,$(CORPUS)),,-data)
	$(BIN)/gpt2lab baseline $(foreach name,CORPUS STEPS BATCH_TOKENS MAX_DAYS NPROC RUNS,$(call option,$(name)))

# one thread per process: several on shared cores are ten times slower; a test that hangs fails after five minutes and
# leaves the stack of every thread; compiled code is kept, or every command that a test starts would compile it anew
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) \
	  -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

test: .venv/.installed-dev
	$(PYTEST) $(TESTS)

test-all: .venv/.installed-dev
	$(PYTEST) --dist worksteal -m "not gpu and not service" $(TESTS)

bench: .venv/.installed-dev
	$(BIN)/python -m benchmarks $(or $(ARGS),tables --write $(foreach name,NANOGPT THREADS,$(call option,$(name))))

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/gpt2lab check ablations/*.yaml sweeps/*.yaml $(foreach file,$(wildcard ablations/*.py),--plugin $(file))
	$(BIN)/gpt2lab check ablations/*.yaml sweeps/*.yaml $(foreach file,$(wildcard ablations/*.py),--plugin $(file)) --scale nano

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gpt2lab needs Python 3.11 or newer; try: make PYTHON=python3.12 quickstart")'
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/pip pyproject.toml constraints.txt
	@echo "installing gpt2lab and its dependencies into .venv (about 2 GB, a few minutes)"
	$(PIP) --editable .
	@touch $@

# needed to read web corpora from the Hugging Face hub
.venv/.installed-data: .venv/.installed
	$(PIP) --editable '.[data]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[test,check]'
	@touch $@
