"""Which backend serves is said, can be forced, and never is a silent surprise."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchreg as tr
from tests import ROOT
from tests.backends import backend as backend
from tests.backends import needs_native
from torchreg.kernels import backend as choice
from torchreg.kernels import native

REPOSITORY = ROOT


def test_the_forced_backend_is_the_one_in_use(backend: str) -> None:
    assert tr.backends()["native"].used == (backend == "native")
    assert tr.backends()["torch"].used


def test_where_there_is_a_compiler_there_is_the_native_library() -> None:
    """A kernel that does not compile is no build error, and every other test of it would skip."""
    if os.environ.get("TORCHREG_BACKEND", "native") != "native" or os.environ.get("TORCHREG_PURE") == "1":
        pytest.skip("another backend is asked for")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no compiler here")
    assert isinstance(native.load(), native.Library), native.load()


def test_the_table_says_why_the_native_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_loaded", lambda: "not built: a C compiler was missing")
    monkeypatch.setattr(choice, "_choose", choice._choose.__wrapped__)
    monkeypatch.delenv("TORCHREG_BACKEND", raising=False)
    assert tr.backends()["native"] == tr.Backend("native", False, "not built: a C compiler was missing")
    assert "native   no    not built: a C compiler was missing" in str(tr.backends())
    monkeypatch.setenv("TORCHREG_BACKEND", "native")
    with pytest.raises(RuntimeError, match=r"=native, but the native library is not built: .*; or unset"):
        tr.backends()


@needs_native
def test_a_backend_that_is_there_but_not_asked_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "torch")
    assert tr.backends()["native"] == tr.Backend("native", False, "TORCHREG_BACKEND=torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_triton_says_so_and_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton runs on the CPU here")
    monkeypatch.delenv("TORCHREG_BACKEND", raising=False)
    assert tr.backends()["triton"] == tr.Backend("triton", False, "no CUDA device")
    monkeypatch.setenv("TORCHREG_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="=triton, but Triton cannot serve: no CUDA device; or unset"):
        tr.backends()


@pytest.mark.parametrize(
    ("setting", "note"),
    [
        ({"find_spec": lambda name: None}, "triton is not installed"),
        ({"try_out": RuntimeError("Failed to find C compiler. Specify CC\nmore")}, "no C compiler: Failed to find C "),
        ({"try_out": OSError("libcuda.so cannot found!")}, "OSError: libcuda.so cannot found!"),
    ],
    ids=["not installed", "no compiler", "no driver"],
)
def test_with_a_gpu_the_table_says_what_else_triton_lacks(
    setting: dict[str, Any], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And torch serves."""
    if "try_out" in setting:
        cuda = pytest.importorskip("torchreg.kernels.cuda")

        def broken() -> None:
            raise setting["try_out"]

        monkeypatch.setattr(cuda, "try_out", broken)
    else:
        monkeypatch.setattr(choice.importlib.util, "find_spec", setting["find_spec"])
    monkeypatch.delenv("TORCHREG_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "_tried", choice._tried.__wrapped__)
    found = tr.backends()["triton"]
    assert not found.used
    assert found.note.startswith(note)
    assert choice.triton() is None


def test_an_unknown_backend_is_an_error_at_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "cuda")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r'TORCHREG_BACKEND="cuda" names no backend; set it to native, triton or torch'
        ):
            tr.backends()


def test_a_missing_name_lists_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no backend 'cuda'; the backends are \['native', 'triton', 'torch'\]"):
        tr.backends()["cuda"]


def test_a_library_that_is_no_library_or_of_another_version_is_a_reason_and_no_crash(tmp_path: Path) -> None:
    assert "not built" in str(native.load(tmp_path / "missing.so"))
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    assert "cannot be loaded" in str(native.load(broken))
    foreign = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    if foreign.exists():
        assert "cannot be loaded" in str(native.load(foreign))


@needs_native
def test_a_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert "install torchreg again" in str(native.load())


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere torch's OpenMP may have no such function")
def test_torch_s_own_threads_run_the_kernels_and_no_second_runtime_is_loaded() -> None:
    library = native.load()
    assert isinstance(library, native.Library)
    assert library.team != 0
    needed = subprocess.run(["ldd", native.FILE], capture_output=True, text=True, check=False).stdout
    assert "omp" not in needed
    assert "torch" not in needed
    assert "python" not in needed


def build(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A copy of the sources built in place, as `pip install -e .` does."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, target / name)
    ignored = shutil.ignore_patterns("*.so", "*.dll", "__pycache__")
    shutil.copytree(REPOSITORY / "torchreg", target / "torchreg", ignore=ignored)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=target, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler has another name")
def test_without_a_compiler_the_build_succeeds_without_the_library(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    run = build(tmp_path, CC="/bin/false")
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "torchreg/kernels" / native.FILE.name).exists()


@needs_native
def test_the_kernels_compile_as_plain_c_without_a_warning(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no compiler here")
    source, library = REPOSITORY / "torchreg/kernels/native.c", tmp_path / "plain.so"
    command = [compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([*command, "-shared", "-fPIC", source, "-o", library, "-lm"], check=True)
    assert isinstance(native.load(library), native.Library)
    assert ctypes.CDLL(str(library)).torchreg_version() == native.VERSION
