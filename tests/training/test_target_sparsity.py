"""TargetSparsity: training ends at the wished share of zeros, and λ goes there without swinging."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import os
import subprocess
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torchreg as tr
from tests import ROOT
from tests.models import STRICT, Reads, array, same, snapshot

ADAM = functools.partial(tr.optim.ProxAdam, lr=0.01)


class Free(nn.Module):
    """Weights that are all the model has: of ½Σ(w − a)² + λΣ|w| the solution is known, and so is λ of each sparsity."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        super().__init__()
        self.a = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(
            self.a + 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1))
        )

    def loss(self, step: int) -> Tensor:
        return 0.5 * (self.weight - self.a).square().sum()


class Watched:
    """A run of a model's `loss()`, with what λ and S did in it."""

    def __init__(
        self, model: Any, penalty: Any, target: Any, *, steps: int = 400, optimizer: Any = None, **settings: Any
    ):
        self.model, self.steps = model, steps
        given = {key: settings.pop(key) for key in ("include", "toward") if key in settings}
        self.reg = tr.Regularizer(model, penalty, **given)
        make = optimizer or functools.partial(tr.optim.ProxSGD, lr=0.1, momentum=0.5)
        self.optimizer = make(model.parameters(), regularizer=self.reg)
        self.control = tr.TargetSparsity(self.reg, target, total_steps=steps, **settings)
        self.factors: list[float] = []
        self.shares: list[float] = []

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model.loss(self.control.last_step).backward()
        self.optimizer.step()
        self.control.step()
        if all(term.factor for term in self.reg.terms.values()):
            self.factors.append(self.control.factor)
            self.shares.append(self.control.sparsity)

    def run(self, steps: int | None = None) -> Watched:
        for _ in range(self.steps if steps is None else steps):
            self.step()
        return self

    @property
    def turns(self) -> int:
        """How often λ turned round, swings of less than a fourth apart."""
        count, direction, extreme = 0, 1, self.factors[0]
        for factor in self.factors:
            if direction * math.log(factor / extreme) >= 0:
                extreme = factor
            elif abs(math.log(factor / extreme)) > math.log(1.25):
                count, direction, extreme = count + 1, -direction, factor
        return count


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


class Digits(nn.Sequential):
    """An MLP on scikit-learn's digits."""

    def __init__(self, seed: int = 0, hidden: int = 32) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        self.x, self.y = digits()

    def loss(self, step: int) -> Tensor:
        # A run that goes on sees the batches that it would have seen.
        batch = torch.randint(1400, (64,), generator=torch.Generator().manual_seed(step))
        return F.cross_entropy(self(self.x[batch]), self.y[batch])

    @torch.no_grad()
    def accuracy(self) -> float:
        return float((self(self.x[1400:]).argmax(1) == self.y[1400:]).float().mean())


# ---------------------------------------------------------------------- against a solution that is known


@pytest.mark.parametrize(
    ("target", "strength"), [(0.1, 1.0), (0.5, 0.01), (0.5, 100.0), (0.9, 0.01), (0.9, 100.0), (0.99, 1.0)]
)
def test_it_finds_the_strength_that_a_known_problem_asks_for(target, strength):
    model = Free(60, 50)
    run = Watched(model, tr.L1(strength), target).run()
    sizes = np.sort(np.abs(array(model.a)).ravel())
    wished = round(target * 3000)
    # At the solution a weight is zero iff |a| ≤ λ.
    assert sizes[wished - 10] <= strength * run.control.factor <= sizes[wished + 10], "within a third of a point"
    assert int((model.weight == 0).sum()) == wished
    assert run.turns <= 2
    assert max(run.shares) <= target + 0.005


def test_the_zeros_are_those_of_the_smallest_targets_and_the_rest_is_no_longer_shrunk():
    model = Free(60, 50)
    Watched(model, tr.L1(1.0), 0.9).run()
    order = np.argsort(np.abs(array(model.a)).ravel())
    zero = array(model.weight).ravel() == 0
    assert zero[order[:2690]].all()
    assert not zero[order[2710:]].any()
    rest = array(model.weight).ravel()[order[2710:]]
    np.testing.assert_allclose(rest, array(model.a).ravel()[order[2710:]], atol=0.05)


