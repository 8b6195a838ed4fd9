# `make demo` and `make test` set up all they need in .venv, and nothing outside it.
# They need Python 3.11 or newer and make; a C++ compiler makes minidl faster, and is optional.

# The first Python that is new enough; another one: make PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
	done || true)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Installing starts anew when one of these changes. (Python files need no installing: -e.)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu lint tutorials clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

demo: $(VENV)/ready  ## train on handwritten digits, and write runs/demo/index.html
	$(BIN)/minidl demo $(ARGS)

test: $(VENV)/ready-test  ## run the tests (one file: make test ARGS=tests/test_ops.py)
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/ready-bench  ## compare with PyTorch and NumPy on the CPU (a rough look: make bench ARGS=--quick)
	$(BIN)/python benchmarks/cpu.py $(ARGS)

# On the GPU machine's own Python, with the packages that it has: there may be no network.
gpu:  ## build, test and measure on an NVIDIA GPU (another Python: make gpu PYTHON=...)
	$(PYTHON) setup.py --quiet build_ext --inplace
	MINIDL_GPU=1 $(PYTHON) -m pytest -q tests/cuda/test_cupy.py
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(ARGS)

lint: $(VENV)/ready-dev  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

tutorials: $(VENV)/ready-tutorials  ## run every tutorial as a script
	set -e; for file in tutorials/[0-9]*.py; do \
		echo "== $$file"; MPLBACKEND=Agg $(BIN)/python $$file; done

clean:  ## remove .venv, what was built, and caches (runs/ and data/ stay)
	rm -rf $(VENV) build dist *.egg-info minidl/_native.*.so minidl/_native_missing.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define install
	$(BIN)/python -m pip install --quiet --editable '.$(1)'
	@$(BIN)/python -c 'from minidl.backend.native import why_missing; \
		why_missing and print(f"minidl will run on NumPy alone: {why_missing}")'
endef

# A stamp a set of extras: .venv/ready for none, .venv/ready-test for [test], ...
$(VENV)/ready: $(VENV)/python $(SOURCES)
	$(call install)
	touch $@

$(VENV)/ready-%: $(VENV)/python $(SOURCES)
	$(call install,[$*])
	touch $(VENV)/ready $@

$(VENV)/python:
	@test -n "$(PYTHON)" || { \
		echo "minidl needs Python 3.11 or newer, and none was found (python3 here is" \
			"$$(python3 --version 2>&1)). Install one, or name it: make PYTHON=/path/to/python"; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "minidl needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1)." \
			"Name another: make PYTHON=/path/to/python"; \
		exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	touch $@
