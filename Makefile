# Every verb is self-sufficient: it makes .venv when it is missing, rebuilds the kernels only when a
# source changed, and needs no activated environment.
#
#   make demo    build, train two small language models for a minute each, print generated text
#   make test    the test suite (make test-long: the long tests, make test-asan: under sanitizers)
#   make bench   the benchmark table against torch, written to bench/results/
#   make test-cuda, make bench-cuda    the same on an NVIDIA GPU, each in less than ten minutes; with
#                LMKERN_PYTHON=python3 by an interpreter that has a wheel of lmkern: nothing is built
#   make lint    ruff, mypy, clang-format        make fmt    rewrite in place
#   make wheel   dist/lmkern-*.whl, CPU and CUDA; PYTHON=3.12 for another interpreter than .venv's,
#                CUDA_ARCHS='90a-real' for some GPUs alone (cmake/Cuda.cmake), CUDA=OFF for none
#   make clean   remove everything that was made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
# On x86 without AVX-512 also its 16-lane code, compiled for AVX2 (cmake/Isa.cmake).
WIDE     := $(if $(shell grep -m1 -o avx512f /proc/cpuinfo 2>/dev/null),,avx2wide;)
DEV_ISAS := $(if $(filter x86_64,$(shell uname -m)),baseline;avx2;$(WIDE)avx512;amx)
BUILD_FILES := $(CXX_FILES) CMakeLists.txt $(wildcard cmake/*.cmake csrc/*/CMakeLists.txt) pyproject.toml \
	python/lmkern/_version.py
BUILD_TOOLS := 'scikit-build-core>=0.11' 'pybind11>=3' cmake ninja

# Wheels have CUDA kernels where PyPI has a compiler for them; what is built here for tests has them where
# there is a GPU.
CUDA     ?= $(if $(filter x86_64,$(shell uname -m)),ON,OFF)
DEV_CUDA := $(if $(shell nvidia-smi -L 2>/dev/null),$(CUDA),OFF)
NVCC     := $(shell command -v "$${CUDACXX:-nvcc}" || ls /usr/local/cuda/bin/nvcc 2>/dev/null)

# PYTHON=3.12: a version rather than a command.
VERSION     := $(filter 3.%,$(PYTHON))
INTERPRETER := $(if $(VERSION),$(shell for p in python$(VERSION) \
	$${PYENV_ROOT:-$$HOME/.pyenv}/versions/$(VERSION).*/bin/python; do \
	$$p -c '' 2>/dev/null && echo $$p && break; done || echo python$(VERSION)),$(PYTHON))

.PHONY: demo test test-long test-asan test-cuda bench bench-cuda lint fmt wheel clean build check-tools
.DELETE_ON_ERROR:

demo: build
	@$(BIN)/lmkern demo

test: build
	@$(BIN)/python -m pytest -m 'not long' $(ARGS)

test-long: build
	@$(BIN)/python -m pytest -m long $(ARGS)

bench: build
	@mkdir -p bench/results
	@$(BIN)/python -m pytest bench -o python_files='bench_*.py' -q --benchmark-columns=median,rounds \
		--benchmark-json=bench/results/latest.json $(ARGS)

# Neither needs a compiler where LMKERN_PYTHON names an interpreter.
CUDA_PYTHON := $(or $(LMKERN_PYTHON),$(BIN)/python)

test-cuda: $(if $(LMKERN_PYTHON),,build)
	@$(CUDA_PYTHON) tests/run_cuda.py $(ARGS)

bench-cuda: $(if $(LMKERN_PYTHON),,build)
	@$(CUDA_PYTHON) bench/run_cuda.py $(ARGS)

lint: build
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@echo 'lint: ok'

fmt: build
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format -q .
	@$(BIN)/clang-format -i $(CXX_FILES)

