"""The fast part of benchmarks/one_lambda.py: every optimizer with a unit response against scikit-learn."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import torchreg as tr
from tests import ROOT
from tests.test_testing import Off
from torchreg.optim.step_sizes import STOCK

SCRIPT = ROOT / "benchmarks" / "one_lambda.py"
spec = importlib.util.spec_from_file_location("one_lambda", SCRIPT)
one_lambda = sys.modules["one_lambda"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(one_lambda)

ROWS = {row.name: row for row in one_lambda.ROWS}
every_row = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(scope="module")
def problems() -> list[Any]:
    return one_lambda.problems(short=True)


def named(problems: list[Any], *names: str) -> list[Any]:
    found = [problem for problem in problems if problem.name in [f"{name}, λ/λ_max 0.5" for name in names]]
    assert len(found) == len(names)
    return found


def test_every_optimizer_with_a_unit_response_has_a_row() -> None:
    assert {row.kind for row in ROWS.values()} == set(STOCK)


@every_row
def test_it_reaches_scikit_learn_s_solution_and_support(name: str, problems: list[Any]) -> None:
    todo = named(problems, "lasso, diabetes", "elastic net, diabetes", "multinomial, wine")
    if name == "Adafactor":  # whose lr is relative to the weights, which begin at zero here: it takes 10,000 steps
        todo = todo[:2]
    outcomes = one_lambda.run(todo, ROWS[name], one_lambda.prox, steps=3_000, every=50)
    assert not [(o.problem.name, o.gap, o.same_support) for o in outcomes if o.steps is None]
    assert all(0 < np.count_nonzero(o.problem.solution) < o.problem.solution.size for o in outcomes)


@pytest.mark.parametrize("name", ["SGD, momentum 0.99, nesterov", "Adam, β₁ 0.9", "Adagrad"])
def test_groups_reach_scikit_learn_s_multi_task_lasso(name: str, problems: list[Any]) -> None:
    todo = named(problems, "multi-task lasso, wine")
    (outcome,) = one_lambda.run(todo, ROWS[name], one_lambda.prox, steps=3_000, every=50)
    assert outcome.steps is not None, (outcome.gap, outcome.same_support)


@every_row
def test_a_step_that_is_off_by_one_percent_does_not(name: str, problems: list[Any]) -> None:
    def off(row: Any, groups: Any, reg: tr.Regularizer, todo: Any) -> Any:
        optimizer = row.kind(groups, **row.settings)
        tr.optim.attach(optimizer, reg, step_size=Off(STOCK[row.kind], 1.01))
        return optimizer

    (outcome,) = one_lambda.run(named(problems, "lasso, diabetes"), ROWS[name], off, steps=1_200, every=50)
    assert outcome.gap > 1e-6, "1% of λ is more than 1e-6 of the objective"


@pytest.mark.parametrize(
    "rival", ["threshold lr·λ", "penalty in the loss", pytest.param("torchao PruneOptimizer", marks=pytest.mark.slow)]
)
def test_under_adam_no_rival_does(rival: str, problems: list[Any]) -> None:
    if rival.startswith("torchao"):
        pytest.importorskip("torchao", reason="torchao is in the bench extra")
    todo = named(problems, "lasso, diabetes")
    (outcome,) = one_lambda.run(todo, ROWS["Adam, β₁ 0.9"], one_lambda.RIVALS[rival], steps=1_200, every=50)
    assert outcome.gap > 1e-4
    assert not outcome.same_support


def test_the_losses_have_the_gradients_of_their_values(problems: list[Any]) -> None:
    seen = set()
    generator = np.random.default_rng(0)
    for problem in problems:
        loss = problem.loss
        if type(loss) in seen:
            continue
        seen.add(type(loss))
        w, direction = generator.normal(size=(2, *problem.solution.shape)) * 0.1
        (gradient,) = loss.gradients(one_lambda.torch.from_numpy(w)[None]).numpy()
        difference = (loss.value(w + 1e-6 * direction) - loss.value(w - 1e-6 * direction)) / 2e-6
        assert (gradient * direction).sum() == pytest.approx(difference, rel=1e-6)
    assert len(seen) == 3


@pytest.mark.slow
def test_the_short_form_prints_the_table() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", SCRIPT, "--short", "--only", "Adam"],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    rows = [line for line in result.stdout.splitlines() if line.startswith("| Adam")]
    assert len(rows) == sum(name.startswith("Adam") for name in ROWS)
