# Two commands: `make demo` trains, distils and uses a tagger; `make test` runs the tests. Both set up what they need, once.
#
# By default everything goes into .venv, with torch as pinned in constraints.txt. To use an environment that exists already
# (nothing is downloaded):  make test VENV=/path/to/venv   or   make test PYTHON=/path/to/python

TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt) $(shell sed -n 's/^torchaudio==/torchaudio==/p' constraints.txt)
SOURCES := setup.py pyproject.toml csrc/build_backend.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 "$(PY)" -m pytest -n $(WORKERS) --dist loadfile

ifdef PYTHON
  PY := $(PYTHON)
  GIVEN := 1
else ifdef VENV
  PY := $(VENV)/bin/python
  GIVEN := 1
else
  PY := .venv/bin/python
endif
STAMP := build/installed-$(shell printf '%s' "$(PY)" | cksum | cut -d' ' -f1)

.PHONY: demo test test-slow sanitize sanitize-emulated gpu setup emulation lint clean help

help: ## what the targets do
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile

demo: setup ## set up, then train a teacher, distil DASS-tiny from it and tag with the result (about three minutes)
	"$(PY)" -m dass.train

test: emulation ## set up, then the test-suite without the slow tests, the emulated CUDA kernels in both thread orders
	$(PYTEST) -m "not slow" tests
	DASS_OPS_EMULATION_ORDER=reverse $(PYTEST) -q -m "not slow" -k emulated tests/ops --ignore tests/ops/test_emulation.py

test-slow: emulation ## the slow tests
	$(PYTEST) -m slow tests

sanitize-emulated: setup ## the CUDA kernels, emulated, under AddressSanitizer and UndefinedBehaviorSanitizer
	"$(PY)" csrc/emulation/sanitize.py

gpu: $(if $(GIVEN),,setup) ## on a machine with a GPU: build, tests, sanitizers, benchmarks; one JSON; ten minutes; offline with PYTHON=
	"$(PY)" benchmarks/gpu.py

SANITIZED := build/sanitized
# Two maps are left out whose gradients the oracle takes minutes for under the sanitizers; the others go the same ways.
sanitize: setup ## the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built apart, and their tests
	DASS_OPS_CUDA=0 DASS_OPS_EMULATED=0 DASS_OPS_LDFLAGS="-fsanitize=address,undefined" \
	  DASS_OPS_CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
	  "$(PY)" setup.py build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	cp -R dass_ops/*.py $(SANITIZED)/dass_ops/ && cp -R tests pyproject.toml $(SANITIZED)/
	python="$$(realpath -s "$$(command -v "$(PY)")")" && cd $(SANITIZED) && for set in avx512 avx2 scalar; do \
	  LD_PRELOAD="$$(for l in asan ubsan stdc++; do $${CXX:-c++} -print-file-name=lib$$l.so; done | tr '\n' ' ')" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 DASS_OPS_CPU=$$set OMP_NUM_THREADS=2 PYTHONPATH=. \
	  "$$python" -m pytest -q -p no:cacheprovider -n $(WORKERS) --dist worksteal -m "not slow" \
	  -k "cpu and not instruction_set and not (larger_maps and (37 or 96))" \
	  $(foreach t,selective_scan bidirectional_scan ss2d cpu cpu_rows,tests/ops/test_$(t).py) || exit 1; done

lint: ## ruff
	"$(PY)" -m ruff check . && "$(PY)" -m ruff format --check .

setup: $(STAMP)

# The CUDA kernels as host C++, which only tests need.
emulation: $(STAMP)-emulation

ifdef GIVEN
$(STAMP): $(SOURCES)
	@"$(PY)" -c "import torch, torchaudio" || { echo "$(PY) has no torch and torchaudio; install them there, or run make without VENV and PYTHON" >&2; exit 1; }
	"$(PY)" -m pip install --no-build-isolation --no-deps --no-index -e . -v 2>&1 | tee build.log | sed -n '/dass_ops: built/,/CUDA/p'; grep -q 'Successfully installed' build.log || { cat build.log >&2; exit 1; }
	@rm -f build.log; mkdir -p build; touch $@

$(STAMP)-emulation: $(STAMP)
	DASS_OPS_EMULATED=1 "$(PY)" -m pip install -q --no-build-isolation --no-deps --no-index -e .
	@touch $@
else
$(STAMP): $(SOURCES) | .venv/torch
	.venv/bin/pip install -q -c constraints.txt -e ".[dev,teachers]"
	@.venv/bin/python -m dass_ops
	@mkdir -p build; touch $@

$(STAMP)-emulation: $(STAMP)
	DASS_OPS_EMULATED=1 .venv/bin/pip install -q --no-deps -c constraints.txt -e .
	@touch $@

.venv/torch: constraints.txt
	@command -v g++ >/dev/null || command -v $${CXX:-c++} >/dev/null || { echo "A C++ compiler is needed: apt-get install g++ (or set CXX)" >&2; exit 1; }
	test -x .venv/bin/pip || python3 -m venv .venv || { echo "python3 -m venv failed: apt-get install python3-venv python3-dev" >&2; exit 1; }
	.venv/bin/pip install -q --upgrade pip
	.venv/bin/pip install $(TORCH)
	@touch $@
endif

clean: ## remove what was built; .venv and runs stay
	rm -rf build *.egg-info dass_ops/*.so
