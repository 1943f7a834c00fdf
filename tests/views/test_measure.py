"""measure(): its numbers against numpy, its thresholds against the steps that were taken, and that looking is free."""

from __future__ import annotations

import copy
import gc
import math
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from torch.optim import ASGD, SGD, Optimizer

import torchreg as tr
from tests.backends import backend as backend
from tests.cases import CASES
from tests.inspection.test_zero_counts import dense, every_layer, prune
from tests.models import MLP, Bare, Counted, Reads, array, batch, mlp, same, snapshot
from torchreg.binding import connectivity
from torchreg.optim.step_sizes import STOCK
from torchreg.views import reading


def ranked(values: np.ndarray, share: float) -> float:
    """The quantile by nearest rank: the least value that at least that share of them does not exceed."""
    return float(np.quantile(values, share, method="inverted_cdf"))


# ---------------------------------------------------------------------- the numbers


@every_layer
def test_a_weight_is_measured_as_numpy_measures_it(layer):
    torch.manual_seed(0)
    module = layer()
    prune(module.weight)
    found, w, full = tr.measure(module, near_zero=0.05), array(module.weight), dense(module)
    rows = np.linalg.norm(w.reshape(len(w), -1), axis=1)
    assert found["sparsity/weight"] == np.mean(w == 0) == found["overview/sparsity"]
    assert found["overview/params_kept"] == np.count_nonzero(w)
    assert found["sparsity_near_zero/weight"] == np.mean(np.abs(w) <= np.float32(0.05))
    assert found["sparsity_neurons/weight"] == np.mean([not neuron.any() for neuron in full])
    assert found["sparsity_inputs/weight"] == np.mean([not full[:, i].any() for i in range(full.shape[1])])
    assert found["weight_norm_l1/weight"] == pytest.approx(np.abs(w).sum(), rel=1e-6)
    assert found["weight_norm_l2/weight"] == pytest.approx(np.linalg.norm(w.ravel()), rel=1e-6)
    for share in (10, 50, 90):
        assert found[f"weight_group_norm/weight.p{share}"] == pytest.approx(ranked(rows, share / 100), rel=1e-6)
    assert found["support_churn/weight"] == found["threshold/weight"] == 0


def test_totals_are_of_all_weights_and_the_spread_of_the_layers():
    model = mlp()
    prune(model.fc1.weight)
    found = tr.measure(model)
    zeros = [array(w) == 0 for w in (model.fc1.weight, model.fc2.weight)]
    assert found["overview/sparsity"] == np.mean(np.concatenate([z.ravel() for z in zeros]))
    assert found["overview/params_kept"] == sum(z.size - z.sum() for z in zeros)
    assert (found["spread/sparsity.min"], found["spread/sparsity.max"]) == (0, np.mean(zeros[0]))
    assert not [key for key in found if key.startswith(("penalty", "schedule", "overview/penalty"))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_penalties_are_those_of_the_terms(case):
    model = mlp()
    toward = {name: case.anchor(w.detach()) for name, w in model.named_parameters()} if case.anchored else None
    reg = tr.Regularizer(model, case.penalty, toward=toward)
    prune(model.fc1.weight)
    (term,) = reg
    factor = reg[term].factor = 0.5 if case.penalty.convex else 1.0  # the λ of MCP does not multiply all of it
    found, expected = tr.measure(reg), sum(case.value(w.detach()) for w in (model.fc1.weight, model.fc2.weight))
    assert found["overview/penalty"] == found[f"penalty/{term}"] == pytest.approx(factor * expected, rel=1e-6)
    norms = array(model.fc1.weight)
    axis = 0 if isinstance(getattr(case.penalty, "groups", None), tr.Columns) else 1
    norms = np.linalg.norm(norms, axis=axis)
    assert found["weight_group_norm/fc1.weight.p50"] == pytest.approx(ranked(norms, 0.5), rel=1e-6)


def test_terms_and_strengths_stand_by_their_safe_names():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1*": tr.L1(0.1), "re:fc[2].*": tr.ElasticNet(l1=0.2, l2=0.3)})
    reg["fc1*"].factor = 0.5
    found = tr.measure(reg)
    assert {key: value for key, value in found.items() if key.startswith("schedule")} == {
        "schedule/lambda_fc1_": 0.05,
        "schedule/lambda_re_fc_2_._.l1": 0.2,
        "schedule/lambda_re_fc_2_._.l2": 0.3,
    }
    parts = {key: value.item() for key, value in reg.components().items()}
    assert found["penalty/fc1_"] == pytest.approx(parts["fc1*"], rel=1e-6)
    assert found["penalty/re_fc_2_._"] == pytest.approx(parts["re:fc[2].*"], rel=1e-6)
    with reg.disabled():
        off = tr.measure(reg)
    assert all(off[key] == 0 for key in off if key.startswith(("schedule", "penalty", "overview/penalty")))
    assert off.keys() == found.keys()


def test_keys_are_safe_in_every_logger_and_never_collide():
    model = nn.ModuleDict({"a(b)": nn.Linear(2, 2), "a b ": nn.Linear(2, 3), "größe": nn.Linear(2, 4)})
    found = tr.measure(model)
    assert all(re.fullmatch(r"[A-Za-z0-9_]+/[A-Za-z0-9_.\-]+", key) for key in found)
    assert len([key for key in found if key.startswith("sparsity/")]) == 3


def test_a_weight_named_total_does_not_hide_the_total():
    model = nn.Module()
    model.total, model.other = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(3, 4))
    found = tr.measure(model)
    assert found["sparsity_near_zero/total"] == 4 / 16
    assert found["sparsity_near_zero/total_2"] == 1


