# Everything runs from a virtual environment in .venv, which the first target that needs it makes.

PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))  # the others are part of upcall's own package

.PHONY: demo recording test test-all check bench soak fuzz docs setup test-tools fuzz-tools lock sbom dist dist-check dist-install-check \
	deb clean help

help:
	@echo "make demo    the broker, a daemon and a key at work; needs no privileges and no eCryptfs"
	@echo "make test    tests of bytes, of real sockets, and of the link on the real kernel in a virtual machine"
	@echo "make test-all   besides, attacks, and eCryptfs, CIFS, logins, units, quotas and names on the real kernel"
	@echo "make check   lint, types, imports between layers, and the quick tests of bytes and sockets: a minute"
	@echo "make bench   measures us and our peers in one run, and prints the ratios"
	@echo "make fuzz    an hour (FUZZ_SECONDS) of coverage-guided fuzzing of every decoder and of the broker's core"
	@echo "make dist    wheels and sdists, the same bit for bit wherever they are built; make dist-check shows it"
	@echo "make dist-install-check   installs the wheels into clean environments, with old and new dependencies, and uses them"
	@echo "make deb     Debian packages, in dist/deb: their installation is the whole set-up (docs/packaging.md)"
	@echo "make soak    ten minutes of everything at full rate: nothing may be lost, and nothing may grow"

demo: setup
	$(BIN)/upcall demo

test: setup test-tools fuzz-tools
	$(BIN)/python -m tests.run_parts

# Besides: the attacks, and every boot of the lab: logins, units, quotas, names, forwarders, on each kernel that runs here.
test-all: setup test-tools fuzz-tools
	$(BIN)/python -m tests.run_parts --all

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not lab and not kernel and not slow"

bench: setup test-tools
	$(BIN)/python -m bench

soak: setup test-tools
	$(BIN)/python -m bench.soak

FUZZ_SECONDS ?= 3600

fuzz: setup fuzz-tools
	$(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS)

# There is no atheris for every Python and machine: its targets are left out then, and say so.
fuzz-tools: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/$(PINNED) -r requirements/fuzz.txt || \
		echo "no atheris: nothing will look for new inputs" >&2

dist: setup
	$(BIN)/python -m release.build dist

dist-check: setup
	$(BIN)/python -m release.check

# Takes a quarter of an hour, and other packages from pip's configured index.
dist-install-check: setup test-tools
	$(BIN)/python -m release.install_check

# What building Debian packages needs, where root may install it; release/deb.py names what is missing elsewhere.
DEB_TOOLS := dpkg-dev debhelper lintian gcc libc6-dev libtss2-dev pkg-config python3

deb: setup
	@if test "$$(id -u)" = 0 && command -v apt-get >/dev/null && ! dpkg -s $(DEB_TOOLS) >/dev/null 2>&1; then \
		echo "installing $(DEB_TOOLS) ..."; \
		sh tests/install_tools.sh $(DEB_TOOLS) || echo "not installed" >&2; fi
	$(BIN)/python -m release.deb dist/deb

# The recording at the top of README.md, from a real run.
recording: setup
	$(BIN)/python docs/recording.py docs/recording.svg

# What docs/configuration.md says of each key.
docs: setup
	$(BIN)/python -m upcall.config.reference docs/configuration.md
	$(BIN)/python docs/drawings.py

setup: .venv/made

.venv/made: pyproject.toml requirements/setup.txt $(addsuffix /pyproject.toml,$(PLUGINS)) $(wildcard upcall/protocols/request_key/forwarder/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "upcall needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; exit 69; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; } || \
		{ echo "$(PYTHON) cannot make virtual environments: install python3-venv" >&2; exit 69; }
	@echo "setting up .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/$(PINNED) -r requirements/setup.txt
	@$(BIN)/$(OURS) -e . $(addprefix -e ./,$(PLUGINS))
	@touch $@

# What is pinned: requirements/README.md. The packages of this repository are built by the setuptools that is pinned there.
PINNED := python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all:
OURS := python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation

COMPILE = .tools/bin/uv pip compile - --quiet --no-config --universal --python-version 3.11 \
	--generate-hashes --no-header --no-annotate --upgrade --no-emit-package upcall \
	$(patsubst plugins/%,--no-emit-package upcall-%,$(PLUGINS))

# Newer versions of everything; the ranges in pyproject.toml and in *.in are all that holds them.
lock: .tools/made
	@printf -- '-e %s\n' '.[dev]' $(addprefix ./,$(PLUGINS)) | $(COMPILE) -o requirements/setup.txt
	@printf -- '-e %s\n' . $(addprefix ./,$(PLUGINS)) | $(COMPILE) -c requirements/setup.txt -o requirements/runtime.txt
	@for name in tss-build tss fuzz tools; do \
		$(COMPILE) -c requirements/setup.txt -o requirements/$$name.txt < requirements/$$name.in || exit; done

# CycloneDX, of what a user installs. Not in the repository: it says what runtime.txt says, and is the same whenever it is made.
sbom: .tools/made
	@mkdir -p dist
	@.tools/bin/cyclonedx-py requirements requirements/runtime.txt --pyproject pyproject.toml --mc-type application \
		--output-reproducible --of JSON -o dist/upcall.cdx.json
	@echo dist/upcall.cdx.json

.tools/made: requirements/tools.txt
	@$(PYTHON) -m venv .tools
	@.tools/bin/$(PINNED) -r requirements/tools.txt
	@touch $@

# What the tests need besides Python: the virtual machine, a token, a TPM and a pinentry, all in software; and for the
# guest a KDC, a file server and what the kernel asks for tickets. Root on a Debian machine gets it; for others the
# tests that need what is missing say so and are left out.
TOOLS := qemu-system-x86 softhsm2 swtpm libtss2-dev libtss2-tcti-device0 libtss2-tcti-swtpm0 gcc pkg-config \
	pinentry-tty pinentry-curses keyutils dnsmasq-base krb5-kdc krb5-admin-server krb5-user samba winbind cifs-utils faketime \
	nfs-common nfs-kernel-server kmod quota e2fsprogs xfsprogs systemd libpam-systemd dbus openssh-server \
	mandoc groff-base man-db bash-completion zsh fish \
	dbus-daemon dunst xvfb scrot fonts-dejavu-core \
	debhelper lintian python3-click python3-jeepney python3-rich python3-secretstorage python3-tomli-w

test-tools: setup
	@if test "$$(id -u)" = 0 && command -v apt-get >/dev/null && ! dpkg -s $(TOOLS) >/dev/null 2>&1; then \
		echo "installing $(TOOLS) ..."; \
		sh tests/install_tools.sh $(TOOLS) || echo "not installed" >&2; fi
	@if pkg-config --exists tss2-esys 2>/dev/null && ! $(BIN)/python -c 'import tpm2_pytss' 2>/dev/null; then \
		echo "building tpm2-pytss ..."; \
		{ $(BIN)/$(PINNED) -r requirements/tss-build.txt && \
			$(BIN)/$(PINNED) --no-build-isolation --no-binary tpm2-pytss -r requirements/tss.txt; } || \
		echo "not built" >&2; fi

clean:
	rm -rf .venv .tools build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
