"""Programs for the GPU kernels. They use the table of calls of the tests, and the library of this folder if it is not
installed."""

import os
import sys
import threading
import time
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("tests", "tests/ops", "src")]


def end_with(parent: int) -> None:
    """End this process soon after its parent, which may have been killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