@pytest.mark.parametrize(("groups", "axis"), [(tr.Rows(), 1), (tr.Columns(), 0)])
def test_whole_groups_are_counted_and_zeroed(groups, axis):
    model = Free(60, 60)
    run = Watched(model, tr.GroupLasso(1.0, groups), 0.75, groups=groups).run()
    norms = np.linalg.norm(array(model.weight), axis=axis)
    assert (norms == 0).sum() == 45
    assert set(np.flatnonzero(norms == 0)) == set(np.argsort(np.linalg.norm(array(model.a), axis=axis))[:45])
    assert (array(model.weight) == 0).sum() == 45 * 60
    assert run.control.sparsity == 0.75
    assert run.turns <= 2


def test_single_weights_of_a_penalty_of_both_kinds_are_counted():
    model = Free(60, 50)
    Watched(model, tr.SparseGroupLasso(l1=1.0, group=0.1), 0.8).run()
    assert int((model.weight == 0).sum()) == 2400


def test_toward_other_weights_those_that_have_not_moved_are_counted():
    model = Free(60, 50)
    anchor = {"weight": torch.full((60, 50), 0.25)}
    run = Watched(model, tr.L1(1.0), 0.8, toward=anchor).run()
    assert int((model.weight == 0.25).sum()) == 2400
    assert int((model.weight == 0).sum()) == 0
    sizes = np.sort(np.abs(array(model.a) - 0.25).ravel())
    assert sizes[2355] <= run.control.factor <= sizes[2445]


def test_a_schedule_of_targets_is_followed():
    curve = tr.schedules.Chain(
        tr.schedules.Constant(0.3, steps=200), tr.schedules.Linear(0.3, 0.8, 200), tr.schedules.Constant(0.8)
    )
    model = Free(60, 50)
    run = Watched(model, tr.L1(1.0), curve, steps=600, every=3).run()
    shares = np.array(run.shares)
    wished = np.array([curve(step) for step in range(1, len(shares) + 1)])
    assert np.abs(shares - wished)[120:].max() < 0.03
    assert np.abs(shares - wished)[450:].max() < 0.01
    assert int((model.weight == 0).sum()) == 2400


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("optimizer", "target"),
    [
        (functools.partial(tr.optim.ProxSGD, lr=0.05, momentum=0.9), 0.9),
        (functools.partial(tr.optim.ProxAdam, lr=0.005), 0.5),
        (functools.partial(tr.optim.ProxAdamW, lr=0.01), 0.99),
    ],
    ids=["ProxSGD", "ProxAdam", "ProxAdamW"],
)
def test_a_network_ends_at_the_target_to_the_weight(optimizer, target):
    model = Digits()
    run = Watched(model, tr.L1(1e-3), target, steps=400, optimizer=optimizer).run()
    assert tr.sparsity(model).zeros == round(target * 2368)
    assert run.control.sparsity == pytest.approx(target, abs=1e-3)
    assert abs(run.shares[-1] - target) < 0.03, "λ did it, and not the finish"
    assert run.turns <= 5
    assert max(run.shares) < target + 0.05
    assert model.accuracy() > {0.5: 0.85, 0.9: 0.75, 0.99: 0.11}[target]


@pytest.mark.parametrize("strength", [3e-5, 3e-1])
def test_a_strength_that_is_wrong_by_a_hundred_leads_there_too(strength):
    model = Digits()
    run = Watched(model, tr.L1(strength), 0.8, steps=400, optimizer=ADAM).run()
    assert tr.sparsity(model).zeros == round(0.8 * 2368)
    assert 1e-3 < strength * run.control.factor < 3e-2
    assert model.accuracy() > 0.85


def test_one_term_alone_is_moved_and_counted():
    model = Digits()
    rules = {"0.weight": tr.L1(1e-3), "2.weight": tr.L1(1e-4)}
    run = Watched(model, rules, 0.9, steps=200, optimizer=ADAM, term="0.weight").run(150)
    assert run.reg["0.weight"].factor == run.control.factor != 1.0
    assert run.reg["2.weight"].factor == 1.0
    run.run(50)
    assert int((model[0].weight == 0).sum()) == round(0.9 * 2048)
    assert run.reg["0.weight"].factor == 0.0
    assert run.reg["2.weight"].factor == 1.0


