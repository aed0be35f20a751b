# make run    a small web server showing FOLDER, and rspd in front of it: open the address that is printed
# make test   the tests, as any user
# make lint   ruff and mypy
# make compare   CPU time beside nginx and systemd-socket-proxyd

PYTHON ?= python3
FOLDER ?= .
PORT ?= 8080
BACKEND_PORT ?= 8000

# A browser opens several connections, and may leave one silent: one at a time would keep it waiting.
RUN_OPTIONS ?= --max-connections 16

BIN = .venv/bin

.PHONY: run test lint compare clean

run: .venv/done
	@test -d "$(FOLDER)" || { echo 'make run: FOLDER=$(FOLDER) is not a folder' >&2; exit 1; }
	@$(BIN)/python -c 'import socket, sys; [socket.create_server(("127.0.0.1", int(p))) for p in sys.argv[1:]]' \
	$(PORT) $(BACKEND_PORT) 2>/dev/null || \
	{ echo 'make run: port $(PORT) or $(BACKEND_PORT) is taken, choose PORT=... BACKEND_PORT=...' >&2; exit 1; }
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory "$(FOLDER)" $(BACKEND_PORT) >/dev/null 2>&1 & \
	backend=$$!; trap 'kill $$backend 2>/dev/null' EXIT; trap : INT; \
	echo "Open http://127.0.0.1:$(PORT)/ (Ctrl-C ends it)"; \
	$(BIN)/rspd --foreground $(RUN_OPTIONS) -l 127.0.0.1:$(PORT) -b 127.0.0.1:$(BACKEND_PORT)

test: .venv/done
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n 4
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

lint: .venv/done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

compare: .venv/done
	$(BIN)/python bench/compare.py

.venv/done: pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || \
	{ echo 'Python 3.10 or later with its venv module is needed: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[test,lint]'
	@touch $@

clean:
	rm -rf .venv .coverage* build dist *.egg-info
