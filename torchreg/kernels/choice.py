"""Which backend serves: the native library where it was built, and torch anywhere."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from torchreg import tables
from torchreg.kernels.native import Library, load

VARIABLE = "TORCHREG_BACKEND"


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
        return tables.render(["backend", "used", "note"], rows)


def backends() -> Backends:
    """Which backends compute the optimizers' steps and the statistics, and why the others do not.

    The environment variable `TORCHREG_BACKEND` forces one: `native` or `torch`.

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
        note = found if isinstance(found, str) else f"{VARIABLE}=torch"
    return Backends(
        (
            Backend("native", library is not None, note),
            Backend("torch", True, "any device, dtype and layout"),
        )
    )


def native() -> Library | None:
    """The native library, or None where torch serves.

    Raises:
        ValueError: `TORCHREG_BACKEND` names no backend.
        RuntimeError: it forces the native one, which is not there.
    """
    return _choose(os.environ.get(VARIABLE, ""))


@functools.cache
def _choose(forced: str) -> Library | None:
    if forced not in ("", "native", "torch"):
        raise ValueError(f'{VARIABLE}="{forced}" names no backend; set it to native or torch, or unset it')
    found = _loaded()
    if isinstance(found, Library):
        return None if forced == "torch" else found
    if forced == "native":
        raise RuntimeError(f"{VARIABLE}=native, but the native library is {found}; or unset {VARIABLE}")
    return None


@functools.cache
def _loaded() -> Library | str:
    return load()
