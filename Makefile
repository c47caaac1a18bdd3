# One command for each job, from a bare clone with Python, a C++ compiler, make and git:
#
#   make demo    train the demo model, print the table, write demo.png
#   make test    native tests (ctest), then pytest; more for pytest: make test PYTEST_ARGS="-k rng"
#   make test-cudasim   the tests of tests/cudasim: a CUDA torch on a simulated CUDA, without a GPU
#   make test-gpu       on a machine with a GPU: tests/cuda, and tests/cudasim on the real devices
#   make test-integrations   Transformers, PEFT, Accelerate, Lightning, timm on this library
#   make conformance    every case of tests/conformance on torch and on ours, and docs/conformance.md
#   make soak    the tests that repeat things, for long: 100,000 segments, 3,000 random programs
#   make sanitize       the native tests with AddressSanitizer and UndefinedBehaviorSanitizer
#   make lint    ruff, mypy, clang-format          make format   let ruff and clang-format write
#   make stubtest       the stubs of the package against what is there at run time
#   make sdist   dist/*.tar.gz, and a check that a build needs nothing else
#   make wheels  from the sdist a wheel for each torch of packaging/versions.toml, checked, installed
#                and tested there; one of them: make wheels WHEEL_TORCH=2.13.0
#   make docs    the site of docs/ in build/docs; a warning is an error
#   make bench   print all benchmarks, minutes each, and draw bench-*.png; one of them:
#                make bench BENCH=scaling BENCH_ARGS="--csv scaling.csv"
#   make build   the environment and an editable install, which the others start from
#   make clean   forget builds and caches          make distclean   the environment as well
#
# Everything goes into $(VENV), for test-cudasim into $(VENV_CUDA), for test-integrations into
# $(VENV_INTEGRATIONS), for wheels into build/wheels; what is up to date is not done again.

TORCH  ?= 2.13.0
VENV   ?= .venv
PYTHON ?= python3
BENCH  ?= all
BENCH_ARGS ?=
PYTEST_ARGS ?=
# Every torch of packaging/versions.toml if empty; WHEEL_ARGS=--fresh keeps nothing of another run.
WHEEL_TORCH ?=
WHEEL_ARGS  ?=

# The torch whose CUDA tests/cudasim stands in for: a CUDA build, for CUDA 13.
TORCH_CUDA ?= 2.14.1
VENV_CUDA  ?= .venv-cuda
# What the libraries of requirements/integrations.txt train with: timm needs a torchvision.
TORCH_INTEGRATIONS ?= $(TORCH_CUDA)
VISION             ?= 0.29.1
VENV_INTEGRATIONS  ?= .venv-integrations
# OFF leaves the programs of tests/native out of the build.
NATIVE_TESTS ?= ON

# A folder per torch, so that going back to one does not compile everything again.
BUILD  ?= build/torch-$(TORCH)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMPS := $(VENV)/stamps
TORCH_STAMP := $(STAMPS)/torch-$(TORCH)
BUILD_STAMP := $(STAMPS)/build-native-$(NATIVE_TESTS)

# What makes an editable install stale. Folders are in the list because adding or removing a file
# changes nothing else; Python files are not, because they are read where they lie.
BUILD_INPUTS := CMakeLists.txt pyproject.toml \
  $(shell find cmake csrc tests/native -type d -o -type f -not -name '*.swp' 2>/dev/null) \
  $(wildcard tests/devices/*.h tests/devices/*.cpp) tests/devices/CMakeLists.txt
CUDASIM_INPUTS := $(wildcard tests/cudasim/*.cpp tests/cudasim/*.c tests/cudasim/include/*/*.h) \
  tests/cudasim/CMakeLists.txt tests/cudasim/find_headers.py
