"""Run those tests of the GPU kernels that run on a GPU, in parallel, and go on where another run was stopped.

    python -m benchmarks.gpu.tests [--results FOLDER] [--minutes 9] [-k PATTERN]

Needs pytest and pytest-xdist.
"""

import argparse
import os
import re
import subprocess
import sys

from .device import ROOT, Results, parse

# A process that ends with this one.
PYTEST = (
    "import sys, pytest, benchmarks.gpu as gpu; gpu.end_with(int(sys.argv[1])); sys.exit(pytest.main(sys.argv[2:]))"
)
FILES = ("tests/ops/test_recurrence.py", "tests/ops/test_triton.py")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-k", default="triton", help="pattern of the tests (default: %(default)s)")
    args = parse(parser, arguments)
    results = Results(args, "tests")
    outcomes, failed = results.all.setdefault("outcomes", {}), results.all["failed"]
    pytest = [sys.executable, "-c", PYTEST, str(os.getpid()), "-p", "no:cacheprovider"]
    # The library may be found by the path of this process only.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [*pytest, "--collect-only", "-q", "-k", args.k, *FILES]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    names = results.missing("outcomes", (line for line in listed if "::" in line))
    command = [*pytest, "-v", "-n", str(min(16, os.cpu_count() or 1)), *names]
    with subprocess.Popen(command if names else ["true"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            print(line, end="", flush=True)
            if found := re.match(r"\[gw\d+\] \[ *\d+%\] (PASSED|SKIPPED|FAILED|ERROR) (.+)", line):
                outcome, name = found[1].lower(), found[2].strip()
                failed.pop(name, None)
                (outcomes if outcome in ("passed", "skipped") else failed)[name] = outcome
                results.write()
                if not results.has_time("the other tests"):
                    running.terminate()
    if running.returncode != 0 and not (failed or results.is_stopped):
        failed["pytest"] = f"it ended with {running.returncode}"
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
