# make demo: teach nano words that it has never read, and measure it.   make test: the tests.   Both install first.
# make test-slow: longer versions of some tests.   make test-portable: the numeric tests as on other CPUs (takes hours).
# make lint: check format and style; make test does so first.
# make gpu SECONDS=570 OUT=DIR: build, test and time on a machine with a GPU, the most telling first; a second call
#     continues where the first one stopped.
# make clean: remove everything that was installed and built.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install -q --disable-pip-version-check
# test files run in parallel, each on one thread: one more than there are cores, since some of them wait, and at most
# five. They run on the CPU even if there is a GPU; `make gpu` tests that.
WORKERS := $(shell n=$$(nproc); echo $$((n < 4 ? n + 1 : 5)))
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# the test files that compare numbers
NUMERIC := kernels kernels_attention kernels_csrc flow optim fp8 t5 clip wav2vec2 vae wan s2v animate lora offload sample train_lora train_te parallel

.PHONY: demo lint test test-slow test-portable gpu clean

demo: $(VENV)/ready
	CUDA_VISIBLE_DEVICES= $(PY) runs/demo.py

lint: $(VENV)/ready-tests
	$(VENV)/bin/ruff format --check -q .
	$(VENV)/bin/ruff check -q .

test: lint
	$(PYTEST) tests

test-slow: $(VENV)/ready-tests
	$(PYTEST) --slow tests

test-portable: $(VENV)/ready-tests
	CUDA_VISIBLE_DEVICES= $(PY) tests/helpers/portable.py $(NUMERIC:%=tests/test_%.py)

# runs with the Python whose torch has CUDA (PYTHON=...) and installs nothing. A step that fails, or whose package is
# missing, does not stop the rest: without csrc's CUDA part, Triton's kernels are used.
SECONDS ?= 570
OUT ?= out/gpu
gpu:
	$(PYTHON) -m benchmarks.gpu_session $(SECONDS) $(OUT)

# torch is installed first and alone, so that no other package chooses its build; the C++ is not built by pip, which
# hides what setup.py prints
$(VENV)/ready: requirements.txt setup.py kernels/sources.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -r requirements.txt
	@mkdir -p build
	$(PY) setup.py -q build_ext --inplace > build/csrc.log 2>&1 || { cat build/csrc.log; false; }
	@sed -n '/^nanowan:/p' build/csrc.log
	touch $@

$(VENV)/ready-tests: $(VENV)/ready pyproject.toml
	NANOWAN_CSRC=0 $(PIP) --no-build-isolation '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info *.so
