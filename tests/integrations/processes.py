"""Another process, in which nothing is patched."""

import inspect
import subprocess
import sys
from pathlib import Path


def call(function, *arguments):
    """Call a function of a file of tests in another process."""
    path = Path(inspect.getfile(function))
    code = f"import {path.stem}; {path.stem}.{function.__name__}(*{arguments})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=path.parent, check=True, timeout=600)
