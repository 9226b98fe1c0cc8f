# Everything runs from a virtual environment in .venv, which the first target that needs it makes.

PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(wildcard plugins/*)

.PHONY: demo test check bench setup lab-tools lab-tests clean help

help:
	@echo "make demo    the broker, a daemon and a key at work; needs no privileges and no eCryptfs"
	@echo "make test    all tests: bytes, real sockets, and the real kernel in a virtual machine"
	@echo "make check   lint, types, and the tests that need no virtual machine; under a minute"
	@echo "make bench   measures us and our peers in one run, and prints the ratios"

demo: setup
	$(BIN)/upcall demo

test: setup lab-tools
	$(BIN)/python -m pytest -q -m "not kernel"
	$(BIN)/python -m tests.run_lab

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not lab and not kernel"

bench: setup
	$(BIN)/python -m bench

setup: .venv/made

.venv/made: pyproject.toml $(addsuffix /pyproject.toml,$(PLUGINS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "upcall needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; exit 69; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; } || \
		{ echo "$(PYTHON) cannot make virtual environments: install python3-venv" >&2; exit 69; }
	@echo "setting up .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' $(addprefix -e ,$(addprefix ./,$(PLUGINS)))
	@touch $@

# Root on a Debian machine gets what the virtual machine needs; others are told by `upcall lab doctor`.
lab-tools:
	@command -v qemu-system-x86_64 >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends qemu-system-x86 >/dev/null; } || true

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
