"""Builds the native kernels where there is a C compiler; without one the library installs all the same.

With TORCHREG_PURE=1 it builds none, for the wheel that serves every platform.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-O3",
    "-std=gnu11",
    "-g0",
    "-fvisibility=hidden",
    "-fopenmp-simd",  # pragmas only: no OpenMP runtime comes along
    "-fno-math-errno",
    "-fno-trapping-math",
    # A product and a sum contracted on one processor and not on another would give other weights there.
    "-ffp-contract=off",
]


class PlainLibrary(build_ext):
    """A shared library with a C interface and nothing of Python in it: one file serves every version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Any) -> Any:
        return ext.export_symbols  # no PyInit


class PlatformWheel(bdist_wheel):
    """Tagged for its platform, and not for the Python that built it."""

    def get_tag(self) -> tuple[str, str, str]:
        tag: tuple[str, str, str] = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


native = Extension(
    "torchreg.kernels._native",
    ["torchreg/kernels/native.c"],
    depends=[f"torchreg/kernels/{name}.h" for name in ("native", "soft", "statistics", "step")],
    libraries=[] if sys.platform == "win32" else ["m"],
    extra_compile_args=["/O2", "/std:c11"] if sys.platform == "win32" else FLAGS,
    optional=True,
)

setup(
    ext_modules=[] if os.environ.get("TORCHREG_PURE") == "1" else [native],
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": PlatformWheel},
)
