# Two commands to begin with: `make demo` and `make test`. The first one makes a virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2
# Programs of tests/tools import what the tests share.
WITH_HELPERS = PYTHONPATH=tests/helpers

.PHONY: demo build test test-all mutants fuzz endurance torture lint docs figures bench sanitize sanitize-cuda test-cuda \
	sanitize-on-gpu gpu-report test-oldest clean

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	touch $@

demo: $(VENV)/installed ## Train on handwritten digits with five optimizers chosen by name; writes digits.png.
	$(BIN)/python examples/digits.py --out digits.png

build: $(VENV)/installed ## The fused kernels, into the user's cache.
	$(BIN)/python -m tf_adam_variants.fused build

test: build ## The quick tests: five minutes on two cores.
	TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python -m pytest -n 2

test-all: build ## All other tests: examples, experiments, wheels, subprocesses, most of XLA.
	TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python -m pytest -n 2 -m slow

mutants: build ## Plant mistakes in the package, one after another: the quick tests must find each.
	TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python tests/tools/mutants.py

torture: build ## Kills, full disks and damaged files while a training is saved and loaded: some minutes.
	TF_CPP_MIN_LOG_LEVEL=3 $(WITH_HELPERS) $(BIN)/python tests/tools/torture.py --json tests/tools/torture.json

lint: $(VENV)/installed ## Style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror custom_ops/*.h custom_ops/*.cc custom_ops/*.cu

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/docs ## The pages of docs/ and the reference as a site in build/site; the picture of the imports.
	$(BIN)/python docs/import_graph.py docs/images/imports.svg
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: build ## Milliseconds a step and seconds to the first one, compared with Keras.
	$(BIN)/python examples/benchmarks/benchmark.py --json examples/benchmarks/benchmark.json
	$(BIN)/python examples/benchmarks/sparse_benchmark.py --json examples/benchmarks/sparse_benchmark.json

figures: $(VENV)/installed ## The pictures and tables of README.md and docs/, from the results of examples/.
	$(BIN)/python docs/figures.py

fuzz: build ## Random steps through every engine, against the oracle: make fuzz SEED=1 CASES=1000
	TF_CPP_MIN_LOG_LEVEL=3 $(WITH_HELPERS) $(BIN)/python tests/tools/fuzz.py --seed $(or $(SEED),0) --cases $(or $(CASES),100000)

endurance: build ## 20,000 steps eagerly, in functions that are traced again, and in fit: memory stays flat.
	TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python tests/tools/endurance.py --steps $(or $(STEPS),20000)

CXX ?= g++
CHECKED = $(CXX) -std=c++17 -Wall -Wextra -O1 -g -fno-omit-frame-pointer -fopenmp-simd -fno-math-errno \
	-fno-trapping-math -ffp-contract=fast -fno-sanitize-recover=all -pthread
LEVELS = $(if $(filter x86_64,$(shell uname -m)),v3 v4)

sanitize: ## The fused kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
	@set -e; for checks in address,undefined thread; do \
		made=$$(mktemp -d); echo "== $$checks"; \
		for set in baseline $(LEVELS); do \
			march=$$(test $$set = baseline || echo -march=x86-64-$$set); \
			$(CHECKED) -fsanitize=$$checks $$march -DTFAV_SET=$$set -c custom_ops/loops.cc -o $$made/$$set.o; \
		done; \
		$(CHECKED) -fsanitize=$$checks $(if $(LEVELS),-DTFAV_X86_LEVELS) custom_ops/check.cc \
			custom_ops/dispatch.cc $$made/*.o -o $$made/check; \
		$$made/check; rm -r $$made; \
	done

# The kernels for GPUs, as compiled for a CPU. ThreadSanitizer would touch all of the huge array.
CUDA_CHECKED = tests/tools/cuda_kernels.py check --on-cpu --quick --flag=-fno-sanitize-recover=all
PRELOADED = $(foreach library,$(1) libstdc++,$(shell $(CXX) -print-file-name=$(library).so))

sanitize-cuda: $(VENV)/installed ## The same for the kernels for GPUs.
	LD_PRELOAD="$(call PRELOADED,libasan)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python $(CUDA_CHECKED) --flag=-fsanitize=address,undefined
	LD_PRELOAD="$(call PRELOADED,libtsan)" $(BIN)/python $(CUDA_CHECKED) --flag=-fsanitize=thread --without huge

# These want a GPU, nvcc, and a Python with NumPy and PyTorch. Only a part of the report wants TensorFlow.
test-cuda: ## The kernels for GPUs against the oracle.
	$(PYTHON) tests/tools/cuda_kernels.py check

sanitize-on-gpu: ## The kernels for GPUs under compute-sanitizer.
	set -e; for tool in memcheck racecheck initcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --report-api-errors no \
			--error-exitcode 1 $(PYTHON) tests/tools/cuda_kernels.py check --quick --without huge; \
	done

gpu-report: ## Both, and how fast they are: docs/gpu-report.json and .md. ON_CPU=1 rehearses it without a GPU.
	$(PYTHON) tests/tools/gpu_report.py $(if $(ON_CPU),--on-cpu)

test-oldest: ## The test suite on the oldest TensorFlow and Keras that pyproject.toml declares.
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet tensorflow==2.18.0 keras==3.6.0 'numpy<2.1' --editable '.[test]'
	.venv-oldest/bin/python -m tf_adam_variants.fused build
	.venv-oldest/bin/python -m pytest -n 2

clean: ## Remove what the targets above have made.
	rm -rf $(VENV) .venv-oldest build *.egg-info digits.png