def test_in_the_finish_the_zeros_stay_and_the_rest_trains_without_the_penalty():
    model = Digits()
    run = Watched(model, tr.L1(1e-3), 0.8, steps=200, optimizer=ADAM, finish=0.2).run(161)
    found, zero = run.control.factor, model[0].weight == 0
    before = model[0].weight.detach().clone()
    for _ in range(45):  # beyond the end too
        run.step()
        assert run.reg["l1"].factor == 0
        assert torch.equal(model[0].weight == 0, zero)
    assert (model[0].weight != before)[~zero].float().mean() > 0.9
    assert run.control.factor == found


def test_too_many_zeros_at_the_finish_come_back_where_there_is_a_gradient():
    model = Free(60, 50)
    run = Watched(model, tr.L1(1.0), 0.5).run(359)
    with torch.no_grad():
        model.weight[:45] = 0
    run.control.step()
    run.run(40)
    zero = array(model.weight) == 0
    assert zero.sum() == 1500
    assert np.abs(array(model.a))[:45][~zero[:45]].min() > 0.3, "those that were pushed off 0 the most"


def test_zeros_without_a_gradient_cannot_come_back_and_it_is_said():
    model = Free(60, 50)
    model.loss = lambda step: 0.5 * (model.weight - model.a)[30:].square().sum()
    run = Watched(model, tr.L1(1.0), 0.3, optimizer=ADAM)
    with (
        pytest.warns(UserWarning, match="900 were wished: the others have no gradient"),
        pytest.warns(UserWarning, match="the penalty had zeroed"),
    ):
        run.run()
    assert int((model.weight == 0).sum()) > 900


# ---------------------------------------------------------------------- what it costs, and going on


def test_only_a_reading_synchronizes():
    run = Watched(Digits(), tr.L1(1e-3), 0.8, optimizer=ADAM, every=20).run(10)
    counts = []
    for _ in range(100):
        with Reads() as reads:
            run.control.step()
        counts.append(reads.count)
    assert [i for i, count in enumerate(counts) if count] == [9, 29, 49, 69, 89]
    assert set(counts) == {0, 1}


@pytest.mark.parametrize("saved_at", [153, 187])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(saved_at):
    run = Watched(Digits(), tr.L1(1e-3), 0.9, steps=200, optimizer=ADAM).run(saved_at)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (run.model, run.reg, run.optimizer, run.control)], file)
    run.run(200 - saved_at)

    other = Watched(Digits(seed=7), tr.L1(1e-3), 0.9, steps=200, optimizer=ADAM)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for part, state in zip((other.model, other.reg, other.optimizer, other.control), states, strict=True):
        part.load_state_dict(state)
    other.run(200 - saved_at)
    assert same(snapshot(run.model), snapshot(other.model))
    assert (run.control.factor, run.control.sparsity) == (other.control.factor, other.control.sparsity)
    assert tr.sparsity(other.model).zeros == round(0.9 * 2368)


def test_a_copy_of_all_goes_on_by_itself():
    run = Watched(Digits(), tr.L1(1e-3), 0.9, steps=200, optimizer=ADAM).run(190)
    twin = copy.deepcopy(run)
    run.run(10)
    assert twin.control.last_step == 190
    twin.run(10)
    assert same(snapshot(run.model), snapshot(twin.model))


def test_a_state_of_something_else_is_refused_and_nothing_has_changed():
    run = Watched(Digits(), tr.L1(1e-3), 0.9, steps=100, optimizer=ADAM).run(95)
    small = Watched(Digits(hidden=8), tr.L1(1e-3), 0.9, steps=100, optimizer=ADAM).run(10)
    before = small.control.state_dict()
    with pytest.raises(ValueError, match="load it into the same model"):
        small.control.load_state_dict(run.control.state_dict())
    with pytest.raises(TypeError, match="expected a state with last_step, factor"):
        small.control.load_state_dict({"last_step": 3})
    assert small.control.state_dict() == before


# ---------------------------------------------------------------------- what cannot be reached


