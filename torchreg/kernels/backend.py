"""The choice of a backend: the native library on a CPU, Triton's kernels on a GPU, and torch anywhere."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from torchreg._tables import render_table
from torchreg.kernels.native import Library, load

VARIABLE = "TORCHREG_BACKEND"

logger = logging.getLogger("torchreg")


@dataclass(frozen=True)
class Backend:
    """One way to compute what this library needs in every training step.

    Attributes:
        name: what `TORCHREG_BACKEND` calls it.
        used: it serves where it can; the first in the table comes first.
        note: what it serves, or why it is not used.
    """

    name: str
    used: bool
    note: str


@dataclass(frozen=True)
class Backends:
    """The backends, by name; `print` shows a table."""

    backends: tuple[Backend, ...]

    def __getitem__(self, name: str) -> Backend:
        """The backend of that name."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise KeyError(f"no backend {name!r}; the backends are {[backend.name for backend in self.backends]}")

    def __str__(self) -> str:
        rows = [[backend.name, "yes" if backend.used else "no", backend.note] for backend in self.backends]
        return render_table(["backend", "used", "note"], rows)


def backends() -> Backends:
    """The backends that compute the optimizers' steps and the statistics, and why the others do not.

    The environment variable `TORCHREG_BACKEND` forces one: `native`, `triton` or `torch`.

    Raises:
        ValueError: the variable names no backend.
        RuntimeError: it forces one that this machine lacks.

    >>> backends()["torch"]
    Backend(name='torch', used=True, note='any device, dtype and layout')
    """
    library, found = native(), _loaded()
    if library is not None:
        threads = "torch's threads" if library.team else "one thread: torch's OpenMP runtime is not of a known kind"
        note = f"CPU, one pass, steps in bfloat16 too, {threads}"
    else:
        note = found if isinstance(found, str) else f"{VARIABLE}={os.environ[VARIABLE]}"
    kernels, tried = triton(), _compiled()
    if isinstance(tried, str):
        why = tried
    else:
        where = "CPU, interpreted" if tried.INTERPRETED else torch.cuda.get_device_name()
        why = f"{where}, one pass" if kernels is not None else f"{VARIABLE}={os.environ[VARIABLE]}"
    return Backends(
        (
            Backend("native", library is not None, note),
            Backend("triton", kernels is not None, why),
            Backend("torch", True, "any device, dtype and layout"),
        )
    )


def native() -> Library | None:
    """The native library, or None where it does not serve.

    Raises:
        ValueError: `TORCHREG_BACKEND` names no backend.
        RuntimeError: it forces the native one, which is not there.
    """
    return _choose(os.environ.get(VARIABLE, ""))


def triton() -> ModuleType | None:
    """`torchreg.kernels.cuda`, or None where it does not serve; to import it takes Triton, so it comes from here.

    Raises:
        ValueError: `TORCHREG_BACKEND` names no backend.
        RuntimeError: it forces Triton, which is not there.
    """
    forced = _named(os.environ.get(VARIABLE, ""))
    if forced not in ("", "triton"):
        return None
    found = _compiled()
    if not isinstance(found, str):
        return found
    if forced:
        raise RuntimeError(f"{VARIABLE}=triton, but Triton cannot serve: {found}; or unset {VARIABLE}")
    return None


def give_up_triton(error: Exception) -> None:
    """From now on torch serves in Triton's stead: a kernel did not compile. Logged once, and told by `backends()`.

    Raises:
        RuntimeError: `TORCHREG_BACKEND` forces Triton.
    """
    global _broken
    _broken = _told(error)
    triton()
    logger.warning("Triton's kernels cannot be used, and torch serves in their stead: %s", _broken)


_broken = ""
"""Why Triton was given up, after its first launch."""


def _named(forced: str) -> str:
    if forced not in ("", "native", "triton", "torch"):
        raise ValueError(f'{VARIABLE}="{forced}" names no backend; set it to native, triton or torch, or unset it')
    return forced


@functools.cache
def _choose(forced: str) -> Library | None:
    _named(forced)
    found = _loaded()
    if isinstance(found, Library):
        return found if forced in ("", "native") else None
    if forced == "native":
        raise RuntimeError(f"{VARIABLE}=native, but the native library is {found}; or unset {VARIABLE}")
    return None


@functools.cache
def _loaded() -> Library | str:
    return load()


def _compiled() -> ModuleType | str:
    return _broken or _tried()


@functools.cache
def _tried() -> ModuleType | str:
    """The kernels, once the first of them has run; or why there are none."""
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from torchreg.kernels import cuda

        cuda.try_out()
    # Whatever a compiler, a driver and their loaders may raise: torch serves.
    except Exception as error:
        return _told(error)
    return cuda


def _told(error: Exception) -> str:
    """The first line of an error that may hold a compiler's whole output."""
    text = str(error).strip().partition("\n")[0]
    if "C compiler" in text:
        return f"no C compiler: {text}"
    return f"{type(error).__name__}: {text}"
