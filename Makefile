# The few commands of this project. Everything runs inside .venv, which `make` creates.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo world test test-oldest check bench faults soak docs reference clean

help:
	@echo "make demo         install, then the main job on a tiny Wan2.2: convert, pretrain both experts, export, generate"
	@echo "make world        learn a small world: both experts, I2V, LoRA, marked videos (40 minutes on 2 idle cores, resumable)"
	@echo "make test         the test suite (what CI runs)"
	@echo "make test-oldest  the core tests on torch 2.7.1 + megatron-core 0.12.1 (the Ascend generation)"
	@echo "make check        ruff, mypy, import rules, shellcheck, dependency audit"
	@echo "make bench        every benchmark this machine can run, results in benchmarks/results/"
	@echo "make faults       kills, damage, bad input: every property with its long count, one table (see docs/reliability.md)"
	@echo "make docs         the documentation site in site/, English and Chinese; every warning is an error"
	@echo "make reference    the generated pages and JSON schemas of docs/"
	@echo "make soak         the long counts: slow tests included"

install: $(STAMP)

# torch first and alone: a pinned version keeps pip from choosing another build for a dependency's range.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"Python 3.10 to 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}. Set PYTHON=python3.11 (or 3.10, 3.12).")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/mindspeed-wan demo --out demo_out

world: $(STAMP)
	$(BIN)/mindspeed-wan world --out world_out

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow and not cuda and not npu"

test-oldest:
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet torch==2.7.1 "numpy<2" "setuptools<81"
	$(VENV)-oldest/bin/python -m pip install --quiet --no-deps megatron-core==0.12.1
	$(VENV)-oldest/bin/python -m pip install --quiet --no-deps -e .
	$(VENV)-oldest/bin/python -m pip install --quiet packaging pydantic pyyaml safetensors tqdm av pillow ftfy \
	    transformers "diffusers>=0.42" peft sentencepiece protobuf tensorboard matplotlib psutil accelerate \
	    pytest pytest-timeout hypothesis scikit-image build
	$(VENV)-oldest/bin/python -m pytest -q -m "core and not slow and not cuda and not npu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	find examples docker -name '*.sh' -exec $(BIN)/shellcheck .ci/run {} +
	$(BIN)/pip-audit --skip-editable --progress-spinner off || [ "$$CHECK_OFFLINE" = 1 ]

bench: $(STAMP)
	$(BIN)/python benchmarks/run_all.py

faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.faults.table

soak: $(STAMP)
	$(BIN)/python -m pytest -q -m "not cuda and not npu"

docs: $(STAMP)
	$(BIN)/python -c 'import material, mkdocs_static_i18n' 2>/dev/null || $(BIN)/python -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

reference: $(STAMP)
	$(BIN)/python -m mindspeed_wan.cli.reference docs

clean:
	rm -rf site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo_out world_out
