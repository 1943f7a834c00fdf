"""examples/finetune_toward.py, run as a user runs it: its table shows what its first lines claim."""

import os
import re
import subprocess
from typing import NamedTuple

import pytest

from tests import ROOT
from tests.models import STRICT

SCRIPT = ROOT / "examples" / "finetune_toward.py"
ROW = re.compile(r"^(.+?) +([\d.]+)% +([\d.]+)% +([\d,]+) of ([\d,]+) \([\d.]+%\) +([\d.]+)$", re.M)


class Row(NamedTuple):
    new: float
    old: float
    kept: int
    counted: int
    distance: float


def run(folder, *flags, data=None):
    """What the script prints, and the rows of its table by name."""
    env = {**os.environ, "PYTHONUTF8": "1", "TORCHREG_DATA": data or ""}
    command = [*STRICT, SCRIPT, *flags]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress bar where no terminal is
    rows = {}
    for name, new, old, kept, counted, distance in ROW.findall(result.stdout):
        rows[name] = Row(
            float(new), float(old), int(kept.replace(",", "")), int(counted.replace(",", "")), float(distance)
        )
    assert list(rows) == ["from scratch", "plain fine-tuning", "toward w₀, L2", "toward w₀, L1"]
    return result.stdout, rows


def check(rows):
    """What holds on every data set."""
    scratch, plain, l2, l1 = rows.values()
    assert scratch.kept == 0
    assert plain.kept < 0.01 * plain.counted
    assert l2.kept < 0.05 * l2.counted
    assert l1.kept > 0.5 * l1.counted
    assert max(l1.distance, l2.distance) < 0.7 * plain.distance < scratch.distance
    assert min(l1.old, l2.old) > plain.old + 5 > scratch.old + 5


def test_l1_toward_the_pretrained_weights_keeps_most_of_them_exactly(tmp_path):
    flags = ["--pretrain-steps", "400", "--steps", "200", "--samples", "200", "--l1", "1e-3"]
    printed, rows = run(tmp_path, *flags)
    assert "data: scikit-learn's digits, 1297 images to train and 500 to test" in printed
    check(rows)
    assert min(row.new for row in rows.values()) > 80


def test_strength_0_is_plain_fine_tuning_and_validation_takes_what_training_leaves(tmp_path):
    printed, rows = run(tmp_path, "--pretrain-steps", "5", "--steps", "5", "--l1", "0", "--l2", "0", "--validate")
    assert "fine-tuned on 500 images of 5–9, validated on 148\n" in printed
    assert rows["toward w₀, L1"] == rows["toward w₀, L2"] == rows["plain fine-tuning"]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TORCHREG_DATA"), reason="TORCHREG_DATA names no folder with MNIST")
def test_on_mnist_the_old_digits_are_kept_for_a_point_on_the_new_ones(tmp_path):
    printed, rows = run(tmp_path, data=os.environ["TORCHREG_DATA"])
    assert "data: MNIST, 60000 images to train and 10000 to test" in printed
    check(rows)
    scratch, plain, l2, l1 = rows.values()
    assert l1.kept > 0.8 * l1.counted
    assert plain.new - 1.5 < min(l1.new, l2.new)
    assert scratch.new < l1.new
    assert min(l1.old, l2.old) > plain.old + 10
