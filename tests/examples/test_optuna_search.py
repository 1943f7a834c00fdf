"""examples/optuna_search.py as a user runs it: trials that fall behind end, and the best one's path comes again."""

from __future__ import annotations

import os
import re
import subprocess

from tests import ROOT
from tests.models import STRICT


def run(*options, folder, **environment):
    return subprocess.run(
        [*STRICT, ROOT / "examples" / "optuna_search.py", *options],
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        encoding="utf-8",
    )


def test_the_best_trial_is_the_best_of_all_paths_and_comes_again(tmp_path):
    result = run("--trials", "8", "--points", "4", "--steps", "60", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    trials = re.findall(r"lr (\S+): validation accuracy (\S+)% at λ=(\S+), (\S+) weights left(.*)", result.stdout)
    assert len(trials) == 8
    assert any("ended after" in end for *_, end in trials)
    finished = [(float(score), lr, float(strength), left) for lr, score, strength, left, end in trials if not end]
    score, lr, strength, left = max(finished, key=lambda trial: trial[0])
    assert all(float(trial[1]) <= score for trial in trials if trial[4])  # none that would have won was ended
    path = [line.split() for line in result.stdout.split(f"the path at lr {lr}\n\n")[1].splitlines()[2:6]]
    best = max(path, key=lambda point: float(point[1]))
    assert [float(best[0]), best[3]] == [strength, left]
    assert abs(100 * float(best[1]) - score) < 0.01
    assert float(re.search(r"has seen: (\S+)%", result.stdout)[1]) > 80


def test_without_optuna_it_names_the_extra(tmp_path):
    (tmp_path / "optuna.py").write_text("raise ImportError", encoding="utf-8")
    result = run(folder=tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert result.returncode == 1
    assert "pip install '.[optuna]'" in result.stderr
