# make run    a small web server showing FOLDER, and rspd in front of it: open the address that is printed
# make test   the tests, as any user; REQUIRED=1 forbids skipping; COVERAGE=yes measures branch coverage
# make test-peers    rspd beside other programs: HAProxy, nginx, socat, rinetd, NSD, and the bench; REQUIRED=1 forbids skipping
# make test-system   the package in booted machines, as root; SUITES='bookworm trixie'; REQUIRED=1 forbids skipping
# make test-handover   the package restarted under load, in booted machines, as root; SUITES and REQUIRED=1 as above
# make lint   ruff, mypy and complexipy
# make deb    the Debian package, into dist/; CHECK=yes runs the tests too
# make bench  rspd and its peers side by side, for 15 to 20 minutes, into build/bench/; BENCH_OPTIONS=--quick, see bench/README.md
# make bench-restarts   their restarts under load, for 13 minutes, into build/bench/; BENCH_OPTIONS=--quick
# make bench-looking   what a look each second costs 9,500 connections, in a minute; BENCH_OPTIONS='--connections 1000'
# make bench-routes   what a route by server name or by Host costs, in a minute, into build/bench/; BENCH_OPTIONS=--quick

PYTHON ?= python3
FOLDER ?= .
PORT ?= 8090
BACKEND_PORT ?= 8091

# A browser opens several connections, and may send nothing on one. With one at a time, this one would block the others.
RUN_OPTIONS ?= --max-connections 16

BIN = .venv/bin

# sdnotify has no pyproject.toml. An older pip warns of that unless it builds as if there were one, as a later pip does.
PIP = PIP_USE_PEP517=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip

# The package is built here, from a copy of all files that .gitignore does not name.
DEB_TREE = build/deb/rspd

ifneq ($(CHECK),yes)
override DEB_BUILD_OPTIONS += nocheck
endif
ifneq ($(filter nocheck,$(DEB_BUILD_OPTIONS)),)
override DEB_BUILD_PROFILES += nocheck
endif
export DEB_BUILD_OPTIONS DEB_BUILD_PROFILES

.PHONY: run test test-peers test-system test-handover lint deb bench bench-restarts bench-routes bench-looking clean

run: .venv/run
	@test -d "$(FOLDER)" || { echo 'make run: FOLDER=$(FOLDER) is not a folder' >&2; exit 1; }
	@why=$$($(BIN)/python -c \
	'import socket, sys; [socket.create_server(("127.0.0.1", int(p))) for p in sys.argv[1:]]' $(PORT) $(BACKEND_PORT) 2>&1) || \
	{ echo "make run: port $(PORT) or $(BACKEND_PORT) cannot be used: $${why##*: }; choose PORT=... BACKEND_PORT=..." >&2; exit 1; }
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory "$(FOLDER)" $(BACKEND_PORT) >/dev/null 2>&1 & \
	backend=$$!; trap 'kill $$backend $$proxy 2>/dev/null' EXIT; trap : INT; trap 'kill $$proxy' TERM HUP; \
	echo "Open http://127.0.0.1:$(PORT)/ (Ctrl-C ends it)"; \
	$(BIN)/python -m rspd --foreground $(RUN_OPTIONS) -l 127.0.0.1:$(PORT) -b 127.0.0.1:$(BACKEND_PORT) & proxy=$$!; \
	until wait $$proxy; code=$$?; [ $$code -lt 128 ]; do :; done; exit $$code

# To measure coverage takes as long again as the tests, most of all at each start of rspd. Properties, which Hypothesis
# tries with very many examples, are left out there: they reach the same lines again and again.
test: .venv/test
ifeq ($(COVERAGE),yes)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -rfEs -n 4 -m 'not hypothesis'
	$(BIN)/coverage combine -q
	$(BIN)/coverage report
else
	$(BIN)/python -m pytest -q -rfEs -n 4
endif

test-peers: .venv/test
	$(BIN)/python -m pytest -q -rfEs -n 4 tests/peers

# Two workers for each suite: one of them mostly waits, in the test of a hundred idle exits.
test-system: .venv/test
	$(BIN)/python -m pytest -q -rfEs -n 4 --dist loadgroup --no-loadscope-reorder tests/system

# Most tests wait. Those that need the whole host take turns.
test-handover: .venv/test
	$(BIN)/python -m pytest -q -rfEs -n 4 --dist loadgroup --no-loadscope-reorder tests/handover

lint: .venv/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/complexipy --failed

deb:
	@case '$(CURDIR)' in *[[:space:]]*) echo 'make deb: pybuild needs a path without blanks, found $(CURDIR)' >&2; exit 1; esac
	@command -v dpkg-buildpackage >/dev/null || \
	{ echo 'make deb: expected dpkg-buildpackage, found none: apt install dpkg-dev' >&2; exit 1; }
# dpkg takes a compiler for granted. It is not needed: nothing is compiled here.
	@missing=$$(LC_ALL=C dpkg-checkbuilddeps -I 2>&1) || { echo "$$missing" | \
	sed '/: warning: /d; s/.*: /make deb: build dependencies are missing: apt install /; s/ ([^)]*)//g; s/debhelper-compat/debhelper/' >&2; \
	exit 1; }
	rm -rf $(DEB_TREE) build/deb/rspd_*
	mkdir -p $(DEB_TREE) dist
	sed 's|/$$||' .gitignore | tar -c --exclude=.git --exclude-from=- --mtime=@$$(dpkg-parsechangelog -S Timestamp) . | \
	tar -x -C $(DEB_TREE)
	cd $(DEB_TREE) && dpkg-buildpackage --ignore-builtin-builddeps -us -uc -b
	rm -f dist/rspd_*
	mv build/deb/rspd_* dist/

bench: .venv/run
	$(BIN)/python -m bench $(BENCH_OPTIONS)

bench-restarts: .venv/run
	$(BIN)/python -m bench.restarts $(BENCH_OPTIONS)

bench-routes: .venv/run
	$(BIN)/python -m bench.routes $(BENCH_OPTIONS)

bench-looking: .venv/test
	$(BIN)/python -m bench.looking $(BENCH_OPTIONS)

# All targets share one environment. Each file says that what its target needs is installed there.
.venv/run: pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || \
	{ echo 'Python 3.10 or later with its venv module is needed: apt install python3-venv' >&2; exit 1; }
	@echo 'make: making .venv with what rspd needs: less than a minute, once'
	@$(PYTHON) -m venv .venv
	@$(PIP) install -q -e .
	@touch $@

.venv/test: .venv/run
	@echo 'make: adding what the tests need to .venv: less than a minute, once'
	@$(PIP) install -q -e '.[test]'
	@touch $@

.venv/lint: .venv/test
	@echo 'make: adding ruff, mypy and complexipy to .venv: less than a minute, once'
	@$(PIP) install -q -e '.[test,lint]'
	@touch $@

clean:
	rm -rf .venv .coverage* build dist *.egg-info
