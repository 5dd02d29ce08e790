# Each target prepares what it needs: .venv for the tools and the engine, .cache/protoc for the proto generator.
# Both are made again when the files that describe them change. PYTHON names the interpreter to make them with, JOBS how
# many processes run the tests.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3
JOBS ?= auto
BIN := .venv/bin
VENV := .venv/prepared
PROTOC := .cache/protoc/prepared
PROTO_FILES := $(wildcard proto/octavo_proto/v1/*.proto)

.PHONY: help demo test test-slow test-kernels check check-kernels fix proto proto-fresh setup clean

help:
	@echo "make demo    start the server on the bundled model, stream a completion, serve 32 requests at once, stop"
	@echo "make test    all tests but the slow ones; those that need a GPU are skipped where there is none"
	@echo "make check   lint, format, types, import rules, wire contract, generated code"
	@echo "make fix     what lint and format can repair by themselves"
	@echo "make proto   generate the code of proto/ anew"
	@echo "make setup   prepare .venv only; the other targets do it when it is missing or out of date"
	@echo "make test-kernels    the kernels only, against their specification: in Triton's interpreter, or on the GPU"
	@echo "make check-kernels   compiles every kernel for three generations of GPUs, without one: registers, spills, loads"
	@echo "make test-slow, make clean"

demo: $(VENV)
	@$(BIN)/python bench/demo.py

test: $(VENV)
	@$(BIN)/python -m pytest -ra -m "not slow" --hypothesis-profile=ci -n $(JOBS) --dist loadfile

test-slow: $(VENV)
	@$(BIN)/python -m pytest -ra -m slow --hypothesis-profile=ci

test-kernels: $(VENV)
	@$(BIN)/python -m pytest -q tests/kernels --hypothesis-profile=ci

check-kernels: $(VENV)
	@$(BIN)/python -m octavo_kernels.compile_check

check: $(VENV) proto-fresh
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "make check: the files above are not formatted; run: make fix"; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@output=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$output"; exit 1; }
	@cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	@echo "make check: all clean"

fix: $(VENV)
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format --quiet .
	@cd proto && ../$(BIN)/buf format --write

# $(call generate,DIRECTORY) writes the generated code of all .proto files below DIRECTORY.
generate = .cache/protoc/bin/python -m grpc_tools.protoc -I proto \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTO_FILES)

proto: $(PROTOC)
	@$(call generate,proto)

proto-fresh: $(PROTOC)
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(call generate,"$$fresh"); \
	cp $(PROTO_FILES) proto/octavo_proto/v1/__init__.py "$$fresh/octavo_proto/v1/"; \
	diff -r -q -x __pycache__ "$$fresh/octavo_proto/v1" proto/octavo_proto/v1 \
		|| { echo "make check: the generated code is not that of the .proto files; run: make proto"; exit 1; }

setup: $(VENV)

$(VENV): pyproject.toml constraints.txt
	@echo "Preparing .venv (a few minutes the first time) ..."
	@$(call prepare,.venv,\
		pip install -c constraints.txt pip hatchling && \
		pip install -c constraints.txt torch==2.13.0 && \
		pip install -c constraints.txt --no-build-isolation -e . --group dev)

$(PROTOC): proto/requirements.txt
	@echo "Preparing .cache/protoc ..."
	@$(call prepare,.cache/protoc,pip install -r proto/requirements.txt)

# $(call prepare,VENV,COMMANDS) makes a virtual environment unless a sound one is there, then runs COMMANDS in it.
# Their output goes to .cache/setup.log; its end is shown when they fail.
define prepare
	command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here: install Python 3.11 or newer, or say PYTHON=..."; exit 1; }; \
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); octavo needs 3.11 or newer: say PYTHON=..."; exit 1; }; \
	mkdir -p .cache; \
	{ { $(1)/bin/python -m pip --version || $(PYTHON) -m venv --clear $(1); } && \
	  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PATH="$(CURDIR)/$(1)/bin:$$PATH" && \
	  $(2); \
	} >.cache/setup.log 2>&1 </dev/null \
		|| { tail -n 15 .cache/setup.log; echo "Preparing $(1) failed; all of it is in .cache/setup.log"; exit 1; }; \
	touch $(1)/prepared
endef

clean:
	@rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
