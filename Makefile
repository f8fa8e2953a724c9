# make demo | test | test-all | bench | lint | format | clean
# PYTHON=python3.12 picks the interpreter; TORCH=<requirement or wheel> picks torch; pip's own variables
# (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured. See scripts/make_env.py.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WITH_BIN := PATH="$(abspath $(BIN)):$$PATH"
export TORCH
# The CUDA kernels take minutes to compile: tests build those of sm_80, where nvcc is found, nothing else any.
# The whole set is a slow test (make test-all).
test-env: export KD_KERNELS_CUDA = auto
test-env: export KD_KERNELS_CUDA_ARCHS ?= 80

.PHONY: demo test test-all test-env bench table lint format native-test clean

demo:
	$(PYTHON) scripts/make_env.py $(VENV) demo
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: lint native-test
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: lint native-test
	$(BIN)/python -m pytest -n 2 -m "not gpu"

bench:
	$(PYTHON) scripts/make_env.py $(VENV) bench
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

table:
	$(BIN)/python benchmarks/table.py

test-env:
	$(PYTHON) scripts/make_env.py $(VENV) test dropin

lint: test-env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: test-env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format -i

# The C++ unit tests, under AddressSanitizer and UndefinedBehaviorSanitizer.
native-test: test-env
	$(WITH_BIN) cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Release --log-level=WARNING \
	  -DKD_KERNELS_TESTS=ON -DKD_KERNELS_SANITIZE=ON -DKD_KERNELS_PYTHON=OFF -DKD_KERNELS_CUDA=off
	$(WITH_BIN) cmake --build build/sanitize
	$(WITH_BIN) ctest --test-dir build/sanitize --output-on-failure

clean:
	rm -rf build dist $(VENV) *.egg-info kd_kernels/_native*.so kd_kernels/libkd_kernels_cuda.so
