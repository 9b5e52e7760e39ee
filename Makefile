# Each target does all the set-up that it needs, in .venv; only Python, make and, for the C++ kernels, a compiler have to
# be there. Without a compiler the install is pure Python.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Python compiles what is imported when it is; all of these packages would take it a minute.
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile
# Where the environment keeps Python from writing down what it has compiled, as images of containers do, each of the tests'
# many processes would compile PyTorch again, for one to four seconds.
export PYTHONDONTWRITEBYTECODE :=
# setup.py looks for cmake and ninja on the PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt mtlkernels/operators.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find $(wildcard csrc tests) -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# CXX where the user has set it, which CMake asks first.
CXX_OF_USER := $(if $(filter environment command,$(firstword $(origin CXX))),$(firstword $(CXX)))
COMPILER := $(firstword $(foreach name,$(CXX_OF_USER) c++ g++ clang++,$(shell command -v $(name))))
NVCC := $(shell command -v nvcc)
CUDA_SOURCES := $(shell find csrc/cuda csrc/common -type f) tests/cuda/compile.py
# With a compiler the C++ kernels must be there, so that they cannot vanish without a test failing.
REQUIRED := $(if $(COMPILER),--require-backend cpp)

# A process a core, up to four; tests that want several threads share them, so that threads must not spin while they wait.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Arguments of the targets below, as in `make bench SUITE=mixture DEVICE=cuda`.
SUITE ?=
DEVICE ?= cpu
CASES ?= 1000
SEED ?=
ARGS ?=

.DELETE_ON_ERROR:
.PHONY: help demo test fuzz sanitize coverage large docs matrix wheel wheel-check check lint mypy pyright bench bench-guard readme aot gpu clean

help:
	@echo "make demo    train two libraries' PLE on real data before and after mk.convert, and one under PCGrad"
	@echo "make test    check, then the whole test suite"
	@echo "make fuzz    random calls of every op against float64; CASES=10000 SEED=1 ARGS='--only pcgrad'"
	@echo "make large   tests of tensors of more than 2^31 elements, one after another: 16 GB of memory and many minutes"
	@echo "make coverage    which branches of csrc the tests take, by gcov: a quarter of an hour; ARGS=--report prints it again"
	@echo "make docs    build the site into docs/_build/html, with warnings as errors"
	@echo "make matrix  build and test the last commit with other Pythons and PyTorches; ARGS='--pairs 3.10:2.10'"
	@echo "make wheel   the wheel of a release: kernels for several PyTorches and Pythons; ARGS='--torch 2.13 --python 3.11'"
	@echo "make wheel-check    that wheel in fresh environments without a compiler; ARGS='--pairs 3.11:2.13'"
	@echo "make check   formatting, lint and types; with nvcc, what the CUDA kernels use"
	@echo "make bench   benchmarks; SUITE=name DEVICE=cpu|cuda ARGS='--json FILE --plot DIR'"
	@echo "make bench-guard    instructions of small calls against the baseline, under valgrind; ARGS=--update keeps them"
	@echo "make readme  rewrite the tables of README and of the site from benchmarks/results"
	@echo "make aot     compile every Triton kernel for every architecture, without a GPU; ARGS='--arch 90'"
	@echo "make sanitize    the C++ kernels under sanitizers: builds, planted faults, tests, fuzzer; ARGS='--only thread'"
	@echo "make gpu     on a machine with a GPU: build, tests, sanitizer, suites, by PYTHON's packages; ARGS='--list'"
	@echo "make clean   remove everything that make has made, .venv included"

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first, under its plain name: whoever wants a certain build of it installs that into .venv, or sets pip up so.
$(VENV)/.torch: $(VENV)/.created
	$(PIP) torch
	@touch $@

# What pyproject.toml lists as the extra "build", which has to be there before the package can be installed.
$(VENV)/.build-tools: $(VENV)/.torch
	$(PIP) "setuptools>=77.0.3" wheel "cmake>=3.26" ninja "pybind11>=2.13"
	@touch $@

$(VENV)/.installed: $(VENV)/.build-tools $(BUILD_INPUTS)
	@echo "Compiling the kernels takes a minute or some, in silence; without a compiler they are left out."
	$(PIP) --no-build-isolation --editable ".[dev]"
	@$(PY) -c "import mtlkernels; print(mtlkernels.show_config())"
	@touch $@

demo: $(VENV)/.installed
	$(PY) -m benchmarks.demo $(ARGS)

test: check
	$(PYTEST) $(REQUIRED) $(ARGS)

fuzz: $(VENV)/.installed
	$(PY) -m tests.fuzz --cases $(CASES) $(if $(SEED),--seed $(SEED)) $(ARGS)

# One at a time, as each may take most of the memory.
large: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(PY) -m pytest -m large -n 0 $(ARGS) tests/ops/test_large.py

# The extension that is built here is a copy's, in build/coverage.
coverage: $(VENV)/.installed
	$(PY) -m tests.coverage $(ARGS)

docs: $(VENV)/.installed
	$(PY) -m sphinx -W --keep-going --fresh-env -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

matrix:
	$(PYTHON) -m release.matrix $(ARGS)

# Takes longer than all of the other checks, so it is done again only where something has changed.
$(VENV)/.cuda-report: $(VENV)/.installed $(CUDA_SOURCES)
	@$(PY) -m tests.cuda.compile > $@ || { cat $@; exit 1; }

# Three of the checks take one core for a quarter of a minute: they share what cores there are.
check: $(VENV)/.installed
	@$(MAKE) --no-print-directory --jobs=3 lint mypy pyright $(if $(NVCC),$(VENV)/.cuda-report)
	@$(if $(NVCC),cat $(VENV)/.cuda-report,echo "csrc/cuda: not compiled, as there is no nvcc")

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(CXX_SOURCES),$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES))

mypy: $(VENV)/.installed
	$(PY) -m mypy

pyright: $(VENV)/.installed
	$(VENV)/bin/basedpyright

bench: $(VENV)/.installed
	$(PY) benchmarks/run.py $(SUITE) --device $(DEVICE) $(ARGS)

bench-guard: $(VENV)/.installed
	$(PY) -m benchmarks.guard $(ARGS)

readme: $(VENV)/.installed
	$(PY) -m benchmarks.readme

# Of whatever Pythons and PyTorches it is for; the PyTorches are downloaded, which is gigabytes, and kept in build.
wheel: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable ".[release]"
	$(PY) -m release.wheel $(ARGS)

wheel-check: $(VENV)/.installed
	$(PY) -m release.check $(ARGS)

aot: $(VENV)/.installed
	$(PY) -m tests.triton.aot $(ARGS)

# Two builds of the C++ kernels, in build, of minutes each.
sanitize: $(VENV)/.installed
	$(PY) -m tests.sanitize $(ARGS)

# With the packages of PYTHON, as such a machine may have no network; docs/gpu.md names them.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info mtlkernels/lib mtlkernels/_cuda*.so mtlkernels/_build.json demo-out bench-out
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis __pycache__ docs/_build
	find mtlkernels tests benchmarks docs examples release -name __pycache__ -type d -prune -exec rm -rf {} +
