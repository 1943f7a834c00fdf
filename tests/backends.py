"""Every backend that this machine has, for tests that all of them must pass."""

from __future__ import annotations

import pytest

from torchreg.kernels import backend as choice
from torchreg.kernels import native

NATIVE = isinstance(native.load(), native.Library)
AVAILABLE = ["native", "torch"] if NATIVE else ["torch"]

needs_native = pytest.mark.skipif(not NATIVE, reason="the native library is not built here")


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once under each."""
    monkeypatch.setenv(choice.VARIABLE, request.param)
    return request.param
