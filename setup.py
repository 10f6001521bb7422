"""Build the compiled CPU kernels. The rest of the package is configured in pyproject.toml.

If the extension cannot be built, the package is installed without it and warns when it is used. If the environment
variable MINGRU_REQUIRE_KERNELS is set, as in development and CI, a failed build is an error.
"""

import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

WINDOWS = sys.platform == "win32"
# The oldest torch version whose stable ABI suffices for csrc. The library runs on this version and on later versions.
TORCH_TARGET = "0x020a000000000000"
# Compared before the library is loaded: after a change of the sources, it must be built again.
NUMBERS = runpy.run_path("src/mingru/ops/backends/sources.py")
SOURCES = NUMBERS["number_of_sources"](Path())
# Not -ffast-math, because it breaks NaN and disables subnormals in the whole process.
COMPILE = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
COMPILE_ON_WINDOWS = ["/std:c++17", "/O2", "/EHsc"]


class Build(build_ext):
    """Link to torch's libraries without a path, because torch is always loaded before the extension."""

    def run(self):
        (extension,) = self.extensions
        # In the sources, if the install is editable.
        library = Path(self.get_ext_fullpath(extension.name))
        # Not by times: a copied file is newer than the sources even if it is a part, and sources may have old times.
        if self.force or NUMBERS["number_in"](library) != SOURCES:
            self.force = True
            # If the build fails, a library from an earlier build must not be used.
            library.unlink(missing_ok=True)
            super().run()

    def build_extension(self, ext):
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        compile_files = self.compiler.compile

        def compile_in_parallel(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compiled = pool.map(lambda source: compile_files([source], **options), sources)
                return [path for paths in compiled for path in paths]

        self.compiler.compile = compile_in_parallel
        super().build_extension(ext)

    def copy_file(self, infile, outfile, **options):
        """Replace the library at once, so that a process that has loaded it keeps the old file, and no part is left."""
        copied, is_done = super().copy_file(infile, str(Path(outfile).with_suffix(".new.so")), **options)
        os.replace(copied, outfile)
        return outfile, is_done

    def get_export_symbols(self, ext):
        return []  # torch loads this library of operators; it is not a Python module

    def get_ext_filename(self, name):
        return str(Path(*name.split(".")).with_suffix(".dll" if WINDOWS else ".so"))


class Wheel(bdist_wheel):
    """Name what a wheel runs on: any Python, on the platform of its kernels if they were built."""

    def get_tag(self):
        build = self.get_finalized_command("build_ext")
        is_built = Path(build.get_ext_fullpath("mingru._kernels")).is_file()
        return "py3", "none", super().get_tag()[2] if is_built else "any"


setup(
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            "mingru._kernels",
            # Those that take longest first.
            sorted((str(path) for path in Path("csrc").glob("*.cpp")), key=lambda path: "kernels" not in path),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            include_dirs=cpp_extension.include_paths(),
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch", "torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("MINGRU_SOURCES", str(SOURCES))],
            extra_compile_args=COMPILE_ON_WINDOWS if WINDOWS else COMPILE,
            language="c++",
            optional=not os.environ.get("MINGRU_REQUIRE_KERNELS"),
        )
    ],
)
