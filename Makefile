# make demo: teach nano a word it never saw, and measure it.   make test: the whole suite.   Both set everything up first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install -q --disable-pip-version-check

.PHONY: demo test clean

demo: $(VENV)/ready
	$(PY) runs/demo.py

test: $(VENV)/ready-tests
	$(PY) -m pytest -q tests

# torch first and by itself, so that nothing else chooses its build
$(VENV)/ready: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/ready-tests: $(VENV)/ready requirements-tests.txt
	$(PIP) -r requirements-tests.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