def make(penalty: Any = None, target: Any = 0.9, *, prox: bool = True, **settings: Any) -> tr.TargetSparsity:
    model = Digits()
    reg = tr.Regularizer(model, penalty or tr.L1(1e-3))
    make.kept = tr.optim.ProxAdam(model.parameters(), regularizer=reg) if prox else None  # type: ignore[attr-defined]
    make.reg = reg  # type: ignore[attr-defined]
    return tr.TargetSparsity(reg, target, **{"total_steps": 1000, **settings})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: make(tr.L2(1e-3)), ValueError, "L2.* of 0.weight never zeroes single weights"),
        (lambda: make(tr.L1(0.0)), ValueError, "never zeroes single weights.* a strength above 0"),
        (lambda: make(tr.ElasticNet(l1=0.0, l2=1.0)), ValueError, "never zeroes single weights"),
        (lambda: make(tr.GroupLasso(1e-3)), ValueError, r"never zeroes single weights.* groups=Rows\(\)"),
        (lambda: make(tr.GroupLasso(1e-3), groups=tr.Columns()), ValueError, r"never zeroes groups of Columns\(\)"),
        (lambda: make({"0.weight": tr.L1(1.0), "2.weight": tr.L2(1.0)}), ValueError, r"2.weight never .* term=\.\.\."),
        (lambda: make(prox=False), ValueError, "no proximal optimizer carries 0.weight"),
        (lambda: make(target=1.0), ValueError, "target=1.0 must be below 1"),
        (lambda: make(target=95), ValueError, "target=95.0 must be below 1: it is a share"),
        (lambda: make(target=0), ValueError, "target=0 needs no zeros"),
        (lambda: make(target=-0.5), ValueError, "target=-0.5 must be finite and at least 0"),
        (lambda: make(target="high"), TypeError, "target='high' is a str, not a number"),
        (lambda: make(target=lambda step: step / 500), ValueError, "target=2.0 must be below 1"),
        (lambda: make(target=1e-9), ValueError, "a target of 1e-09 is none of 2368 weights"),
        (lambda: make(target=0.9999), ValueError, "a target of 0.9999 is all of 2368 weights"),
        (lambda: make(total_steps=5), ValueError, "total_steps=5 must be at least 50"),
        (lambda: make(every=51), ValueError, "every=51 gives fewer than 20 readings in 1000 steps.* pass 50 or less"),
        (lambda: make(finish=0), ValueError, "finish=0 must lie between 0 and 1"),
        (lambda: make(every=0), ValueError, "every=0 must be at least 1"),
        (lambda: make(term="fc"), ValueError, r"no term 'fc' to move; the terms are \['l1'\]"),
        (lambda: make(groups="rows"), TypeError, r"groups='rows' is not a geometry; write groups=Rows\(\)"),
        (lambda: tr.TargetSparsity(Digits(), 0.9, total_steps=100), TypeError, "expected a Regularizer"),
    ],
)
def test_what_cannot_be_reached_is_refused_at_construction(build, error, message):
    make.reg = None  # type: ignore[attr-defined]
    with pytest.raises(error, match=message):
        build()
    reg = make.reg  # type: ignore[attr-defined]
    assert reg is None or all(term.factor == 1.0 for term in reg.terms.values()), "nothing has changed"


def test_a_penalty_that_does_zero_is_taken_whatever_the_others_do():
    rules = {"0.weight": tr.L1(1e-3), "2.weight": tr.L2(1e-3)}
    assert make(rules, term="0.weight").factor == make.reg["0.weight"].factor == 0.01
    assert make(tr.SparseGroupLasso(1e-3, 1e-3), groups=tr.Rows()).target == 0.9


def test_steps_that_zero_nothing_are_warned_of_at_half_time():
    run = Watched(Digits(), tr.L1(1e-3), 0.9, optimizer=functools.partial(tr.optim.ProxAdam, lr=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.run(175)
    with pytest.warns(UserWarning, match=r"half of the steps have zeroed 0.00% .* lr above 0") as caught:
        run.run(10)
    assert len(caught) == 1
    assert caught[0].filename == __file__


# ---------------------------------------------------------------------- the benchmark


@pytest.mark.slow
def test_five_networks_end_at_three_targets(tmp_path):
    script, out = ROOT / "benchmarks" / "target_sparsity.py", tmp_path / "rows.json"
    env = {**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*STRICT, script, "--short", "--steps", "1000", "--json", out]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    rows = [row for table in json.loads(out.read_text(encoding="utf-8")).values() for row in table]
    assert len(rows) == 15 + 7
    for row in rows:
        # A network of 640 weights, or of 64 groups, has shares no nearer than this.
        assert float(row["error"]) <= 0.1, row
        assert float(row["over"]) <= 5, row
        assert int(row["turns"]) <= 6, row
