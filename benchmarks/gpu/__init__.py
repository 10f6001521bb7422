"""Programs for the GPU kernels. They use the table of calls of the tests, and the library of this folder if it is not
installed."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("tests", "tests/ops", "src")]
