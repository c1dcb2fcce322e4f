# Everything a fresh machine needs: Python 3.11 or 3.12 with pip and venv, gcc, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-fast test-isa lint bench clean

setup: $(READY)

# torch comes first and pinned: any looser request would pull another build of it. DeepSpeed builds
# against the installed torch, so without build isolation.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Python 3.11 or 3.12 is needed, not {v[0]}.{v[1]}; say make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install -q $$(grep -E '^(numpy|setuptools|wheel|ninja|py-cpuinfo|packaging)==' requirements.lock)
	$(BIN)/pip install -q --no-build-isolation "$$(grep '^deepspeed==' requirements.lock)"
	$(BIN)/pip install -q -r requirements.lock
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $(READY)

# The whole line on two CPU cores, in about twelve minutes: clips, manifest, plan, training under Ray
# Train and ZeRO-3, samples, evaluation, MLflow. STORE=s3 keeps all of it in an S3 server, which is
# started for it.
ifeq ($(STORE),s3)
AROUND := $(BIN)/python -m framework.demo.local_s3 longtake runs/s3
ROOT := run.root=s3://longtake
else ifneq ($(STORE),)
$(error STORE=$(STORE): there is STORE=s3, or none for local files)
endif
demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(AROUND) $(BIN)/python -m framework.demo experiment=demo $(ROOT) $(ARGS)

# Two at a time: a test of a whole run waits a good part of its time. A file's tests stay together,
# for they share what they started.
PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) $(ARGS)

test-fast: $(READY)
	$(PYTEST) -m "not slow" $(ARGS)

# Float32 sums round in another order under each instruction set that torch has kernels for: the
# tests that compare networks hold under each one that this machine has.
ISAS = default $(shell grep -owm1 avx2 /proc/cpuinfo) \
	$(shell grep -qwm1 avx512vl /proc/cpuinfo && echo avx512)
ISA_TESTS := tests/model_zoo tests/diffusion \
	tests/export/test_export.py::test_diffusers_loads_a_wan_and_computes_the_same

test-isa: $(READY)
	set -e; for isa in $(ISAS); do \
		echo "instruction set: $$isa"; \
		ATEN_CPU_CAPABILITY=$$isa $(PYTEST) -m "not slow" $(ISA_TESTS) $(ARGS); \
	done

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	@echo "Benchmarks are modules: $(BIN)/python -m benchmarks.NAME. There are:"
	@ls benchmarks/*.py 2>/dev/null | sed 's,benchmarks/\(.*\).py,  \1,' | grep -v __init__ || true

clean:
	rm -rf $(VENV) runs
