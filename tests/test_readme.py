"""The README's Python runs as it stands."""

import csv
import io
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import torchreg as tr

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
FIRST, MONITOR, LOGGERS, THREE_WAYS, RULES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_lines_train_to_exact_zeros(capsys):
    names = {"batches": [(torch.rand(8, 784), torch.randint(0, 10, (8,))) for _ in range(20)]}
    exec(FIRST, names)
    assert tr.sparsity(names["model"]).zeros > 0
    assert "0.weight" in capsys.readouterr().out


def test_the_rules_are_explained(capsys):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    model.add_module("head", nn.Linear(3, 2))
    exec(RULES, {"tr": tr, "nn": nn, "model": model})
    printed = capsys.readouterr().out
    assert re.search(r"0\.weight .* l1=0\.0001, l2=1e-05", printed)
    assert re.search(r"head\.weight .* left out", printed)


def test_the_three_ways_give_the_same_objective():
    model = nn.Linear(3, 2)
    x, y = torch.rand(4, 3), torch.randint(0, 2, (4,))
    reg = tr.Regularizer(model, tr.L1(0.1))
    names = {"tr": tr, "nn": nn, "model": model, "reg": reg, "x": x, "y": y}
    added, wrapped, swapped, attached = THREE_WAYS.strip().splitlines()
    exec(added, names)
    exec(wrapped, names)
    assert names["criterion"](model(x), y).item() == pytest.approx(names["loss"].item(), rel=1e-6)
    exec(swapped, names)
    assert not reg().requires_grad
    assert names["criterion"](model(x), y).item() == pytest.approx(names["loss"].item(), rel=1e-6)
    names["optimizer"].attachment.remove()
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(attached, names)
    assert not reg().requires_grad


@pytest.fixture
def trained():
    model = nn.Linear(4, 3)
    return {
        "tr": tr,
        "nn": nn,
        "model": model,
        "reg": tr.Regularizer(model, tr.L1(0.1)),
        "step": 7,
        "loss": 0.5,
        "accuracy": 0.9,
    }


def test_the_monitor_logs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(MONITOR, trained)
    events = EventAccumulator("runs/l1").Reload()
    assert [(event.step, event.value) for event in events.Scalars("overview/loss")] == [(7, 0.5)]


def test_other_loggers_take_the_numbers(trained):
    class Logger:
        def log(self, numbers, step):
            # MLflow's rule, the strictest of them.
            assert all(re.fullmatch(r"[\w\-. /]+", key) and type(value) is float for key, value in numbers.items())
            assert step == 7

        log_metrics = log

    file = io.StringIO()
    table = csv.DictWriter(file, ["step", *tr.measure(trained["reg"])])
    exec(LOGGERS, {**trained, "wandb": Logger(), "mlflow": Logger(), "table": table})
    assert len(file.getvalue().split(",")) == 1 + len(tr.measure(trained["reg"]))


def test_it_names_only_files_that_exist():
    root = Path(__file__).parent.parent
    named = set(re.findall(r"(?:examples|notebooks|tests|docs|benchmarks)/[\w/.-]+\.\w+", README))
    assert named
    assert not [name for name in named if not (root / name).exists()]
