# make demo | test | lint | peers | soak | faults | neon | vnni | clean. Needs python3 (3.11 or newer) with venv, and g++ for the compiled kernels.
#
#   VENV=DIR      where the environment lies; PEERS_VENV=DIR: that of `make peers`, which compares speeds with
#                 llama.cpp and transformers (llama.cpp is compiled: about ten minutes, once) by
#                 benchmarks/peers/compare.py PEERS_ARGS
#   TORCH=X       the build of torch to install; a plain range may bring a GPU build of several gigabytes
#   EDITABLE=     (empty) installs a wheel in place of links into this checkout

PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= .venv-peers
PEERS_ARGS ?=
SOAK_VENV ?= .venv-soak
SOAK_TESTS ?= tests/test_kernels_*.py tests/test_reads.py tests/test_hot_records.py tests/test_bounded.py tests/test_whole_token.py tests/test_drafts.py tests/test_verify.py
TORCH ?= 2.13.0
EDITABLE ?= -e
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
SOURCES := pyproject.toml $(wildcard kernels/cpu/*)
# Where an installed wheel, and not this checkout, is tested, every source is one of its inputs.
ifeq ($(strip $(EDITABLE)),)
SOURCES += $(shell find src offload prefetch kernels cli -type f -not -name '*.pyc')
endif

# Nothing may import the checkout's own `kernels` folder in place of ebbtide.kernels,
# no test may reach for a model hub, and each pytest worker has one thread.
export PYTHONSAFEPATH := 1
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test lint peers soak faults neon vnni clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/ebbtide demo

test: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS)

# What a type checker reads: each folder where it is installed, see pyproject.toml.
TYPES := build/types/ebbtide

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPES)
	mkdir -p $(TYPES)
	ln -s $(addprefix $(CURDIR)/,$(wildcard src/ebbtide/*) cli kernels offload prefetch) $(TYPES)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The scripts import each other from their own folder.
peers: $(PEERS_VENV)/.installed
	PYTHONSAFEPATH= $(PEERS_VENV)/bin/python benchmarks/peers/compare.py $(PEERS_ARGS)

# The kernels' tests with every access to memory checked. Compiling takes six to ten minutes. Needs GCC on Linux.
soak: $(SOAK_VENV)/.installed
	$(TEST_ENV) ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  $(SOAK_VENV)/bin/pytest -n $(WORKERS) --timeout 180 $(SOAK_TESTS)

# Damaged models, flipped bits of kept pages and killed processes, FAULTS times as many as `make test` has: of 40, ten thousand
# models, 480 flips and 200 kills of reading.
FAULTS ?= 40
faults: $(VENV)/.installed-test
	FAULTS=$(FAULTS) $(TEST_ENV) $(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS) -k "damaged_model or flipped_bit or kills_while or killed_at" \
	  tests/test_mutations.py tests/test_prefix_faults.py tests/test_cli_summarize.py

# The kernels' bits where no machine of ours runs the instructions: NEON, with and without dot products, cross-compiled and run
# in emulation, and AVX-VNNI, whose products are encoded as AVX-512's, give the bits of AVX2. Needs an x86 machine with AVX2, and
# Debian's g++-aarch64-linux-gnu and qemu-user (neon), or one with AVX-512 VNNI and VL (vnni).
NEON_CXX ?= aarch64-linux-gnu-g++
BITS_FLAGS := -O3 -std=c++17 -ffp-contract=off -w
BITS := build/bits
neon: $(BITS)/neon.same $(BITS)/neon_dot.same
vnni: $(BITS)/avxvnni.same

$(BITS)/%.same: $(BITS)/avx2.hashes $(BITS)/%.hashes
	diff $^
	touch $@

$(BITS)/layouts: tests/kernel_layouts.py $(VENV)/.installed
	mkdir -p $(BITS)
	$(BIN)/python $< > $@

$(BITS)/avx2.hashes $(BITS)/avxvnni.hashes: $(BITS)/%.hashes: $(BITS)/%.o tests/kernel_bits.cpp $(BITS)/layouts
	$(CXX) $(BITS_FLAGS) -DEBBTIDE_X86 -DEBBTIDE_TABLE=kernels_$* tests/kernel_bits.cpp $< -o $(BITS)/$*
	$(BITS)/$* < $(BITS)/layouts > $@

$(BITS)/neon.hashes $(BITS)/neon_dot.hashes: $(BITS)/%.hashes: $(BITS)/%.o tests/kernel_bits.cpp $(BITS)/layouts
	$(NEON_CXX) $(BITS_FLAGS) -static -DEBBTIDE_AARCH64 -DEBBTIDE_TABLE=kernels_$* tests/kernel_bits.cpp $< -o $(BITS)/$*
	qemu-aarch64 -cpu max $(BITS)/$* < $(BITS)/layouts > $@

$(BITS)/avx2.o: kernels/cpu/avx2.cpp $(SOURCES) | $(BITS)/layouts
	$(CXX) $(BITS_FLAGS) -mavx2 -mfma -mf16c -c $< -o $@

# The assembler takes the shorter of two encodings only where it is told to: without `{vex}` these are AVX-512's.
$(BITS)/avxvnni.o: kernels/cpu/avxvnni.cpp $(SOURCES) | $(BITS)/layouts
	$(CXX) $(BITS_FLAGS) -mavx2 -mfma -mf16c -mavxvnni -S $< -o $(BITS)/avxvnni.vex
	sed 's/{vex} //' $(BITS)/avxvnni.vex > $(BITS)/avxvnni.s
	$(CXX) -c $(BITS)/avxvnni.s -o $@

$(BITS)/neon.o: kernels/cpu/neon.cpp $(SOURCES) | $(BITS)/layouts
	$(NEON_CXX) $(BITS_FLAGS) -DEBBTIDE_AARCH64 -c $< -o $@

$(BITS)/neon_dot.o: kernels/cpu/neon_dot.cpp $(SOURCES) | $(BITS)/layouts
	$(NEON_CXX) $(BITS_FLAGS) -DEBBTIDE_AARCH64 -march=armv8.2-a+dotprod -c $< -o $@

clean:
	rm -rf $(VENV) $(PEERS_VENV) $(SOAK_VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check torch==$(TORCH)
	touch $@

$(PEERS_VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install -q --disable-pip-version-check torch==$(TORCH)
	$(PEERS_VENV)/bin/pip install -q --disable-pip-version-check $(EDITABLE) '.[peers]'
	touch $@

$(SOAK_VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(SOAK_VENV)
	$(SOAK_VENV)/bin/pip install -q --disable-pip-version-check torch==$(TORCH)
	$(SOAK_VENV)/bin/pip install -q --disable-pip-version-check \
	  -C cmake.define.EBBTIDE_SANITIZE=address '.[test]'
	touch $@

$(VENV)/.installed: $(SOURCES) | $(VENV)/.torch
	$(BIN)/pip install -q --disable-pip-version-check $(EDITABLE) .
	touch $@

$(VENV)/.installed-test: $(SOURCES) | $(VENV)/.torch
	$(BIN)/pip install -q --disable-pip-version-check $(EDITABLE) '.[test]'
	touch $@ $(VENV)/.installed
