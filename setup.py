"""Drives CMake, which describes the native build (CMakeLists.txt); everything else is pyproject.toml.

No torch is needed here: the compiled part takes addresses and numbers, so one wheel serves every torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "libkd_kernels_cuda.so"  # built beside the extension where KD_KERNELS_CUDA asks for it


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # It names the ninja of an isolated build environment that no longer exists.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        (target / CUDA_LIBRARY).unlink(missing_ok=True)  # an earlier build's, should this one leave it out
        configure = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(build),
            "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # KD_KERNELS_CUDA=auto|on|off, KD_KERNELS_CUDA_ARCHS="80;90": CMakeLists.txt says what they do.
            *(f"-D{k}={v}" for k, v in os.environ.items() if k.startswith("KD_KERNELS_CUDA")),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        for command in (
            configure,
            ["cmake", "--build", str(build), "--target", "_native", "kd_kernels_cuda"],
        ):
            subprocess.run(command, check=True)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "kd_kernels" / CUDA_LIBRARY
        target = ROOT / "kd_kernels" / CUDA_LIBRARY
        target.unlink(missing_ok=True)  # an earlier build's is not this code's
        if built.exists():
            shutil.copy2(built, target)


setup(ext_modules=[Extension("kd_kernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
