# `make demo` and `make test` make .venv, install what they need, and run. On macOS MLX uses the
# GPU; on Linux the `cpu` extra brings MLX's CPU backend.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BACKEND := $(if $(filter Linux,$(shell uname -s)),cpu,)
comma := ,

# MLX's Linux build bundles a slow BLAS; Debian's libopenblas0-pthread is about 30 times faster in
# float32 products. Used where it is installed, never required.
BLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libblas.so.3))
FAST := $(if $(BLAS),env LD_PRELOAD=$(BLAS))

CUDA_LANE := -m cuda tests/test_kernels.py tests/parity/test_cuda.py

DEMO := build/demo-q4
QUESTION := Hello! What is the capital of France?

.PHONY: demo test parity triton cuda lint format clean

demo: $(DEMO)/config.json
	@if [ -t 0 ]; then $(BIN)/python chat.py $(DEMO); \
	else echo '> $(QUESTION)'; $(BIN)/python chat.py $(DEMO) -p '$(QUESTION)'; fi

$(DEMO)/config.json: $(VENV)/.demo demo/checkpoint/config.json
	$(BIN)/python -m convert run demo/checkpoint $(DEMO) --recipe q4

test: $(VENV)/.test
	$(FAST) $(BIN)/python -m pytest $(ARGS)

# Record the demo checkpoint with the best hardware present and replay it against two conversions.
parity: $(VENV)/.test $(DEMO)/config.json
	rm -f build/demo.golden.safetensors
	$(BIN)/python -m mlx_dsv3.reference.record demo/checkpoint build/demo.golden.safetensors \
	  --prompt-file tests/golden/chat.txt --states all
	test -d build/demo-q8 || $(BIN)/python -m convert run demo/checkpoint build/demo-q8 --recipe q8
	for folder in build/demo-q8 $(DEMO); do \
	  $(BIN)/python -m mlx_dsv3.parity $$folder build/demo.golden.safetensors && \
	  $(BIN)/python -m mlx_dsv3.parity $$folder build/demo.golden.safetensors --teacher-forced \
	  || exit 1; done

# The Triton kernels in Triton's interpreter, on a CPU.
triton: $(VENV)/.test
	$(BIN)/python -m pip install --quiet triton
	env TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_kernels.py $(ARGS)

# On a machine with an NVIDIA GPU: kernels, PyTorch's own block-scaled matmul, recordings in FP8.
cuda: $(VENV)/.test
	$(BIN)/python -m pip install --quiet triton
	$(BIN)/python -m pytest -m cuda tests/test_kernels.py tests/parity $(ARGS)
	$(BIN)/python benchmarks/bench_kernels.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: `$(PYTHON)` is older than Python 3.11' >&2; \
	    echo 'hint: make PYTHON=python3.12 demo' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.$(if $(BACKEND),[$(BACKEND)])'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable \
	  '.[$(if $(BACKEND),$(BACKEND)$(comma))reference,test]'
	@touch $@ $(VENV)/.demo
