# Two commands: `make demo` runs the main job, `make test` everything that must hold. Both set up .venv first.
# `make test` installs nothing outside the checkout: what a test lacks, it names and skips.
PYTHON ?= python3
PY := .venv/bin/python

PYTHONS ?= python3.10 python3.11 python3.12 python3.13
SHORT := tests/test_public_api.py tests/test_architecture.py tests/binding/test_copies.py tests/kernels/test_backend.py \
	tests/optim/test_proximal.py tests/optim/test_attachment.py tests/optim/test_compile.py torchreg

.PHONY: demo test test-slow test-versions bench lint

demo: .venv/.examples
	$(PY) examples/mnist_mlp.py

# A file's tests run in one process, so that what they share is made once: a training, a server. Two processes with
# two threads each would wait for one another. -rs lists what was skipped, and why.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q -rs

# Other processors and compilers are tried where Debian's qemu-user, clang and gcc-aarch64-linux-gnu are installed.
test-slow: .venv/.test
	$(PY) -m pytest -q -m slow

# The whole suite on the first Python with the oldest version of everything that pyproject.toml allows, and on the last
# one with the newest; on those between, with the newest, what leans most on Python and torch. Others: PYTHONS="...".
test-versions:
	@mkdir -p .venv-versions
	@grep -Eo '[a-z-]+>=[0-9.]+' pyproject.toml | sed 's/>=/==/' | sort -u > .venv-versions/oldest.txt
	@set -e; for python in $(PYTHONS); do \
		version=`$$python -c 'import platform; print(platform.python_version())' 2> /dev/null` \
			|| { echo "skipped: $$python is not installed"; continue; }; \
		packages='--upgrade --upgrade-strategy=eager'; tests='$(SHORT)'; \
		if test $$python = $(firstword $(PYTHONS)); then packages='--constraint .venv-versions/oldest.txt'; tests=; fi; \
		if test $$python = $(lastword $(PYTHONS)); then tests=; fi; \
		here=.venv-versions/$$version; test -x $$here/bin/python || $$python -m venv $$here; \
		$$here/bin/python -m pip install --quiet $$packages --editable '.[test]'; \
		echo "Python $$version, torch `$$here/bin/python -c 'import torch; print(torch.__version__)'`"; \
		OMP_NUM_THREADS=1 $$here/bin/python -m pytest -q $$tests; \
	done

# The short forms; benchmarks/RESULTS.md has the long ones.
bench: .venv/.bench
	$(PY) benchmarks/one_lambda.py --short
	$(PY) benchmarks/minibatch.py --short
	$(PY) benchmarks/step.py --short
	$(PY) benchmarks/penalty.py --short
	$(PY) benchmarks/stats.py --short
	$(PY) benchmarks/iteration.py --short
	$(PY) benchmarks/scaling.py --short
	$(PY) benchmarks/monitor.py --short
	$(PY) benchmarks/target_sparsity.py --short

lint: .venv/.test
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

# An environment a set of extras, with the native kernels built; the marker is younger than all of these once they are.
.venv/.%: pyproject.toml setup.py $(wildcard torchreg/kernels/*.[ch])
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable '.[$*]'
	touch $@