# In .venv it takes the CPU kernels from the build of the tests. CUDA_CHECK=ON holds each CUDA kernel to the
# registers and spills that it states, which are those of the compiler in constraints.txt.
WHEEL_VENV := $(if $(VERSION),$(VENV)-$(VERSION),$(VENV))
wheel: $(WHEEL_VENV)/.cuda
	@rm -rf dist && $(WHEEL_VENV)/bin/pip wheel -q --no-deps --no-build-isolation -w dist . \
		-C build-dir=build/$(or $(VERSION),dev) -C cmake.define.LMKERN_ISAS= -C cmake.define.LMKERN_SIMT=OFF \
		-C cmake.define.LMKERN_CUDA=$(CUDA) -C 'cmake.define.LMKERN_CUDA_ARCHITECTURES=$(CUDA_ARCHS)' \
		-C cmake.define.LMKERN_CUDA_CHECK=$(or $(CUDA_CHECK),OFF)
	@ls dist/*.whl

clean:
	rm -rf $(VENV) $(VENV)-* build dist out .mypy_cache .ruff_cache .hypothesis .benchmarks

# ---- what the verbs stand on ---------------------------------------------------------------------

build: $(VENV)/.built

check-tools:
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "lmkern needs Python >= 3.10, found: $$($(INTERPRETER) --version 2>&1) (set PYTHON=...)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { \
		echo "lmkern needs a C++20 compiler, found none named '$${CXX:-c++}' (e.g. apt-get install g++)" >&2; exit 1; }

$(VENV)/.tools: pyproject.toml constraints.txt | check-tools
	@test -x $(BIN)/python || $(INTERPRETER) -m venv $(VENV)
	@echo 'installing torch and the build tools ...'
	@$(BIN)/pip install -q -c constraints.txt torch==2.13.0 $(BUILD_TOOLS)
	@touch $@

# What wheels for another interpreter are built in.
$(VENV)-3.%/.tools: pyproject.toml constraints.txt | check-tools
	@test -x $(@D)/bin/python || $(INTERPRETER) -m venv $(@D)
	@$(@D)/bin/pip install -q -c constraints.txt $(BUILD_TOOLS)
	@touch $@
.PRECIOUS: $(VENV)-3.%/.tools

# A CUDA compiler: the system's, or from PyPI.
%/.cuda: %/.tools
	@$(if $(filter ON,$(CUDA)),$(if $(NVCC),,$(@D)/bin/pip install -q -c constraints.txt nvidia-cuda-nvcc))
	@touch $@

# Not stripped: the emulator's reports name lines.
$(VENV)/.built: $(BUILD_FILES) $(VENV)/.tools $(if $(filter ON,$(DEV_CUDA)),$(VENV)/.cuda)
	@echo 'building the kernels and installing the development environment ...'
	@$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e '.[dev]' \
		-C build-dir=build/dev -C install.strip=false \
		-C 'cmake.define.LMKERN_ISAS=$(DEV_ISAS)' -C cmake.define.LMKERN_SIMT=ON \
		-C cmake.define.LMKERN_CUDA=$(DEV_CUDA) -C 'cmake.define.LMKERN_CUDA_ARCHITECTURES=$(CUDA_ARCHS)'
	@touch $@

# The kernels' own tests against a build with AddressSanitizer and UndefinedBehaviorSanitizer. Its
# environment borrows the packages of .venv through a .pth file; only lmkern is its own.
ASAN_TESTS := $(addprefix tests/test_,vec_math.py recurrent.py recurrent_step.py recurrent_options.py \
	recurrent_layer_options.py attention.py attention_options.py position.py embedding.py embedding_bag.py \
	cross_entropy.py linear_cross_entropy.py norm.py norm_add.py activation.py dropout.py optim.py \
	token_position.py quantized_embedding.py memory.py tie.py \
	simt.py golden.py cuda_recurrent.py cuda_embedding.py cuda_embedding_optimizer.py cuda_token_position.py)
test-asan: build
	@test -x $(VENV)-asan/bin/python || $(BIN)/python -m venv $(VENV)-asan
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
		> $$($(VENV)-asan/bin/python -c 'import site; print(site.getsitepackages()[0])')/borrowed.pth
	@echo 'building the kernels with sanitizers ...'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(VENV)-asan/bin/python -m pip install -q --no-build-isolation --no-deps \
		--force-reinstall . -C build-dir=build/asan -C cmake.build-type=RelWithDebInfo \
		-C cmake.define.LMKERN_ISAS=avx2 -C cmake.define.LMKERN_CUDA=OFF -C cmake.define.LMKERN_SIMT=ON \
		-C cmake.define.LMKERN_SANITIZE=address,undefined
	@LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so):$$($${CXX:-c++} -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(VENV)-asan/bin/python -m pytest $(ASAN_TESTS) -q -s $(ARGS)  # -s: a report would die with the process