def test_a_tied_weight_counts_once_and_a_pruned_one_as_the_model_computes_with_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert tr.measure(model)["overview/params_kept"] == 16
    pruned = nn.Linear(4, 5)
    l1_unstructured(pruned, "weight", amount=0.5)
    found = tr.measure(pruned)
    assert found["overview/sparsity"] == tr.sparsity(pruned).fraction == 0.5
    assert found["weight_norm_l1/weight_orig"] == pytest.approx(np.abs(array(pruned.weight)).sum(), rel=1e-6)
    # The penalty is of the parameter that trains, masked or not.
    reg = tr.Regularizer(pruned, tr.L1(1.0))
    assert tr.measure(reg)["penalty/l1"] == pytest.approx(reg().item(), rel=1e-6)


def test_strange_weights_give_numbers_all_the_same():
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.vector = nn.Parameter(torch.tensor([0.0, -1.0, 3.0]))
            self.wild = nn.Parameter(torch.tensor([[0.0, math.nan], [math.inf, 1.0]]))
            self.complex = nn.Parameter(torch.tensor([[3 + 4j, 0j]]))
            self.small = nn.Parameter(torch.full((300, 300), 0.5, dtype=torch.float16))

    reg = tr.Regularizer(Strange(), tr.L1(1.0), include=list(dict(Strange().named_parameters())))
    with pytest.warns(UserWarning, match="wild has 2 NaN or infinite entries of 4, .*; go back to an earlier check"):
        found = tr.measure(reg)
    assert found == pytest.approx(tr.measure(reg), nan_ok=True)  # and says it no second time
    assert found["sparsity/empty"] == found["weight_norm_l1/empty"] == found["weight_group_norm/empty.p50"] == 0
    assert (found["weight_norm_l2/scalar"], found["sparsity_inputs/scalar"]) == (2.0, 0)
    assert (found["sparsity_neurons/vector"], found["weight_norm_l1/vector"]) == (1 / 3, 4.0)
    assert found["sparsity/wild"] == 0.25
    assert math.isnan(found["weight_norm_l1/wild"])
    assert (found["weight_norm_l2/complex"], found["sparsity/complex"]) == (5.0, 0.5)
    assert found["weight_norm_l1/small"] == 45_000
    assert found["overview/params_kept"] == 90_000 + 1 + 2 + 3 + 1


# ---------------------------------------------------------------------- since the last call


def test_churn_is_what_became_zero_or_nonzero_since_the_last_call():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(0.1))
    assert tr.measure(reg)["support_churn/total"] == 0
    with torch.no_grad():
        model.fc1.weight[0, :4] = 0
    found = tr.measure(reg)
    assert (found["support_churn/fc1.weight"], found["support_churn/fc2.weight"]) == (4 / 30, 0)
    assert found["support_churn/total"] == 4 / 45
    with torch.no_grad():
        model.fc1.weight[0, :2] = 1
        model.fc1.weight[1, 0] = 0
    assert tr.measure(reg)["support_churn/fc1.weight"] == 3 / 30
    assert tr.measure(reg)["support_churn/total"] == 0
    assert tr.measure(model)["support_churn/total"] == 0  # another target, and its first call


def test_churn_goes_on_after_a_call_in_inference_mode(backend):
    model = mlp()
    with torch.inference_mode():
        tr.measure(model)
    with torch.no_grad():
        model.fc1.weight[0, :3] = 0
    assert tr.measure(model)["support_churn/total"] == 3 / 45
    with torch.inference_mode():
        assert tr.measure(model)["support_churn/total"] == 0


def test_keys_are_the_same_in_every_call():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(0.1))
    before = list(tr.measure(reg))
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.1, regularizer=reg)
    x, y = batch()
    (model(x) - y).square().mean().backward()
    optimizer.step()
    assert list(tr.measure(reg)) == before
    prune(model.fc1.weight)
    assert list(tr.measure(reg)) == before


