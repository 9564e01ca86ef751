# make install   .venv with the newest supported versions (constraints.txt)
# make demo      fine-tune the bundled digits model with RLR, into runs/demo/
# make test      the tests
# make test-all  the tests, those that take a second or more (medium, slow) too
# make test-old  the tests that depend on versions, against the oldest supported ones (constraints-trl023.txt)
# make lint      ruff and mypy
# make package   wheel and source distribution, into dist/
# make site      the documentation as a site, into build/site/; refuses broken links
# make benchmark        the runs of the benchmark that have no result yet, then docs/benchmarks.md; hours
# make benchmark-quick  a small comparison with assertions; minutes

PYTHON ?= python3.11
WORKERS ?= 2
SHARED = -n $(WORKERS) --dist loadfile  # what the tests of a file share is made once (loadgroup has no effect with pytest 9.2 and pytest-xdist 3.8)
VENV := .venv
VENV_OLD := .venv-trl023
STAMP := $(VENV)/.installed
STAMP_OLD := $(VENV_OLD)/.installed
STAMPS_BENCHMARK := $(VENV)/.benchmark $(VENV_OLD)/.benchmark

# What does not depend on versions runs at the newest end alone, and so do the slow tests.
OLD_TESTS := tests/parity tests/training tests/persistence tests/pipelines tests/observing tests/cli \
    tests/families/test_sdxl.py tests/families/test_stable_diffusion.py

.PHONY: install demo test test-all test-old lint package site benchmark benchmark-quick clean

install: $(STAMP)

# torch comes first and alone: another package's requirement on it would take a build of its own choosing.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev,trackers]'
	touch $@

$(STAMP_OLD): pyproject.toml constraints-trl023.txt
	$(PYTHON) -m venv $(VENV_OLD)
	$(VENV_OLD)/bin/python -m pip install -q -c constraints-trl023.txt torch
	$(VENV_OLD)/bin/python -m pip install -q -c constraints-trl023.txt -e '.[dev]'
	touch $@

# A run of the benchmark is a process of one of the two environments: the task that reads needs its recognizer in both.
$(VENV)/.benchmark: $(STAMP)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[benchmark]'
	touch $@

$(VENV_OLD)/.benchmark: $(STAMP_OLD)
	$(VENV_OLD)/bin/python -m pip install -q -c constraints-trl023.txt -e '.[benchmark]'
	touch $@

demo: $(STAMP)
	$(VENV)/bin/rlr-trainer demo --output_dir runs/demo $(ARGS)

# as CI has it: libraries that find the hub unreachable behave otherwise than those told to stay offline
test test-all test-old: export HF_HUB_OFFLINE = 1

test: $(STAMP)
	$(VENV)/bin/python -m pytest $(SHARED) -m 'not slow and not medium' $(ARGS)

test-all: $(STAMP)
	$(VENV)/bin/python -m pytest $(SHARED) $(ARGS)

test-old: $(STAMP_OLD)
	$(VENV_OLD)/bin/python -m pytest $(SHARED) -m 'not slow' $(OLD_TESTS) $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# build/lib is removed first: setuptools would pack what an earlier build has left there
package: $(STAMP)
	rm -rf build/lib dist
	$(VENV)/bin/python -c "import setuptools.build_meta as build; build.build_sdist('dist'); build.build_wheel('dist')"

site: $(STAMP)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(VENV)/bin/mkdocs build --strict

benchmark: $(STAMPS_BENCHMARK)
	$(VENV)/bin/python benchmarks/driver.py --jobs $(WORKERS) --old_python $(VENV_OLD)/bin/python $(ARGS)
	$(VENV)/bin/python benchmarks/write_report.py

benchmark-quick: $(STAMP)
	$(VENV)/bin/python benchmarks/quick.py

clean:
	rm -rf $(VENV) $(VENV_OLD) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
