# Two commands: `make demo` runs the main job, `make test` everything that must hold. Both set up .venv first.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-slow bench lint

demo: .venv/.examples
	$(PY) examples/mnist_mlp.py

test: lint
	$(PY) -m pytest -n 2 -q

test-slow: .venv/.test
	$(PY) -m pytest -q -m slow

# The short forms; benchmarks/RESULTS.md has the long ones.
bench: .venv/.bench
	$(PY) benchmarks/one_lambda.py --short
	$(PY) benchmarks/minibatch.py --short

lint: .venv/.test
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

# An environment a set of extras; the marker is younger than pyproject.toml once they are installed.
.venv/.%: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable '.[$*]'
	touch $@
