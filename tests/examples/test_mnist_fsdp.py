"""examples/mnist_fsdp.py, run as a user runs it: two processes, one log, and a checkpoint that one goes on from."""

import os
import re
import subprocess
import sys

import pytest

from tests import ROOT
from tests.models import SHARDS

SCRIPT = ROOT / "examples" / "mnist_fsdp.py"
EPOCH = re.compile(r"^epoch (\d+): accuracy ([\d.]+)%, zeros ([\d.]+)%", re.M)
# Nothing listens on the discard port: the network refuses at once, and scikit-learn's digits serve.
OFFLINE = """
import os, runpy, sys
from torchvision.datasets import MNIST
MNIST.mirrors = ["http://127.0.0.1:9/"]
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""

pytestmark = pytest.mark.skipif(not SHARDS, reason="processes on gloo, with a fully_shard that runs on a CPU")


def run(folder, processes, epochs):
    """What it prints, and (epoch, accuracy, zeros) of each epoch."""
    start = folder / "offline.py"
    start.write_text(OFFLINE)
    flags = ["--epochs", str(epochs), "--l1", "1e-3", "--warmup-epochs", "1", "--lr", "5e-3", "--batch-size", "64"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder), "PYTHONUTF8": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), env.get("PYTHONPATH", "")])
    env.pop("TORCHREG_DATA", None)
    done = subprocess.run(
        [*torchrun, start, SCRIPT, *flags], cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [(int(n), float(right), float(zeros)) for n, right, zeros in EPOCH.findall(done.stdout)]


def test_two_processes_train_to_zeros(tmp_path):
    printed, epochs = run(tmp_path, 2, 3)
    assert "2 processes on " in printed
    assert [n for n, _, _ in epochs] == [1, 2, 3]
    _, accuracy, zeros = epochs[-1]
    assert accuracy > 80
    assert zeros > 40
    assert f"{zeros:.2f}%" in printed.splitlines()[-1], "the table's total"
    assert len(list((tmp_path / "runs" / "fsdp").glob("events.*"))) == 1


@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_two(tmp_path):
    _, [*_, (_, _, zeros)] = run(tmp_path, 2, 3)
    _, [(n, accuracy, more)] = run(tmp_path, 1, 4)
    assert n == 4
    assert accuracy > 80
    assert more > zeros - 5
