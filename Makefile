# The commands of people and of CI. `make` alone lists them. Each one sets up .venv if it has to.

VENV := .venv
STAMP := $(VENV)/.installed
NAMES := startup decode profiles recommend scientific pipeline caption_overhead caption_vs_daft captioner_quality
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST_ON_TWO_CORES := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-cluster soak bench check clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(STAMP)  ## draw a shop with photos, run every stage on it, write demo-output/report.html
	@$(BIN)/vlm4rec demo

test: $(STAMP)  ## run the tests, and name the ten slowest
	@$(PYTEST_ON_TWO_CORES) --durations 10

test-cluster: $(STAMP)  ## run the tests that start a cluster, or kill or stop processes
	@$(PYTEST_ON_TWO_CORES) --durations 10 -m 'cluster and not soak'

soak: $(STAMP)  ## kill runs at random moments, submit every job, damage photos; over an hour
	@$(BIN)/python -m pytest -m soak --verbose

bench: $(STAMP)  ## install the peers, run benchmarks: all, or those of make bench NAMES="startup decode"
	@$(PIP) --editable '.[local,dev,bench]'
	@for name in $(NAMES); do echo "benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit; done

check: $(STAMP)  ## lint, check the layout, the types and the layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy vlm4rec_spark
	@$(BIN)/python -m pytest --quiet tests/test_layering.py

clean:  ## remove .venv, demo-output, builds and caches
	@rm -rf $(VENV) demo-output build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Python 3.11 to 3.13: python3 if it is one of these, else the newest.
$(STAMP): setup.py constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  for python in python3 python3.13 python3.12 python3.11 ""; do \
	    $${python:-false} -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "No Python 3.11 to 3.13 found: install one, for instance with 'apt-get install python3.11 python3.11-venv'." >&2; exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$python --version) ..."; \
	  if ! $$python -m venv $(VENV) >/dev/null 2>&1; then \
	    rm -rf $(VENV); \
	    echo "$$python can't make a virtual environment: install its venv module, on Debian with 'apt-get install python3-venv'." >&2; exit 1; \
	  fi; \
	fi
	@echo "Installing packages into $(VENV) (about 3 minutes, 6.5 GB) ..."
	@$(PIP) --editable '.[local,dev]'
	@if ! $(BIN)/python -c 'from vlm4rec_spark.spark import java; java.find()' 2>/dev/null; then \
	  echo "No Java 17 or newer found: installing a Java runtime into $(VENV) (100 MB) ..."; \
	  $(PIP) --editable '.[java]'; \
	fi
	@echo "Starting Spark once: fetches the Delta jars (10 MB) if they aren't in the home folder yet,"
	@echo "and keeps Spark's classes in $(VENV)/cache (200 MB), so that later starts take half the time ..."
	@$(BIN)/python -m vlm4rec_spark.spark.class_archive
	@touch $@
