# `make demo` and `make test` set everything up by themselves: python3 >= 3.11 and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKERS := $(VENV)/.checkers
# WebGPU's build of onnxruntime replaces the plain one, so it has an environment of its own.
# It computes on the software Vulkan driver in Debian's package chromium-common.
WEBGPU := .venv-webgpu
VULKAN_DRIVER := $(wildcard /usr/lib/chromium/vk_swiftshader_icd.json)
WEBGPU_READY := $(if $(VULKAN_DRIVER),$(WEBGPU)/.ready)
# OpenVINO beside plain onnxruntime finds processors of Intel only. On those of other makers the
# tests that need it run first, on the build that has it inside, and then all on the plain one.
OPENVINO := $(shell test "$$(uname -sm)" = "Linux x86_64" && \
  ! grep -q GenuineIntel /proc/cpuinfo && echo .openvino)
OPENVINO_READY := $(if $(OPENVINO),$(OPENVINO)/.ready)
MAKEFLAGS += --jobs=3
QUIETLY := --quiet --progress-bar off
FEW := --no-compile  # of a large environment only few modules are imported
# Tests run side by side, those of whole devices two files at a time, the longest first; but those
# that measure how fast something is run alone.
SIDE_BY_SIDE := -n logical --maxprocesses 4
BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder
DEVICES := tests/lan/test_chaos.py tests/lan tests/e2e
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint audit check clean

demo: $(READY)
	@$(BIN)/confidant demo

test: $(READY) $(WEBGPU_READY) $(OPENVINO_READY)
	@programs=$$(mktemp -d) && trap 'rm -rf "$$programs"' EXIT && \
	  export CONFIDANT_TEST_PROGRAMS="$$programs" && \
	  $(if $(OPENVINO),PYTHONPATH="$(CURDIR)/$(OPENVINO)" \
	  $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -k openvino \
	  $$(grep -rl openvino tests --include='test_*.py') && \
	  export CONFIDANT_REQUIRE_OPENVINO=0 &&) \
	  $(BIN)/python -m pytest -q $(BY_FILE) -m "not alone" $(PYTEST_OPTIONS) $(DEVICES) && \
	  $(BIN)/python -m pytest -q -m alone $(PYTEST_OPTIONS) $$(grep -rl mark.alone tests/e2e) && \
	  $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) $(PYTEST_OPTIONS) tests/unit tests/component

lint: $(CHECKERS)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy plugins/*/confidantd_*/__init__.py
	@$(BIN)/bandit -q -c pyproject.toml -r confidantd plugins

# Known weaknesses of all that is installed. What the index tells nothing of is listed, not hidden;
# a finding that does no harm here is named with its reason: --ignore-vuln ID  (none is).
audit: $(CHECKERS)
	@$(BIN)/pip-audit --progress-spinner off --skip-editable

check: lint test

$(READY): pyproject.toml plugins/openvino/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no $(PYTHON): install Python 3.11 or newer (PYTHON=... names another)" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) must be Python 3.11 or newer (PYTHON=... names another)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments (Debian: apt install python3-venv)" >&2; \
	  exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): a few minutes the first time"
	@$(BIN)/pip install $(QUIETLY) -e ".[compiler,test]"
	@$(BIN)/pip install $(QUIETLY) --no-deps -e plugins/openvino
	@touch $@

$(WEBGPU)/.ready: plugins/webgpu/pyproject.toml | $(READY)
	@test -x $(WEBGPU)/bin/pip || $(PYTHON) -m venv --clear $(WEBGPU)
	@echo "installing into $(WEBGPU): for the tests on WebGPU"
	@$(WEBGPU)/bin/pip install $(QUIETLY) $(FEW) onnxruntime-webgpu numpy || \
	  echo "make: no onnxruntime-webgpu for this machine: tests that need it are skipped" >&2
	@$(WEBGPU)/bin/pip install $(QUIETLY) $(FEW) --no-deps -e plugins/webgpu
	@touch $@

$(OPENVINO)/.ready: Makefile | $(READY)
	@echo "installing into $(OPENVINO): for the tests on OpenVINO"
	@$(BIN)/pip install $(QUIETLY) $(FEW) --no-deps --upgrade --target $(OPENVINO) \
	  "onnxruntime-openvino~=1.24.1"
	@touch $@

$(CHECKERS): $(READY)
	@$(BIN)/pip install $(QUIETLY) $(FEW) -e ".[compiler,test,dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(WEBGPU) .openvino build *.egg-info plugins/*/*.egg-info
