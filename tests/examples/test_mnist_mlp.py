"""The main job, run as a user runs it: its table, its picture and its logs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import ROOT

EXAMPLES = ROOT / "examples"
REAL = os.environ.get("TORCHREG_DATA")
# Nothing listens on the discard port: the network refuses at once, whatever machine this is.
OFFLINE = """
import os, runpy, sys
from torchvision.datasets import MNIST
MNIST.mirrors = ["http://127.0.0.1:9/"]
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def run(tmp_path: Path, *flags: str, offline: bool = False) -> tuple[str, dict[str, list[str]]]:
    """What the script printed, and the cells of its table by run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    if offline:
        environment.pop("TORCHREG_DATA", None)
    start = [sys.executable, "-c", OFFLINE] if offline else [sys.executable]
    done = subprocess.run(
        [*start, str(EXAMPLES / "mnist_mlp.py"), *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = ("plain", "L1 in loss", "prox L1", "prox elastic net")
    lines = [line for line in done.stdout.splitlines() if line.startswith(names)]
    rows = [re.split(r"\s{2,}", line) for line in lines]
    assert [row[0] for row in rows] == list(names)
    return done.stdout + done.stderr, {row[0]: row[1:] for row in rows}


def zeros(rows: dict[str, list[str]]) -> dict[str, float]:
    return {name: float(row[2]) for name, row in rows.items()}


def test_without_a_network_the_digits_do_the_same_job(tmp_path):
    flags = ["--epochs", "3", "--refit-epochs", "1", "--warmup-epochs", "1", "--l1", "1e-3", "--batch-size", "256"]
    printed, rows = run(tmp_path, *flags, offline=True)
    assert "using scikit-learn's digits instead" in printed.splitlines()[0]
    share = zeros(rows)
    assert share["plain"] == 0
    assert share["L1 in loss"] < 0.1
    assert share["prox L1"] > 60
    assert share["prox elastic net"] > 60
    assert all(float(row[1]) > 90 for row in rows.values()), "accuracy after the refit"
    left = [int(cell.replace(",", "")) for cell in rows["prox L1"][3:6]]
    assert 100 * (1 - sum(left) / (64 * 300 + 300 * 100 + 100 * 10)) == pytest.approx(share["prox L1"], abs=0.005)
    assert rows["plain"][6] == "64 of 64"

    with Image.open(tmp_path / "runs" / "mnist_mlp.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20, "not blank"
    for name in ("plain", "L1_in_loss", "prox_L1", "prox_elastic_net"):
        [log] = (tmp_path / "runs" / name).iterdir()
        assert log.stat().st_size < 5e6
        events = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload()
        tags = events.Tags()
        layers = [f"fc{i}.weight" for i in (1, 2, 3)]
        assert {f"{metric}/{layer}" for layer in layers for metric in METRICS} | OVERVIEW <= set(tags["scalars"])
        assert {f"weight_masks/{layer}" for layer in layers} | {"weight_input_map/fc1.weight"} == set(tags["images"])
        assert len(events.Scalars("overview/accuracy")) == 4
    final = events.Scalars("overview/sparsity")[-1].value
    assert 100 * final == pytest.approx(share["prox elastic net"], abs=0.005)
    assert events.Scalars("overview/penalty")[-1].value == 0, "disabled in the refit"
    assert "is gone" not in printed


OVERVIEW = {f"overview/{name}" for name in ("accuracy", "loss_data", "objective", "params_kept", "penalty", "sparsity")}
METRICS = ("sparsity", "sparsity_inputs", "weight_norm_l1", "weight_norm_l2", "threshold")


def test_a_second_run_replaces_what_the_first_logged(tmp_path):
    flags = ["--epochs", "1", "--refit-epochs", "0", "--batch-size", "4096"]
    for _ in range(2):
        run(tmp_path, *flags, offline=True)
    events = EventAccumulator(str(tmp_path / "runs" / "prox_L1"), size_guidance={"scalars": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="TORCHREG_DATA is unset: no real MNIST to train on")
def test_on_mnist_nine_weights_in_ten_are_zero_at_the_accuracy_of_plain(tmp_path):
    printed, rows = run(tmp_path)
    assert printed.startswith("MNIST from")
    share = zeros(rows)
    assert share["plain"] == 0
    assert share["L1 in loss"] < 0.1
    for name in ("prox L1", "prox elastic net"):
        assert share[name] >= 90
        assert float(rows[name][1]) >= float(rows["plain"][1]) - 0.5
