"""benchmarks/minibatch.py: it runs, and what benchmarks/RESULTS.md concludes from it shows in a short run too."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests import ROOT
from tests.models import STRICT


@pytest.mark.slow
def test_minibatches_noise_is_in_the_support_and_more_momentum_takes_it_out(tmp_path):
    script, out = ROOT / "benchmarks" / "minibatch.py", tmp_path / "rows.json"
    env = {**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*STRICT, script, "--short", "--parts", "1", "3", "--json", out]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))
    share = {(row["β"], row["batch"], row["lr"]): float(row["nonzero %"]) for row in rows if "β" in row}
    assert share["0.9", "100", "0.02"] == pytest.approx(share["0.9", "100", "0.005"], abs=5), "lr does not matter"
    assert share["0", "100", "0.02"] > 5 * share["0.97", "100", "0.02"]
    for part in ("3. Lasso, batch 100, SGD 0.9", "3. Lasso, batch 100, Adam"):
        wrong = {row["run"]: int(row["false +"]) for row in rows if row["part"] == part}
        assert wrong["lr cosine"] > 100
        assert wrong["β₁ 0.99 in the last third"] < wrong["as it is"] / 4
