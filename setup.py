"""Builds the native back-end with CMake and ninja; everything else is in pyproject.toml.

VQGNN_NATIVE  unset: build it where there is a C++ compiler, else install pure Python (slow; `vqgnn_kernels.backends()`
              says why); 1: stop when there is no compiler; 0: pure Python, whatever is there.
CMAKE_ARGS    further arguments of CMake, e.g. "-DVQGNN_WERROR=ON".

A compiler that is there but fails always stops the installation.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")  # the kernels use GCC's vector extensions
CMAKE_ARGS = shlex.split(os.environ.get("CMAKE_ARGS", ""))


def why_not_native() -> str | None:
    """The reason to install without the native back-end, or None to build it."""
    wish = os.environ.get("VQGNN_NATIVE", "")
    if wish not in ("", "0", "1"):
        raise PlatformError(f"VQGNN_NATIVE={wish!r} is not understood; set it to 0 or 1, or unset it")
    if wish == "0":
        return "it was installed with VQGNN_NATIVE=0"
    # A compiler that the user names is CMake's to judge: a typing error there must not end in a slow installation.
    named = os.environ.get("CXX") or any("CMAKE_CXX_COMPILER" in argument for argument in CMAKE_ARGS)
    if named or any(map(shutil.which, COMPILERS)):
        return None
    reason = f"no C++ compiler was found at installation (looked on PATH for {', '.join(COMPILERS)})"
    if wish == "1":
        raise PlatformError(f"VQGNN_NATIVE=1, but {reason}; install one, e.g. g++, or set CXX to its path")
    return reason


def program(name: str) -> str:
    """Path of cmake or ninja: beside this interpreter (an environment need not be activated), else on PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise PlatformError(f"{name} was not found beside {sys.executable} nor on PATH; run `pip install {name}`")
    return path


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake = program("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(self.cmake_dir()), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *CMAKE_ARGS,
        ]  # fmt: skip
        for command in (configure, [cmake, "--build", str(self.cmake_dir())]):
            if subprocess.run(command).returncode != 0:
                raise CompileError(
                    f"the native back-end could not be built: `{shlex.join(command)}` failed, its messages are above. "
                    "VQGNN_NATIVE=0 installs without it (slow)."
                )

    @staticmethod
    def cmake_dir() -> Path:
        """One folder a configuration, outside build_temp (which editable installations throw away): rebuilds are
        incremental, and no option of an earlier build is inherited through CMake's cache."""
        compiler = [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
        key = repr([sys.executable, CMAKE_ARGS, compiler]).encode()
        return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{hashlib.sha256(key).hexdigest()[:8]}"


class BuildPy(build_py):
    def run(self):
        """In a pure-Python installation, `vqgnn_kernels._C` is a module whose import fails with the reason."""
        super().run()
        package = ROOT / "vqgnn_kernels" if self.editable_mode else Path(self.build_lib) / "vqgnn_kernels"
        stub = package / "_C.py"
        if PURE is None:
            stub.unlink(missing_ok=True)
        else:
            stub.write_text(f"raise ImportError({PURE!r})\n")
            print(f"\nWARNING: vqgnn is installed without its native back-end: {PURE}.\n", file=sys.stderr)


PURE = why_not_native()
setup(
    ext_modules=[Extension("vqgnn_kernels._C", [])] if PURE is None else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
