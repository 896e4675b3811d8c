# The two commands are `make demo` and `make test`; both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

RADOSGW := radosgw ceph-mon ceph-osd ceph-common

CHROMIUM := chromium fonts-dejavu-core

.PHONY: demo test test-slow test-road test-faults lint docs docs-check mutation bench findings clean tools

demo: $(READY)
	$(BIN)/python jobs/demo.py

# The tests that share a local Ray come one after the other.
test: $(READY) tools
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not slow and not faults and not road"
	$(BIN)/python -m pytest -m "ray and not slow and not faults" tests

# Jobs from end to end, killed, submitted and on S3: as long again.
test-slow: $(READY) tools
	$(BIN)/python -m pytest -m "slow and not faults" tests

# The way to a cluster, on this machine: pretended nodes, and an autoscaler that starts them.
test-road: $(READY)
	$(BIN)/python -m pytest -m road tests/road

# Kills workers, machines and drivers at random times for ten minutes.
test-faults: $(READY)
	$(BIN)/python -m pytest -m "faults or not faults" tests/faults/test_faults.py

# A real S3 server, a browser for the reports and systemd's check of units, from the system's
# packages: as root, where there is apt-get.
tools:
	@missing=""; \
	command -v radosgw >/dev/null || missing="$$missing $(RADOSGW)"; \
	command -v chromium >/dev/null || missing="$$missing $(CHROMIUM)"; \
	command -v systemd-analyze >/dev/null || missing="$$missing systemd"; \
	[ -z "$$missing" ] && exit; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing what some tests need (up to 900 MB):$$missing"; \
	  { timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    timeout 900 apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null 2>&1 \
	    && exit; \
	fi; \
	echo "left out: the tests that need what cannot be installed here. As root on Debian:" \
	  "apt-get install --no-install-recommends$$missing"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m tests.docs

# Also part of `make test`.
docs-check: $(READY)
	$(BIN)/python -m pytest tests/test_docs.py tests/test_readme.py

# Which small mistakes in leafnet/ the tests would notice: half an hour.
mutation: $(READY)
	$(BIN)/python -m tests.mutation $(ARGS)

bench: $(READY)
	$(BIN)/python -m tests.benchmarks $(ARGS)

# Surprises in other libraries, each in an environment of its own: four to seven minutes.
findings:
	PYTHON=$(PYTHON) findings/run.sh $(ARGS)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); \
	sys.exit(None if ok else "leafnet needs Python 3.11 to 3.13, this is %d.%d; \
	set PYTHON=, as in: make demo PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
