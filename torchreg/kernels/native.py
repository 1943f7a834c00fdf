"""The native library: plain C, built where there is a compiler, loaded by ctypes, run by torch's own threads."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VERSION = 5
"""That of the tables which the functions take; `native.c` has the same."""

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The numbers by which `native.h` names a dtype."""

FILE = Path(__file__).with_name("_native.dll" if sys.platform == "win32" else "_native.so")


@dataclass(frozen=True, eq=False)
class Library:
    """The functions of the native library.

    Attributes:
        statistics: counts and sums of many weights in one pass.
        adam, sgd: one step of many weights with the prox in the same pass.
        soft: value or gradient of λ₁Σ|w| + λ₂Σw², or both, of many weights in one pass.
        team: the address of the function that runs a task in torch's threads; 0 where there is none.
    """

    statistics: Any
    adam: Any
    sgd: Any
    soft: Any
    team: int

    @property
    def threads(self) -> int:
        """The number of threads that the functions run in."""
        return torch.get_num_threads() if self.team else 1


def load(file: Path = FILE) -> Library | str:
    """The library, or why it is not there."""
    if not file.exists():
        return "not built: a C compiler was missing at install; get one (gcc or clang) and install torchreg again"
    try:
        library = ctypes.CDLL(os.fspath(file))
        library.torchreg_version.restype = ctypes.c_int64
        version = library.torchreg_version()
        if version != VERSION:
            return f"{file.name} is of version {version} and not {VERSION}; install torchreg again, which builds it"
        table, size, function = ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
        statistics = library.torchreg_statistics
        statistics.argtypes = [table, size, ctypes.c_double, function, size]
        adam, sgd = library.torchreg_adam, library.torchreg_sgd
        for step in (adam, sgd):
            step.restype, step.argtypes = None, [table, table, size, table, function, size]
        soft = library.torchreg_soft
        soft.argtypes = [table, size, size, table, table, function, size]
    except (OSError, AttributeError) as error:
        return f"{file.name} cannot be loaded ({error}); install torchreg again, which builds it"
    return Library(statistics, adam, sgd, soft, _team())


def _team() -> int:
    """`GOMP_parallel` of the OpenMP runtime that torch has loaded: a second one would fight it for the processors."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    file = Path(torch.__file__).with_name("lib") / f"libtorch_cpu.{suffix}"
    try:
        # It is loaded already, or this fails; a symbol is looked up in it and in the libraries that it needs.
        loaded = ctypes.CDLL(os.fspath(file), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