def test_what_is_remembered_keeps_nothing_alive():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(0.1))
    tr.measure(reg)
    tr.measure(model)
    gone = weakref.ref(reg), weakref.ref(model)
    del reg, model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_of_sharded_weights_one_is_whole_at_a_time(monkeypatch):
    model, gathered = mlp(), []

    def whole(entry):
        assert not any(w() is not None for w in gathered)
        w = entry.parameter.detach().clone()
        gathered.append(weakref.ref(w))
        return w

    expected = tr.measure(model)
    monkeypatch.setattr(connectivity, "weights", whole)
    model.fc1.weight.full_tensor = model.fc1.weight.detach  # as a DTensor has it
    assert tr.measure(model) == expected
    assert len(gathered) == 2


def test_a_weight_of_another_shape_starts_anew():
    model = nn.Sequential(nn.Linear(4, 3))
    tr.measure(model)
    model[0].weight = nn.Parameter(torch.zeros(3, 5))
    assert tr.measure(model)["support_churn/total"] == 0


# ---------------------------------------------------------------------- thresholds

SETTINGS = [
    *((kind, {"lr": 0.01}) for kind in STOCK),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
    (SGD, {"lr": 0.01, "momentum": 0.9}),
    (SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_threshold_is_lambda_times_the_step_that_was_taken(kind, settings):
    model = mlp().double()
    penalty = Counted(0.02)
    reg = tr.Regularizer(model, penalty, include="fc1.weight")
    optimizer = kind(model.parameters(), **settings)
    handle = tr.optim.attach(optimizer, reg)
    x, y = batch()
    if kind not in (SGD, ASGD):  # whose steps need no state
        assert tr.measure(reg)["threshold/fc1.weight"] == 0
    for _ in range(5):
        optimizer.zero_grad()
        (model(x.double()) - y.double()).square().mean().backward()
        optimizer.step()
        before, found = copy.deepcopy(optimizer.state_dict()), tr.measure(reg)["threshold/fc1.weight"]
        assert str(optimizer.state_dict()) == str(before)
    taken = penalty.steps[-1]
    taken = ranked(array(taken), 0.5) if isinstance(taken, torch.Tensor) else taken
    # What stands in the numerators of these two has moved on.
    tolerance = {torch.optim.Adadelta: 0.2, torch.optim.Adafactor: 0.01}.get(kind, 1e-6)
    assert found == pytest.approx(0.02 * taken, rel=tolerance)
    handle.remove()
    assert tr.measure(reg)["threshold/fc1.weight"] == 0


def test_the_threshold_of_a_large_weight_is_of_a_sample():
    torch.manual_seed(0)
    model = nn.Linear(300, 200)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=1e-3, regularizer=reg)
    (model(torch.randn(64, 300) * torch.linspace(0.1, 3, 300)).square().mean()).backward()
    optimizer.step()
    (step,) = reg.bindings()[0].carrier.sampled_steps().values()
    assert 900 < step.numel() < 1100
    v = array(optimizer.state[model.weight]["exp_avg_sq"]) / (1 - 0.999)
    assert tr.measure(reg)["threshold/weight"] == pytest.approx(0.1 * np.median(1e-3 / (np.sqrt(v) + 1e-8)), rel=0.05)


@pytest.mark.parametrize(
    ("penalty", "limit"),
    [
        (tr.L1(0.3), 0.3),
        (tr.L1(0.0), 0.0),
        (tr.L2(0.3), 0.0),  # takes nothing to zero
        (tr.ElasticNet(l1=0.2, l2=5.0), 0.2),
        (tr.GroupLasso(0.3), 0.3),  # of a group's root mean square
        (tr.GroupLasso(0.3, tr.Columns()), 0.3),
        (Bare(0.3), 0.0),  # says nothing of the kind
    ],
    ids=repr,
)
def test_the_threshold_is_where_the_prox_begins_to_leave_weights_alone(penalty, limit):
    model = mlp()
    reg = tr.Regularizer(model, penalty, include="fc1.weight")
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.5, regularizer=reg)
    (model(batch()[0]).sum() * 0).backward()
    optimizer.step()
    found = tr.measure(reg)["threshold/fc1.weight"]
    assert found == pytest.approx(0.5 * limit)
    if limit:
        for size, survives in ((0.99, False), (1.01, True)):
            w = torch.full_like(model.fc1.weight.detach(), size * found)
            assert bool(penalty.prox(w, 0.5).any()) == survives