FORMATTED = $(shell find csrc tests/native tests/devices tests/cudasim -type f \
  \( -name '*.h' -o -name '*.cpp' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh' \))

# REPRISE_RECORD=build/ci, as in .ci/run: each run of tests writes down there what it ran, for the
# support matrix. $(call recorded,STEP) are the arguments of pytest.
recorded = $(if $(REPRISE_RECORD),-p ci_record --record $(REPRISE_RECORD)/$(1).json)
ifneq ($(REPRISE_RECORD),)
  export PYTHONPATH := $(CURDIR)/packaging$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

.DELETE_ON_ERROR:
.PHONY: build demo test test-native test-python test-cudasim run-cudasim test-gpu run-gpu \
  test-integrations \
  run-integrations conformance soak \
  sanitize lint stubtest docs format bench sdist wheels clean distclean

build: $(BUILD_STAMP)

$(STAMPS)/tools: requirements/dev.txt
	@echo "== environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements/dev.txt
	@mkdir -p $(STAMPS) && touch $@

$(TORCH_STAMP): $(STAMPS)/tools
	@echo "== torch $(TORCH)"
	@$(PIP) install torch==$(TORCH)
	@rm -f $(STAMPS)/torch-* && touch $@

# --no-deps: torch is there, and nothing may change its version.
$(BUILD_STAMP): $(TORCH_STAMP) $(BUILD_INPUTS)
	@echo "== building the extension (minutes the first time, then only what changed)"
	@$(PIP) install --no-build-isolation --no-deps --editable . \
	  --config-settings=build-dir=$(BUILD) \
	  --config-settings=cmake.define.REPRISE_DEV=ON \
	  --config-settings=install.strip=false \
	  --config-settings=cmake.define.REPRISE_NATIVE_TESTS=$(NATIVE_TESTS) \
	  --config-settings=cmake.define.REPRISE_TEST_DEVICE=ON
	@rm -f $(STAMPS)/build-* && touch $@

demo: build
	$(BIN)/python -m torch_reprise demo

bench: build
	$(BIN)/python -m torch_reprise bench $(BENCH) $(BENCH_ARGS)

test: test-native test-python

test-native: build
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --no-tests=error \
	  $(if $(REPRISE_RECORD),--output-junit $(abspath $(REPRISE_RECORD))/native.xml)
	$(if $(REPRISE_RECORD),$(BIN)/python packaging/ci_record.py $(REPRISE_RECORD)/native.xml)

# After the native tests also under make -j: two sets of threads on the same cores help nobody.
test-python: build | test-native
	REPRISE_TEST_DEVICE=$(BUILD)/tests/devices/libreprise_test_device.so \
	  $(BIN)/python -m pytest $(call recorded,test) $(PYTEST_ARGS)

# What a run on CUDA devices saved (run-cudasim) fills the rows that need some.
conformance: build
	REPRISE_TEST_DEVICE=$(BUILD)/tests/devices/libreprise_test_device.so \
	  $(BIN)/python tests/conformance/run.py --write docs/conformance.md \
	  $(addprefix --merge ,$(wildcard build/conformance-cuda.json))

soak: build
	REPRISE_SOAK=100000 REPRISE_PROGRAMS=3000 \
	  $(BIN)/python -m pytest tests/test_soak.py tests/test_differential.py tests/test_rng_programs.py \
	  tests/test_ambient_programs.py tests/test_faults.py $(PYTEST_ARGS)

# Leaks are not looked for: torch keeps what it has for ever.
sanitize: build
	@$(BIN)/cmake -S . -B build/sanitize -G Ninja --log-level=WARNING \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DREPRISE_SANITIZE=address,undefined \
	  -DREPRISE_NATIVE_TESTS=ON -DREPRISE_TEST_DEVICE=OFF
	@$(BIN)/cmake --build build/sanitize --target \
	  $(notdir $(basename $(wildcard tests/native/*_test.cpp)))
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/ctest --test-dir build/sanitize --output-on-failure \
	  --no-tests=error

# The rules above once more, for another torch in another environment.
test-cudasim:
	@$(MAKE) --no-print-directory run-cudasim VENV=$(VENV_CUDA) TORCH=$(TORCH_CUDA) NATIVE_TESTS=OFF

run-cudasim: build $(STAMPS)/cudasim
	REPRISE_TEST_DEVICE=$(BUILD)/tests/devices/libreprise_test_device.so \
	  $(BIN)/python tests/cudasim/launch.py -m pytest tests/cudasim $(call recorded,cudasim) \
	  $(PYTEST_ARGS)
	REPRISE_TEST_DEVICE=$(BUILD)/tests/devices/libreprise_test_device.so \
	  $(BIN)/python tests/cudasim/launch.py tests/conformance/run.py --only-cuda \
	  --save build/conformance-cuda.json

# Without a GPU these fail.
test-gpu:
	@$(MAKE) --no-print-directory run-gpu VENV=$(VENV_CUDA) TORCH=$(TORCH_CUDA) NATIVE_TESTS=OFF

run-gpu: build
	REPRISE_FAIL_WITHOUT_CUDA=1 \
	  REPRISE_TEST_DEVICE=$(BUILD)/tests/devices/libreprise_test_device.so \
	  $(BIN)/python -m pytest tests/cuda tests/cudasim $(PYTEST_ARGS)

# An environment and a build of its own: its torch is found in another place.
test-integrations:
	@$(MAKE) --no-print-directory run-integrations VENV=$(VENV_INTEGRATIONS) \
	  TORCH=$(TORCH_INTEGRATIONS) BUILD=build/integrations NATIVE_TESTS=OFF

run-integrations: build $(STAMPS)/integrations
	REPRISE_REQUIRE_INTEGRATIONS=1 $(BIN)/python -m pytest tests/integrations \
	  $(call recorded,integrations) $(PYTEST_ARGS)

$(STAMPS)/integrations: $(TORCH_STAMP) requirements/integrations.txt
	@echo "== libraries that train"
	@$(PIP) install torch==$(TORCH) torchvision==$(VISION) -r requirements/integrations.txt
	@touch $@

# The CUDA headers are those of the packages that come with torch. --fresh: CMake would remember
# where they were.
$(STAMPS)/cudasim: $(TORCH_STAMP) $(CUDASIM_INPUTS)
	@echo "== building the simulated CUDA"
	@$(BIN)/cmake --fresh -S tests/cudasim -B build/cudasim --log-level=WARNING \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python
	@$(BIN)/cmake --build build/cudasim -- --quiet
	@touch $@

# mypy reads torch's own annotations, so torch has to be there; the extension has not.
lint: $(TORCH_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

# The stubs against the extension and every module, which it imports for that.
stubtest: build
	$(BIN)/stubtest torch_reprise --mypy-config-file pyproject.toml \
	  --allowlist packaging/stubtest_allowlist.txt

# torch is not needed for it.
docs: $(STAMPS)/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/docs-cache docs build/docs

$(STAMPS)/docs: requirements/docs.txt $(STAMPS)/tools
	@$(PIP) install -r requirements/docs.txt
	@touch $@

format: $(STAMPS)/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

sdist: $(TORCH_STAMP)
	$(BIN)/python packaging/check_sdist.py

wheels: $(STAMPS)/tools
	$(BIN)/python packaging/build_wheels.py $(addprefix --torch ,$(WHEEL_TORCH)) $(WHEEL_ARGS) \
	  $(addprefix --record ,$(REPRISE_RECORD))

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(STAMPS)/build-* $(VENV_CUDA)/stamps/build-* $(VENV_CUDA)/stamps/cudasim \
	  $(VENV_INTEGRATIONS)/stamps/build-*
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV_CUDA) $(VENV_INTEGRATIONS)
