# What a contributor runs. Everything happens in .venv/ and build/ of this checkout.
SHELL := /bin/bash
PYTHON := .venv/bin/python
BOOTSTRAP ?= python3
SGLANG_NEWEST := 0.5.23
SGLANG_VERSIONS ?= 0.4.6.post2 0.4.9 0.5.10 0.5.15 $(SGLANG_NEWEST)
CPP := $(shell find csrc tests/native -name '*.cpp' -o -name '*.hpp')
SECONDS ?= 600
SEED ?= 1
BACKEND ?= host

.DEFAULT_GOAL := help
.PHONY: help env build demo test test-sglang test-ray lint bench matrix matrix-sglang chaos soak soak-tests \
    sanitize fuzz mutants long-run programs programs-clang clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## build .venv/ with vLLM for the CPU and our tools (once; minutes)
	@echo "== env: .venv/ with vLLM, torch and kvcached"
	@$(BOOTSTRAP) tools/setup_env.py

build: env  ## compile the C++ core in place
	@echo "== build: the C++ core, kvcached.vmm_ops"
	@mkdir -p build
	@$(PYTHON) setup.py --quiet build_ext --inplace > build/core.log 2>&1 \
	    || { cat build/core.log; exit 1; }

demo: build  ## two engines under one budget, against two halves: report and picture
	@echo "== demo: two vLLM engines share one budget (build/demo/)"
	@$(PYTHON) -m kvcached.cli.main demo $(DEMO_ARGS)

lint: env  ## ruff, mypy --strict, clang-format
	@echo "== lint: ruff, mypy, clang-format"
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@.venv/bin/clang-format --dry-run --Werror $(CPP)

test: build lint  ## lint, then the tests (not the long runs)
	@echo "== test: pytest without the long runs"
	@$(PYTHON) -m pytest -m "not slow and not gpu and not matrix" $(TEST_ARGS)
	@$(MAKE) --no-print-directory test-sglang

test-sglang: build  ## real SGLang engines, the newest version, in .venv-sglang-VERSION/
	@echo "== test: SGLang $(SGLANG_NEWEST)"
	@$(BOOTSTRAP) tools/setup_sglang.py $(SGLANG_NEWEST)
	@.venv-sglang-$(SGLANG_NEWEST)/bin/python -m pytest -m "not matrix" tests/sglang $(TEST_ARGS)

RAY := ray==2.60.0 msgpack==1.2.4

test-ray: build  ## several hosts: two Ray nodes on this machine; Ray comes into build/ray/
	@echo "== test: several hosts on Ray"
	@[ -d build/ray/ray ] || $(PYTHON) -m pip install --quiet --no-deps --target build/ray $(RAY)
	@$(PYTHON) -m pytest tests/hosts $(TEST_ARGS)

bench: build  ## the speed of the allocator, the adapter and the arena
	@echo "== bench: allocator and pool"
	@$(PYTHON) -m kvcached.cli.main bench alloc --backend host --json
	@echo "== bench: a page in and out, beside the bare calls"
	@$(PYTHON) -m kvcached.cli.main bench vmm --backend host --json

matrix: build  ## the engine tests with every version, in .venv-*/; writes docs/engines.md (hours)
	@$(BOOTSTRAP) tools/matrix.py $(MATRIX_ARGS)

matrix-sglang: build  ## all tests of SGLang with each version, in .venv-sglang-VERSION/ (long)
	@$(BOOTSTRAP) tools/matrix.py $(SGLANG_VERSIONS:%=sglang-%) $(MATRIX_ARGS)

chaos: build  ## every kill and stop of every process, ten times each (long)
	@echo "== chaos: kills and stops"
	@$(PYTHON) -m pytest -s -m "slow" tests/engines $(TEST_ARGS)

soak:  ## the simulation, seed after seed, for SECONDS=600; SEED=1, BACKEND=host (or cuda)
	@echo "== soak: $(SECONDS) s of simulation, backend $(BACKEND), from seed $(SEED)"
	@$$($(BOOTSTRAP) tools/native.py plain simulate) --backend $(BACKEND) --seed $(SEED) \
	    --seconds $(SECONDS)

soak-tests: build  ## all seeds of tests/sim, and a kill after every store (long)
	@echo "== soak: kills and policies"
	@$(PYTHON) -m pytest -m "slow" tests/sim $(TEST_ARGS)

sanitize:  ## the core's threads and the simulation under ASan+UBSan and TSan, SECONDS=600 in all
	@echo "== sanitize: ASan, UBSan, TSan"
	@each=$$(($(SECONDS) / 3)); set -e; \
	    $$($(BOOTSTRAP) tools/native.py asan stress) $$each $(SEED); \
	    $$($(BOOTSTRAP) tools/native.py tsan stress) $$each $(SEED); \
	    $$($(BOOTSTRAP) tools/native.py asan simulate) --seed $(SEED) --seconds $$each

fuzz:  ## the ledger's reader on tampered files, SECONDS=600; with libFuzzer where there is clang
	@$(BOOTSTRAP) tools/fuzz.py --seconds $(SECONDS) --seed $(SEED)

mutants:  ## plant bugs into copies of the core, one by one: the simulation must find each
	@$(BOOTSTRAP) tools/mutants.py $(MUTANTS)

long-run: build  ## two real engines under load, kills, limits and reclaims for SECONDS=600
	@echo "== long-run: $(SECONDS) s of two engines"
	@PYTHONPATH=tests/support $(PYTHON) tests/engines/long_run.py --seconds $(SECONDS) --seed $(SEED)

programs:  ## bring prometheus and chromium for the exporter's tests (Debian, Ubuntu)
	@echo "== programs: build/debian/ with prometheus and chromium"
	@$(BOOTSTRAP) tools/operator_programs.py

programs-clang:  ## bring clang with libFuzzer for make fuzz (Debian, Ubuntu)
	@echo "== programs: build/debian/ with clang"
	@$(BOOTSTRAP) tools/operator_programs.py clang

clean:  ## remove .venv*/, build/ and compiled files
	@echo "== clean: .venv*/, build/ and compiled files"
	@rm -rf .venv .venv-* build dist src/*.egg-info src/kvcached/*.so
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