def test_a_step_size_of_ones_own_is_asked():
    class Tracking(tr.optim.StepSize):
        def after_update(self, group, state, parameter, skipped=None):
            state["updates"] = state.get("updates", 0) + 1

        def __call__(self, group, state, parameter):
            return group["lr"] * state["updates"]

    def half(group, state, parameter):
        return group["lr"] / 2 * state["momentum_buffer"].isfinite().float()

    for step_size, momentum, expected in (
        (tr.optim.learning_rate, 0.0, 0.05),
        (half, 0.9, 0.025),
        (Tracking(), 0.9, 0.05),
    ):
        model = mlp()
        reg = tr.Regularizer(model, tr.L1(0.1))
        optimizer = SGD(model.parameters(), lr=0.5, momentum=momentum)
        tr.optim.attach(optimizer, reg, step_size=step_size)
        assert tr.measure(reg)["threshold/fc1.weight"] == (0.05 if momentum == 0 else 0)
        model(batch()[0]).sum().backward()
        optimizer.step()
        for _ in range(2):
            assert tr.measure(reg)["threshold/fc1.weight"] == pytest.approx(expected)


# ---------------------------------------------------------------------- looking is free


@pytest.mark.parametrize("kind", STOCK, ids=lambda kind: kind.__name__)
def test_a_training_that_is_measured_is_bit_for_bit_the_one_that_is_not(kind: type[Optimizer]):
    ends = []
    for looks in (False, True):
        model = mlp()
        reg = tr.Regularizer(model, tr.L1(0.01))
        optimizer = kind(model.parameters(), lr=0.01)
        tr.optim.attach(optimizer, reg)
        x, y = batch()
        for _ in range(4):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            if looks:
                tr.measure(reg)
        ends.append((snapshot(model), str(optimizer.state_dict()), str(torch.random.get_rng_state())))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_a_deep_network_is_read_as_often_as_a_shallow_one(monkeypatch):
    monkeypatch.setattr(reading, "synchronizes", lambda device: True)  # as a CPU does not
    counts = []
    for depth in (2, 30):
        reg = tr.Regularizer(nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth))), tr.L1(0.1))
        tr.measure(reg)
        with Reads() as reads:
            tr.measure(reg)
        counts.append(reads.count)
    assert counts == [3, 3]  # one transfer; the tensor that came is then listed as whole numbers and as others


def test_what_is_fetched_at_once_is_what_each_tensor_holds(monkeypatch):
    tensors = [torch.tensor([2**53 + 1, -1]), torch.tensor(0.1), torch.tensor([math.nan, 1e-40]), torch.tensor(7)]
    for more in ([], [torch.tensor([0.1, 1e300], dtype=torch.float64)], [torch.tensor(2.5, dtype=torch.bfloat16)]):
        every = [*tensors, *more, torch.zeros(0), torch.zeros(0, dtype=torch.long)]
        plain, _ = reading.read(every)
        monkeypatch.setattr(reading, "synchronizes", lambda device: True)
        fetched, _ = reading.read(every)
        monkeypatch.undo()
        assert str(fetched) == str(plain)
        assert plain[0] == [2**53 + 1, -1]


# ---------------------------------------------------------------------- stationarity, errors


def test_a_certificate_stands_among_the_numbers():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1*": tr.L1(0.1), "fc2*": tr.L2(0.1)})
    x, y = batch()
    certificate = tr.stationarity(reg, lambda: (model(x) - y).square().mean())
    found = tr.measure(reg, stationarity=certificate)
    assert found["stationarity/total"] == certificate.total
    assert found["stationarity/relative"] == certificate.relative
    assert found["stationarity/unpenalized"] == certificate.unpenalized
    assert found["stationarity/term.fc1_"] == certificate.by_term["fc1*"]


def test_a_certificate_of_other_terms_is_refused():
    model = mlp()
    x, y = batch()
    certificate = tr.stationarity(tr.Regularizer(model, tr.L1(0.1)), lambda: (model(x) - y).square().mean())
    for target in (model, tr.Regularizer(model, tr.L2(0.1))):
        with pytest.raises(ValueError, match=r"of the terms \['l1'\].*; measure the regularizer that"):
            tr.measure(target, stationarity=certificate)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"near_zero": -1.0}, ValueError, "near_zero=-1.0"),
        ({"near_zero": "small"}, TypeError, "near_zero='small'"),
        ({"stationarity": 0.1}, TypeError, "torchreg.stationarity"),
    ],
)
def test_bad_arguments_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        tr.measure(mlp(), **arguments)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(TypeError, match="got Tensor"):
        tr.measure(torch.zeros(3))
    with pytest.raises(ValueError, match="no weight of two or more dimensions"):
        tr.measure(nn.LayerNorm(3))
    assert isinstance(MLP(), nn.Module)
