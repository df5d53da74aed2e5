# `make demo` and `make test` make .venv, install what they need, and run. On macOS MLX uses the
# GPU; on Linux the `cpu` extra brings MLX's CPU backend. Versions are those of PINS, and without
# PINS the newest that pyproject.toml allows.
PYTHON ?= python3
VENV := .venv
PINS := constraints.txt
BIN := $(VENV)/bin
BACKEND := $(if $(filter Linux,$(shell uname -s)),cpu,)
comma := ,
# The second variable is for the build of the package itself, which pip 25.3 and later ask for.
PIP := $(if $(PINS),env PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS)) \
  $(BIN)/python -m pip install --quiet

# MLX's Linux build bundles a slow BLAS; Debian's libopenblas0-pthread is about 30 times faster in
# float32 products. Used where it is installed, never required.
BLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libblas.so.3))
FAST := $(if $(BLAS),env LD_PRELOAD=$(BLAS))

# `uv` resolves for every platform at once, which pip does not.
UV := build/uv/bin/uv
RESOLVE := $(UV) pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
  --no-annotate --custom-compile-command 'make pins' \
  --extra cpu --extra reference --extra test pyproject.toml

LONG := demo_model/* fuzz/* parity/test_long.py parity/test_mutations.py parity/test_record.py \
  parity/test_replay.py parity/test_damage.py parity/test_report.py parity/test_perplexity.py parity/test_folders.py \
  test_convert*.py test_doc*.py test_emitted.py test_draft_control.py test_parallel.py \
  test_plan.py test_steps.py test_state.py test_streaming*.py test_wheel.py test_writer.py
# A process for each core; those tests of a file that share a model stay together.
EACH_CORE := -n auto --maxprocesses 4 --dist loadfile
CUDA_LANE := -m cuda tests/test_kernels.py tests/parity/test_cuda.py

DEMO := build/demo-q4
QUESTION := Hello! What is the capital of France?

.PHONY: demo test quick slow fuzz fuzz-chat picture test-newest test-oldest pins parity triton cuda lint format clean

demo: $(DEMO)/config.json
	@if [ -t 0 ]; then $(BIN)/python chat.py $(DEMO); \
	else echo '> $(QUESTION)'; $(BIN)/python chat.py $(DEMO) -p '$(QUESTION)'; fi

$(DEMO)/config.json: $(VENV)/.demo demo/checkpoint/config.json
	$(BIN)/python -m convert run demo/checkpoint $(DEMO) --recipe q4

test: $(VENV)/.test
	$(FAST) $(BIN)/python -m pytest $(if $(ARGS),$(ARGS),$(EACH_CORE))

# For the edit loop: without the tests that start programs, write checkpoints or stream experts.
quick: $(VENV)/.test
	$(FAST) $(BIN)/python -m pytest -q $(EACH_CORE) $(foreach name,$(LONG),--ignore-glob='tests/$(name)') $(ARGS)

# By turns: `make slow ARGS='--turn 10'` runs the day's share, for 10 minutes at most. Pytest's
# status 5 says that there are none.
slow: $(VENV)/.test
	$(FAST) $(BIN)/python -m pytest -m slow $(ARGS) || [ $$? = 5 ]

# Programs against damaged files and command lines. `make fuzz ARGS='--seconds 300'` has another
# seed each time; what it finds lies in build/fuzz and comes again with `--seed S --only NUMBER`.
fuzz: $(VENV)/.test
	env PYTHONPATH=tests $(BIN)/python -m fuzz $(or $(ARGS),--seconds 300)

# Random keys and commands in chats on pseudo-terminals: 2,000 sequences, the same for the same SEED.
fuzz-chat: $(VENV)/.test $(DEMO)/config.json
	env PYTHONPATH=tests $(BIN)/python -m fuzz.chat $(ARGS)

# Draw docs/chat.svg, the picture of the README: a real chat with the demo model.
picture: $(VENV)/.test $(DEMO)/config.json
	env PYTHONPATH=tests $(BIN)/python -m demo_model.picture

# Every version as new, or as old, as pyproject.toml allows, in an environment of its own.
test-newest:
	rm -rf build/newest
	$(MAKE) test VENV=build/newest PINS=

test-oldest: $(UV)
	rm -rf build/oldest
	$(RESOLVE) --resolution lowest-direct > build/oldest.txt
	$(MAKE) test VENV=build/oldest PINS=build/oldest.txt

# Pin the newest versions, those of macOS too, and keep the pins if the tests pass with them.
pins: $(UV)
	rm -rf build/pins build/pins.txt
	$(RESOLVE) > build/pins.txt
	$(MAKE) test VENV=build/pins PINS=build/pins.txt
	mv build/pins.txt constraints.txt

$(UV):
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet uv

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
	$(PIP) triton
	env TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_kernels.py $(ARGS)

# On a machine with an NVIDIA GPU: kernels, PyTorch's own block-scaled matmul, recordings in FP8.
# Needs neither MLX nor the network: the system's Python with torch, triton, tokenizers and pytest.
cuda:
	$(PYTHON) -m pytest $(CUDA_LANE) $(ARGS)
	env PYTHONPATH=. $(PYTHON) benchmarks/bench_kernels.py

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

$(VENV)/.demo: pyproject.toml $(PINS) $(VENV)/bin/python
	$(PIP) --editable '.$(if $(BACKEND),[$(BACKEND)])'
	@touch $@

$(VENV)/.test: pyproject.toml $(PINS) $(VENV)/bin/python
	$(PIP) --editable '.[$(if $(BACKEND),$(BACKEND)$(comma))reference,test]'
	@touch $@ $(VENV)/.demo
