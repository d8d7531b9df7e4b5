# Every target sets up what it needs in .venv; nothing has to be activated or installed before.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py

.PHONY: demo test bench bench-gpu lint fmt docs build clean

demo: .venv/.has-segmentation .venv/.native
	$(BIN)/python -m dpkernels segment train

test: .venv/.has-segmentation .venv/.has-test .venv/.native
	$(BIN)/python -m pytest --durations=10 -m "not slow"

bench: .venv/.has-segmentation .venv/.has-test .venv/.native
	$(BIN)/python -m bench

bench-gpu: .venv/.has-segmentation .venv/.has-test .venv/.native
	PATH="$(CURDIR)/$(BIN):$$PATH" bench/gpu.sh build/bench-gpu

lint: .venv/.has-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.c*' | xargs $(BIN)/clang-format --dry-run --Werror

fmt: .venv/.has-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.c*' | xargs $(BIN)/clang-format -i

docs: .venv/.has-segmentation .venv/.has-docs
	$(BIN)/pdoc --docformat google --output-directory build/docs dpkernels

build: .venv/.native

clean:
	rm -rf build dist .venv *.egg-info dpkernels/_c*.so .pytest_cache .mypy_cache .ruff_cache

# The native build needs its tools in the venv, so that unchanged files are not compiled again.
.venv/.tools: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) pip setuptools pybind11 cmake ninja
	touch $@

.venv/.base: .venv/.tools pyproject.toml
	$(PIP) --no-build-isolation --editable .
	touch $@

.venv/.has-%: .venv/.base
	$(PIP) --no-build-isolation --editable '.[$*]'
	touch $@

.venv/.native: .venv/.base $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
