"""What every doctest may use without importing it: torch, nn and the public names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchreg

torch.set_num_threads(1)  # on models this small, threads waiting for each other take most of the time


@pytest.fixture(autouse=True)
def _examples_leave_nothing_behind(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _public_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update({name: getattr(torchreg, name) for name in dir(torchreg) if name[0].isupper()})
    doctest_namespace.update(torch=torch, nn=nn, tr=torchreg)
