# Everything is done in a virtual environment of its own, .venv; nothing else on the machine is changed,
# except that root on Debian or Ubuntu without the venv module gets it installed.
# Each target does one thing; `make help` names them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
BENCH_STAMP := $(VENV)/.stamp-bench

.DEFAULT_GOAL := help
.PHONY: help setup demo run test test-models test-device torture check format bench bench-peers deb man clean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)  ## make the virtual environment, with everything in it

# The systemd extra is built from source; without a compiler and libsystemd's headers the daemon runs well
# and logs to stderr, so its absence is said and is no failure.
$(STAMP): pyproject.toml tools/setup-venv
	@PYTHON='$(PYTHON)' tools/setup-venv $(VENV)
	@touch $@

demo: $(STAMP)  ## see it work: serve, classify, swap under traffic, crash and recover
	@$(BIN)/python examples/demo.py

run: $(STAMP)  ## serve a scratch copy of models/ (in .run/) until Ctrl-C
	@mkdir -p .run
	@test -d .run/models || cp -r models .run/models
	@$(BIN)/edged --models .run/models

test: $(STAMP)  ## run all tests
	@$(BIN)/python -m pytest

test-models: .venv-models/.stamp  ## ask real applications' networks through edged, the whole applications among them
	@EDGED_TEST_APPS=1 .venv-models/bin/python -m pytest tests/apps

# 1.3 GB: the applications as their users install them.
.venv-models/.stamp: pyproject.toml
	@$(PYTHON) -m venv .venv-models
	@.venv-models/bin/python -m pip --disable-pip-version-check --no-input -q install -e '.[models]'
	@touch $@

# DEVICE_FLAGS=--may-skip makes a machine that cannot do it no failure; what is skipped is said.
test-device: $(STAMP)  ## boot a Debian with the packages in it and live a day there; as root (4 minutes)
	@$(BIN)/python -m tests.device $(DEVICE_FLAGS)

torture: $(STAMP)  ## random graphs against ONNX Runtime, 10,000 of them (5 minutes); GRAPHS=N, SEED=N
	@$(BIN)/python -m tests.torture $(if $(GRAPHS),--graphs $(GRAPHS)) $(if $(SEED),--seed $(SEED))

check: $(STAMP)  ## lint, formatting, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## put the sources into their one form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(BENCH_STAMP) .venv-peers/fastapi  ## measure (25 minutes) and write docs/benchmarks.md; QUICK=1 only sees that it runs
	@$(BIN)/python -m bench.run $(if $(QUICK),--quick)

bench-peers: $(BENCH_STAMP)  ## measure other servers beside edged, each in an environment of its own
	@$(BIN)/python -m bench.peers --setup
	@$(BIN)/python -m bench.peers $(if $(QUICK),--quick)

.venv-peers/fastapi: $(BENCH_STAMP)
	@$(BIN)/python -m bench.peers --setup fastapi

$(BENCH_STAMP): $(STAMP)
	@$(BIN)/python -m pip --disable-pip-version-check --no-input -q install -e '.[bench]'
	@touch $@

# RELEASE=trixie or noble, ARCH=arm64: built on any machine, since nothing that is packaged is run.
deb: $(STAMP)  ## build the Debian packages into dist/deb (RELEASE=bookworm, ARCH=this machine's)
	@$(BIN)/python packaging/deb/build.py $(if $(RELEASE),--release $(RELEASE)) $(if $(ARCH),--arch $(ARCH))

man: $(STAMP)  ## write the man pages into build/man
	@$(BIN)/python -m edged.cli.man build/man

clean:  ## remove what the other targets made
	rm -rf $(VENV) .venv-models .venv-peers .run .mypy_cache .pytest_cache .ruff_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
