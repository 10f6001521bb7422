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
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group
from torch.utils import cpp_extension

WINDOWS = sys.platform == "win32"
# The oldest torch version whose stable ABI suffices for csrc. The library runs on this version and on later versions.
TORCH_TARGET = "0x020a000000000000"
# Compared when the library is loaded: after a change of the sources, it must be built again.
SOURCES = runpy.run_path("src/mingru/ops/backends/sources.py")["number_of_sources"](Path("csrc"))
# Not -ffast-math, because it breaks NaN and disables subnormals in the whole process.
COMPILE = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
COMPILE_ON_WINDOWS = ["/std:c++17", "/O2", "/EHsc"]


class Build(build_ext):
    """Link to torch's libraries without a path, because torch is always loaded before the extension."""

    def run(self):
        (extension,) = self.extensions
        # In the sources, if the install is editable.
        library = Path(self.get_ext_fullpath(extension.name))
        sources = [*extension.sources, *extension.depends, __file__]
        if self.force or newer_group(sources, library, "newer"):
            # If the build fails, a library from an earlier build must not be used.
            library.unlink(missing_ok=True)
            super().run()

    def build_extension(self, ext):
        compile_files = self.compiler.compile

        def compile_in_parallel(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compiled = pool.map(lambda source: compile_files([source], **options), sources)
                return [path for paths in compiled for path in paths]

        self.compiler.compile = compile_in_parallel
        super().build_extension(ext)

    def get_export_symbols(self, ext):
        return []  # torch loads this library of operators; it is not a Python module

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
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("MINGRU_SOURCES", str(SOURCES))],
            extra_compile_args=COMPILE_ON_WINDOWS if WINDOWS else COMPILE,
            language="c++",
            optional=not os.environ.get("MINGRU_REQUIRE_KERNELS"),
            py_limited_api=True,
        )
    ],
)
