"""examples/stages.py: the zeros are those asked for, and a run that was broken off ends as if it had not been."""

import itertools
import re
import runpy
import sys

import pytest
import torch
from torchvision.datasets import MNIST

from tests import ROOT

EXAMPLES = ROOT / "examples"
RESULT = re.compile(r"^after (\w+)\(.*\): accuracy ([\d.]+)%, zeros ([\d.]+)%$", re.M)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs it with scikit-learn's digits, and gives what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TORCHREG_DATA", raising=False)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there: refused at once
    monkeypatch.setattr(sys, "argv", ["stages.py", "--steps", "300"])
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: None)  # the process is not the script's own

    def run():
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / "stages.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_zeros_are_those_asked_for_and_a_run_that_was_broken_off_ends_the_same(run, tmp_path, monkeypatch):
    draw, draws = torch.randint, itertools.count()

    def broken(*args):
        if next(draws) == 400:  # in the second stage of the second run
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", broken)
        with pytest.raises(KeyboardInterrupt):
            run()
    state = torch.load(tmp_path / "runs" / "stages" / "rewound.pt", weights_only=True)
    assert state["done"] == 1
    printed = run()
    assert "rewound.pt goes on after stage 1" in printed
    assert not list((tmp_path / "runs" / "stages").iterdir())

    results = [(name, float(accuracy), float(zeros)) for name, accuracy, zeros in RESULT.findall(printed)]
    assert [name for name, _, _ in results] == [
        *("Pretrain", "Sparsify", "Refit"),
        *("Sparsify", "Refit"),
        *("Pretrain", "Sparsify", "Refit", "Sparsify", "Refit"),
    ]
    assert [zeros for _, _, zeros in results] == [0, 90, 90, 90, 90, 0, 45, 45, 90, 90]
    assert all(accuracy > 80 for name, accuracy, _ in results if name == "Refit")
    assert results[1] == results[3], (
        "the first two runs part only in the refit, and the second was broken off before it"
    )
