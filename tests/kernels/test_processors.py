"""Every processor, compiler and clone gives the same bits: `every_result.c` prints the same hashes wherever it runs."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import ROOT

DRIVER = Path(__file__).with_name("every_result.c")
CLONES = re.findall(
    r'"(\w+)"',
    re.findall(r"EVERY_PROCESSOR __attribute__.*", (ROOT / "torchreg/kernels/native.h").read_text("utf-8"))[0],
)
X86 = platform.machine() in ("x86_64", "AMD64")

on_x86 = pytest.mark.skipif(not X86, reason="for x86-64 processors")


def installed() -> list[str]:
    """The flags with which setup.py builds the library."""
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py names no FLAGS")


def clone(name: str) -> list[str]:
    """The definitions that leave this clone alone, which its own processor would otherwise be asked for."""
    half = {"avx512f": "avx2"}.get(name, name)
    return [
        f"-D{macro}=" + ("" if target == "default" else f'__attribute__((target("{target}")))')
        for macro, target in (("EVERY_PROCESSOR", name), ("EVERY_HALF", half))
    ]


def program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian's package {package})")
    return found


def built(target: Path, flags: Sequence[str], compiler: str = "cc", package: str = "gcc") -> Path:
    subprocess.run([program(compiler, package), "-w", *flags, DRIVER, "-o", target, "-lm"], check=True)
    return target


def printed(*command: str | Path) -> list[str]:
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) > 1000
    return lines


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the kernels give without optimization, each addition where it is written."""
    flags = ["-std=gnu11", "-O0", "-ffp-contract=off", *clone("default")]
    return printed(built(tmp_path_factory.mktemp("plain") / "plain", flags))


@pytest.fixture(scope="module")
def as_installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all clones, among which the processor chooses."""
    return built(tmp_path_factory.mktemp("installed") / "installed", installed())


@pytest.fixture
def assert_the_same(plain: list[str]) -> Callable[[list[str]], None]:
    def compare(found: list[str]) -> None:
        different = [a for a, b in zip(found, plain, strict=True) if a != b]
        assert not different, f"{len(different)} of {len(plain)} results differ, the first {different[0]}"

    return compare


@pytest.mark.parametrize("name", CLONES)
def test_every_clone_gives_the_same_bits(
    name: str, assert_the_same: Callable[[list[str]], None], tmp_path: Path
) -> None:
    if name != "default":
        known = Path("/proc/cpuinfo")
        if not known.exists() or name not in known.read_text().split():
            pytest.skip(f"this processor has no {name}")
    assert_the_same(printed(built(tmp_path / "clone", [*installed(), *clone(name)])))


def test_a_value_is_the_same_alone_and_beside_its_gradient(plain: list[str]) -> None:
    values = {task: [x.replace(f": {task}", "") for x in plain if f": {task} " in x] for task in ("value", "both")}
    assert values["value"] == values["both"]
    assert len(values["value"]) > 100


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["gcc -O2", "gcc -march=native", "clang -O3", "clang -march=native"])
def test_every_compiler_gives_the_same_bits(
    flags: str, assert_the_same: Callable[[list[str]], None], tmp_path: Path
) -> None:
    """With fused products too, where this processor has them, which -ffp-contract=off leaves unused."""
    compiler, flag = flags.split()
    alone = clone("default") if "-march" in flag else []  # a clone would be no more than what it names
    found = built(tmp_path / "other", [*installed(), flag, *alone], compiler, package=compiler)
    assert_the_same(printed(found))


@pytest.mark.slow
@on_x86
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell"])
def test_every_x86_processor_gives_the_same_bits(
    processor: str, as_installed: Path, assert_the_same: Callable[[list[str]], None]
) -> None:
    assert_the_same(printed(program("qemu-x86_64", "qemu-user"), "-cpu", processor, as_installed))


@pytest.mark.slow
@on_x86
@pytest.mark.parametrize("processor", ["Nehalem", "Haswell"])
def test_the_tests_of_sums_pass_on_every_x86_processor(processor: str) -> None:
    """Minutes each: torch computes what they compare with, as such a processor would."""
    tests = ["tests/kernels/test_l1l2.py", "tests/kernels/test_weight_stats.py"]
    command = [program("qemu-x86_64", "qemu-user"), "-cpu", processor, sys.executable, "-m", "pytest", "-q", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
@on_x86
def test_an_arm_processor_gives_the_same_bits(assert_the_same: Callable[[list[str]], None], tmp_path: Path) -> None:
    emulator = program("qemu-aarch64", "qemu-user")
    flags = [*installed(), "-static"]
    assert_the_same(printed(emulator, built(tmp_path / "arm", flags, "aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")))
