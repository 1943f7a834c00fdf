"""`make test` installs nothing outside the checkout; packages of the system are the affair of .ci/run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci" / "run"


def test_make_installs_no_package_of_the_system():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert not [word for word in ("apt-get", "sudo", "brew", "playwright install") if word in makefile]


@pytest.fixture
def ci(tmp_path):
    """Runs .ci/run where `dpkg`, `apt-get`, `sudo` and `make` are stand-ins that end with the given exit codes."""
    if not CI.exists() or shutil.which("bash") is None:
        pytest.skip("there is no .ci/run, or no bash")
    for name in ("bash", "dirname", "env", "id"):
        (tmp_path / name).symlink_to(shutil.which(name))

    def run(**codes):
        stand_ins = {
            "dpkg": f"exit {codes['dpkg']}",
            "apt-get": f'echo "apt-get $*"; exit {codes["apt"]}',
            "sudo": 'test "$1" = -n && shift && exec "$@"',
            "make": f'echo "make $*, data in ${{TORCHREG_DATA##*/}}"; exit {codes["make"]}',
        }
        for name, body in stand_ins.items():
            (tmp_path / name).write_text(f"#!{tmp_path / 'bash'}\n{body}\n")
            (tmp_path / name).chmod(0o755)
        result = subprocess.run([CI], env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
        return result.returncode, result.stdout.splitlines()

    return run


INSTALLS = ["apt-get update -q", "apt-get install -qy --no-install-recommends chromium fonts-dejavu-core"]
TESTS = "make test, data in data"


def test_ci_installs_chromium_where_it_is_missing(ci):
    assert ci(dpkg=1, apt=0, make=0) == (0, [*INSTALLS, TESTS])


def test_ci_goes_on_where_chromium_cannot_be_installed_and_says_so(ci):
    code, lines = ci(dpkg=1, apt=100, make=0)
    said = "not installed: chromium fonts-dejavu-core. Without Chromium the browser tests skip"
    assert (code, lines) == (0, [*INSTALLS, said, TESTS])


def test_ci_fails_where_a_test_fails_and_installs_nothing_that_is_there(ci):
    assert ci(dpkg=0, apt=0, make=2) == (2, [TESTS])
