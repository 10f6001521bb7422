"""The compiled CPU kernels. All else about this package stands in pyproject.toml.

Where the extension can't be built the package installs without it and says so when it is used; with
MINGRU_REQUIRE_KERNELS set, as developers and CI have it, that is an error.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

WINDOWS = sys.platform == "win32"
# The oldest torch whose stable ABI has all that csrc uses; the built library runs on it and on later ones.
TORCH_TARGET = "0x020a000000000000"
# No -ffast-math: it would break NaN, and switch subnormals off in the whole process.
COMPILE = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
COMPILE_ON_WINDOWS = ["/std:c++17", "/O2", "/EHsc"]


class Build(build_ext):
    """Links to torch's libraries without a path to them: they are loaded before this one, from wherever they are."""

    def build_extension(self, ext):
        # What an earlier build left must not pass for this one's.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().build_extension(ext)

    def get_export_symbols(self, ext):
        return []  # a library of operators, loaded by torch; no module for Python to import

    def get_ext_filename(self, name):
        return str(Path(*name.split(".")).with_suffix(".dll" if WINDOWS else ".so"))


setup(
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    ext_modules=[
        Extension(
            "mingru._kernels",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            include_dirs=cpp_extension.include_paths(),
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch", "torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            extra_compile_args=COMPILE_ON_WINDOWS if WINDOWS else COMPILE,
            language="c++",
            optional=not os.environ.get("MINGRU_REQUIRE_KERNELS"),
            py_limited_api=True,
        )
    ],
)
