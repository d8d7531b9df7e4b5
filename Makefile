# Every target sets up what it needs in .venv; nothing has to be activated or installed before.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py

.PHONY: demo study study-docs test test-install test-stack bench bench-quick bench-gpu gpu-pack \
	gpu-rehearsal opacus-suite lint fmt docs build clean

demo: .venv/.has-segmentation .venv/.native
	$(BIN)/python -m dpkernels segment train

# The study on the phantom, under 25 minutes on two cores; stopped, it goes on when made again.
study: .venv/.has-segmentation .venv/.native
	$(BIN)/python -m dpkernels segment study --seeds 2 --out runs/study

# Put what `make study` found into docs/study and into the tutorial.
study-docs: study
	$(BIN)/python docs/publish_study.py runs/study

# Two processes at once, each test file whole in one of them (its fixtures are costly).
SIDE_BY_SIDE := -n 2 --dist loadfile

test: .venv/.has-segmentation .venv/.has-test .venv/.native
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --durations=10 -m "not slow and not install"

# Installs as a stranger does: pip's build isolation (it downloads the build tools), new environments.
test-install: .venv/.has-segmentation .venv/.has-test
	$(BIN)/python -m pytest --durations=10 -m install

# The suite beside other versions, in an environment of its own: make test-stack STACK=torch-2.14.
# A file in stacks names the versions, and the tests (none: all of `make test`); the extensions know
# nothing of PyTorch, so one build serves all.
STACK ?= $(error STACK: expected one of $(basename $(notdir $(wildcard stacks/*.txt))))
STACK_TESTS = $(shell sed -n 's/^\# tests://p' stacks/$(STACK).txt)

test-stack: .venv/.native
	@$(MAKE) --no-print-directory .venv-$(STACK)/.ready
	.venv-$(STACK)/bin/python -m pytest $(SIDE_BY_SIDE) --durations=10 -m "not slow and not install" $(STACK_TESTS)

.venv-%/.ready: stacks/%.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	grep -vE "^($$(sed -nE 's/^([A-Za-z0-9_-]+)==.*/\1/p' $< | paste -sd '|'))==" constraints.txt \
		| cat - $< > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint .venv-$*/constraints.txt pip setuptools pybind11 cmake ninja
	DPKERNELS_BUILD=off .venv-$*/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint .venv-$*/constraints.txt --no-build-isolation --editable '.[segmentation,test]'
	touch $@

bench: .venv/.has-segmentation .venv/.has-test .venv/.rivals .venv/.native
	$(BIN)/python -m bench all

bench-quick: .venv/.has-segmentation .venv/.has-test .venv/.rivals .venv/.native
	$(BIN)/python -m bench --quick
	$(BIN)/python -m pytest bench --benchmark-storage=bench/results/benchmarks --benchmark-compare \
		--benchmark-columns=median,iqr,rounds --benchmark-sort=name

bench-gpu: .venv/.has-segmentation .venv/.has-test .venv/.native
	export PATH="$(CURDIR)/$(BIN):$$PATH"; bench/gpu.sh first build/bench-gpu/first; first=$$?; \
		bench/gpu.sh second build/bench-gpu/second && exit $$first

# What the same two runs take to a machine with a GPU, but without a network and with little time.
gpu-pack:
	bench/gpu-pack.sh .gpu

# Both runs where there is no GPU: kernels are launched into nothing, results compared with nothing.
gpu-rehearsal: gpu-pack
	export DPKERNELS_GPU_REHEARSAL=1 DPKERNELS_GPU_PATIENCE=20 PYTHON=.venv-gpu/bin/python; \
		bench/gpu.sh first build/gpu-rehearsal/first; first=$$?; \
		bench/gpu.sh second build/gpu-rehearsal/second && exit $$first

# Opacus' own tests, as its wheel ships them, with our engine in the place of its engine. They need
# torchvision's Python part, which breaks other packages beside a CPU torch: a venv of their own.
OPACUS_TESTS := privacy_engine_test privacy_engine_validation_test batch_memory_manager_test \
	gradient_accumulation_test randomness_test schedulers accounting_noise_multiplier_test \
	dpdataloader_test poisson_test distributed_poisson_test accountants_test
OPACUS_PYTEST := .venv-opacus/bin/python -m pytest -p tests.opacus_compat.plugin \
	-p no:cacheprovider --timeout 600 -q --pyargs

opacus-suite: .venv-opacus/.ready .venv/.native
	$(OPACUS_PYTEST) --engine-mode fused $(OPACUS_TESTS:%=opacus.tests.%) opacus.tests.grad_samples
	$(OPACUS_PYTEST) --engine-mode opacus $(OPACUS_TESTS:%=opacus.tests.%)

.venv-opacus/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-opacus
	.venv-opacus/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint constraints.txt setuptools pybind11 cmake ninja pytest pytest-timeout \
		hypothesis scikit-learn pillow
	DPKERNELS_BUILD=off .venv-opacus/bin/python -m pip --disable-pip-version-check install --quiet \
		--constraint constraints.txt --no-build-isolation --editable .
	.venv-opacus/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
		torchvision==0.28.0
	touch $@

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
	rm -rf build dist .venv .venv-* *.egg-info dpkernels/_c*.so .pytest_cache .mypy_cache .ruff_cache

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

# BackPACK asks for torchvision, which it uses in its examples only.
.venv/.rivals: .venv/.base
	$(PIP) --no-deps backpack-for-pytorch==1.7.1 unfoldNd==0.2.3
	touch $@

.venv/.native: .venv/.base $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
