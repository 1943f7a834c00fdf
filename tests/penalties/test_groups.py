"""Groups: the geometry, the group soft threshold in a diagonal metric, and the group penalties in training."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.linear_model import MultiTaskLasso
from torch import nn

import torchreg as tr
from tests import cases, oracles
from tests.models import TORCH
from tests.oracles import to_numpy
from torchreg.penalties.functional import group_soft_threshold, soft_threshold
from torchreg.penalties.groups import GroupWeights

# ---------------------------------------------------------------------- geometry


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2), (3, 4, 2, 5)], ids=str)
def test_rows_and_columns_are_the_indices_of_the_first_two_dimensions(shape):
    w = cases.weights(shape)
    for groups, axis in [(tr.Rows(), 0), (tr.Columns(), 1)]:
        slices = [w.select(axis, i) for i in range(shape[axis])]
        assert groups.norms(w).flatten().tolist() == pytest.approx([float(g.norm()) for g in slices], rel=1e-14)
        assert groups.size(w) == slices[0].numel()
        assert groups.norms(w).shape == groups.shape(w)
        assert (w / groups.norms(w)).shape == shape


def test_the_norm_of_a_group_of_zeros_has_the_gradient_zero():
    w = torch.zeros(3, 2, requires_grad=True)
    tr.Rows().norms(w).sum().backward()
    assert torch.equal(w.grad, torch.zeros(3, 2))


@pytest.mark.parametrize("groups", [tr.Rows(), tr.Columns()], ids=repr)
def test_a_weight_of_fewer_than_two_dimensions_is_refused(groups):
    for shape in [(), (3,)]:
        for use in (groups.norms, tr.GroupLasso(0.1, groups), tr.SparseGroupLasso(0.1, 0.1, groups).check):
            with pytest.raises(
                ValueError, match=r"needs a weight with two or more dimensions, got shape \(.*such as L1$"
            ):
                use(torch.ones(shape))


def test_a_regularizer_refuses_it_when_it_is_built_and_names_the_parameter():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(
        ValueError, match=r"^1\.bias: Columns\(\) needs a weight with two or more dim.*shape \(2,\); lea"
    ):
        tr.Regularizer(model, tr.GroupLasso(0.1, tr.Columns()), include=["0.weight", "1.bias"])
    with pytest.raises(
        ValueError, match=r"^0\.weight: group_weights has 2 entries, and a weight of shape \(3, 4\) has 3 gr"
    ):
        tr.Regularizer(model, tr.GroupLasso(0.1, group_weights=[1.0, 2.0]))
    assert tr.Regularizer(model, tr.GroupLasso(0.1))().item() > 0


def test_it_refuses_a_lazy_parameter_once_that_has_its_shape():
    model = nn.LazyLinear(3)
    reg = tr.Regularizer(model, tr.GroupLasso(0.1, tr.Columns(), [1.0, 1.0]))
    model(torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"^weight: group_weights has 2 entries"):
        reg()


# ---------------------------------------------------------------------- the prox in a diagonal metric

SPREADS = [0, 2, 4, 8]
MARGINS = [-0.5, -1e-3, 1e-3, 0.1, 10.0, 1e4]


def spread_problems(dtype, spread, margin, seed):
    """Weights and steps that spread over 10^spread within a group, all scales holding on to the group alike.

    ‖w/step‖ of each group is 1 + margin: just dead, just alive, or far from it.
    """
    generator = torch.Generator().manual_seed(seed)
    step = 10 ** (-spread * torch.rand(20, 30, generator=generator, dtype=torch.float64))
    power = torch.linspace(-0.5, 1.5, 20, dtype=torch.float64)[:, None]  # w ∝ step: every scale counts at the threshold
    w = torch.randn(20, 30, generator=generator, dtype=torch.float64) * step**power
    w = w * (1 + margin) / torch.linalg.vector_norm(w / step, dim=1, keepdim=True)
    return w.to(dtype), step.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("margin", MARGINS)
def test_the_root_is_where_bisection_finds_it_at_every_spread_of_the_metric(spread, margin, dtype):
    w, step = spread_problems(dtype, spread, margin, seed=spread)
    oracle = oracles.Grouped(0.0, 1.0, weights=(1.0,) * 20)
    exact = torch.from_numpy(oracle.prox(to_numpy(w), to_numpy(step)))
    for scale in (1.0, 1e-24, 1e24):  # their squares are beyond float32
        p = group_soft_threshold(w * scale, step * scale, dim=1)
        error = (p.double() / scale - exact).abs()
        assert (error <= 16 * torch.finfo(dtype).eps * torch.linalg.vector_norm(w.double(), dim=1, keepdim=True)).all()
        # The prox is nonexpansive in its own metric: rounding errors of w are all that it may pass on.
        metric = torch.linalg.vector_norm(error / step.double().sqrt(), dim=1)
        size = torch.linalg.vector_norm(w.double() / step.double().sqrt(), dim=1)
        assert (metric <= 16 * torch.finfo(dtype).eps * size).all()
        assert ((p == 0).all(1)).tolist() == [margin < 0] * 20


# Found by search: scale after scale lets go of the group. Ten steps of Newton alone miss the second's root by 2e-4.
HARD = [
    ([0.1332836792, 6.6448e-07, 1.919250641e-4], [6.712306e-3, 7.965052e-6, 1.0]),
    (
        [1.0000818541320641e-08, 0.0009518256485207598, 0.9986835406281396],
        [1e-08, 0.04083703944592312, 0.998684025905552],
    ),
    ([0.9380177527030569, 5.9283054561566975e-08], [1.0, 1e-08]),
    ([5.982405735911072e-08, 3.1261983373719885e-07, 0.9379456917113647], [1e-08, 2.6823478594004377e-05, 1.0]),
    ([0.876970140530407, 5.018250637759507e-08], [0.9355841617057464, 1e-08]),
]


@pytest.mark.parametrize(("w", "step"), HARD)
def test_a_metric_that_is_hard_for_newton_is_solved_to_full_precision(w, step):
    w, step = torch.tensor([w], dtype=torch.float64), torch.tensor([step], dtype=torch.float64)
    exact = oracles.Grouped(0.0, 1.0, weights=(1.0,)).prox(w.numpy(), step.numpy())
    error = group_soft_threshold(w, step, dim=1).numpy() - exact
    assert exact.any()
    assert np.abs(error).max() <= 4e-16 * np.linalg.norm(w)


def test_a_metric_that_is_one_number_a_group_has_the_closed_form_s_result():
    w = cases.weights((6, 5))
    for threshold in (0.7, torch.tensor(0.7), torch.linspace(0, 3, 6)[:, None]):
        closed = group_soft_threshold(w, threshold, dim=1)
        spread = torch.as_tensor(threshold).expand(6, 5).contiguous().double()
        torch.testing.assert_close(group_soft_threshold(w, spread, dim=1), closed, rtol=1e-6, atol=1e-14)


def test_groups_of_one_entry_have_the_soft_threshold():
    w = cases.weights((40, 1))
    steps = torch.linspace(0, 2, 40, dtype=torch.float64)
    for dim, x in [(1, w), ((0, 2), w.reshape(1, 40, 1))]:
        expected = soft_threshold(x, steps.reshape(x.shape))
        torch.testing.assert_close(
            group_soft_threshold(x, steps.reshape(x.shape), dim), expected, rtol=1e-14, atol=1e-15
        )
    pairs = torch.cat([w, torch.zeros_like(w)], 1)  # the same, by the root
    thresholds = torch.stack([steps, steps + 1], 1)
    expected = soft_threshold(w[:, 0], steps)
    torch.testing.assert_close(group_soft_threshold(pairs, thresholds, 1)[:, 0], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
def test_a_group_is_zero_up_to_its_threshold_and_alive_beyond_it(dtype):
    w = cases.weights((7, 11), dtype)
    w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
    step = 0.5 + cases.weights((7, 11), seed=1).abs().to(w.real.dtype)
    eps = torch.finfo(dtype).eps
    binding = torch.linalg.vector_norm(w / step, dim=1, keepdim=True)
    for threshold in (torch.ones(7, 1, dtype=w.real.dtype), step * binding):
        assert (group_soft_threshold(w, threshold * (1 + 8 * eps), 1) == 0).all()
        assert (group_soft_threshold(w, threshold * (1 - 8 * eps), 1) != 0).any(1).all()


def test_an_entry_without_a_step_is_not_moved_and_keeps_its_group_alive():
    w, step = torch.tensor([[1e-3, 5.0, -5.0]]), torch.tensor([[0.0, 1e9, 1e4]])
    p = tr.GroupLasso(1.0).prox(w, step)
    assert p[0, 0] == w[0, 0]
    assert (p != 0).all()
    assert (p.abs() <= w.abs()).all()
    w[0, 0] = 0.0  # nothing there to hold on to
    assert (tr.GroupLasso(1.0).prox(w, step) == 0).all()


def test_dead_groups_live_groups_and_groups_without_steps_do_not_disturb_each_other():
    w, step = cases.weights((6, 5)), 0.1 + cases.weights((6, 5), seed=1).abs()
    w[1], step[2], w[3], step[3] = 0.0, 0.0, 0.0, 0.0
    step[4] = torch.inf
    w[5, 1] = math.nan
    p = group_soft_threshold(w, step, dim=1)
    assert torch.equal(p[[1, 3, 4]], torch.zeros(3, 5, dtype=torch.float64))
    assert torch.equal(p[2], w[2] + 0.0)
    assert p[5].isnan().all()
    assert torch.equal(p[0], group_soft_threshold(w[:1], step[:1], dim=1)[0])


@pytest.mark.parametrize("penalty", [tr.GroupLasso(0.5), tr.SparseGroupLasso(0.2, 0.3)], ids=repr)
def test_the_prox_has_the_derivatives_of_its_differences(penalty):
    w, step = cases.weights((4, 5)) + 0.3, 0.1 + cases.weights((4, 5), seed=1).abs()
    w[1] = 1e-2  # dead
    w[2], step[2, 0] = 2.0, 1e-3
    for s in (torch.tensor(0.7, dtype=torch.float64), step):
        assert (penalty.prox(w, s)[1] == 0).all()
        assert (penalty.prox(w, s)[[0, 2, 3]] != 0).any(1).all()
        assert torch.autograd.gradcheck(penalty.prox, (w.requires_grad_(), s.requires_grad_()))
        w, s = w.detach(), s.detach()


def test_squares_beyond_the_range_of_float32_do_no_harm():
    w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    for scale in (1e-30, 1e30):
        for threshold in (torch.tensor(1.0), torch.ones(2, 2)):
            p = group_soft_threshold(w * scale, threshold * scale, dim=1) / scale
            torch.testing.assert_close(p, torch.tensor([[2.4, 3.2], [0.0, 0.0]]))


def test_a_derivative_at_a_group_of_zeros_without_a_step_is_finite():
    w, step = (
        torch.zeros(2, 3, requires_grad=True),
        torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]], requires_grad=True),
    )
    tr.GroupLasso(0.5).prox(w, step).sum().backward()
    assert w.grad.isfinite().all()
    assert step.grad.isfinite().all()


@pytest.mark.skipif(TORCH < (2, 9), reason="torch 2.8 and older make several graphs of group weights")
def test_the_prox_compiles_into_one_graph():
    penalty = tr.SparseGroupLasso(0.1, 0.2, group_weights=[1.0, 2.0, 3.0])
    w, steps = cases.weights((3, 4)), 0.1 + cases.weights((3, 4), seed=1).abs()
    compiled = torch.compile(lambda w, step: penalty.prox_(w, step), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(w.clone(), steps), penalty.prox(w, steps))


# ---------------------------------------------------------------------- the weights of the groups

WEIGHTS = (0.0, 1.0, 2.5)


@pytest.mark.parametrize(
    "given", [WEIGHTS, list(WEIGHTS), torch.tensor(WEIGHTS), np.array(WEIGHTS)], ids=lambda x: type(x).__name__
)
def test_each_group_has_its_own_weight(given):
    w, steps = cases.weights((3, 4)), 0.1 + cases.weights((3, 4), seed=1).abs()
    for groups, axis, x, s in [(tr.Rows(), 0, w, steps), (tr.Columns(), 1, w.T, steps.T)]:
        oracle = oracles.Grouped(0.2, 0.3, axis, WEIGHTS)
        penalty = tr.SparseGroupLasso(0.2, 0.3, groups, given)
        assert penalty(x).item() == pytest.approx(oracle.value(x.numpy()), rel=1e-14)
        for step in (0.7, s):
            exact = oracle.prox(x.numpy(), step if isinstance(step, float) else step.numpy())
            np.testing.assert_allclose(penalty.prox(x, step).numpy(), exact, rtol=0, atol=1e-14)


def test_penalties_with_group_weights_are_values():
    penalty = tr.GroupLasso(0.5, group_weights=torch.tensor(WEIGHTS))
    penalty(torch.ones(3, 2))
    twin = tr.GroupLasso(0.5, group_weights=WEIGHTS)
    assert penalty == twin
    assert hash(penalty) == hash(twin)
    assert penalty != tr.GroupLasso(0.5)
    assert eval(repr(penalty), vars(tr)) == penalty
    for copied in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty)), penalty.scaled(1.0)):
        assert copied == penalty
        assert copied(torch.ones(3, 2)) == penalty(torch.ones(3, 2))


def test_their_tensor_is_made_once_and_can_meet_autograd():
    penalty, w = tr.GroupLasso(0.5, group_weights=WEIGHTS), torch.ones(3, 2, requires_grad=True)
    with torch.inference_mode():
        penalty(w)
    penalty(w).backward()
    held = penalty.group_weights.on(w, tr.Rows())
    assert penalty.scaled(0.5).group_weights.on(w, tr.Rows()).data_ptr() == held.data_ptr()
    assert penalty(w.double()).dtype == torch.float64


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_a_group_weight_that_is_negative_or_not_finite_is_refused(bad):
    for given in ([1.0, bad], torch.tensor([1.0, bad])):
        with pytest.raises(
            ValueError, match=rf"^group_weights\[1\]={bad} must be finite and at least 0; give one factor"
        ):
            tr.GroupLasso(0.1, group_weights=given)


@pytest.mark.parametrize("bad", [3.0, "12", 1])
def test_group_weights_that_are_no_sequence_are_refused(bad):
    with pytest.raises(
        TypeError, match=rf"^group_weights={bad!r} is a {type(bad).__name__}; give one number per group, as a"
    ):
        tr.GroupLasso(0.1, group_weights=bad)


@pytest.mark.parametrize("bad", [tr.Rows, "rows", None, 0], ids=repr)
def test_groups_that_are_no_geometry_are_refused(bad):
    with pytest.raises(TypeError, match=r"^expected groups=Rows\(\) or groups=Columns\(\), got groups="):
        tr.SparseGroupLasso(0.1, 0.1, groups=bad)


def test_a_weight_with_another_number_of_groups_is_refused():
    penalty = tr.GroupLasso(0.1, tr.Columns(), [1.0, 2.0])
    for use in (penalty, penalty.check, lambda w: penalty.prox(w, 0.1)):
        with pytest.raises(
            ValueError, match=r"has 2 entries, and a weight of shape \(2, 3\) has 3 groups in Columns\(\); g"
        ):
            use(torch.ones(2, 3))


def test_group_weights_are_equal_by_value():
    assert GroupWeights(WEIGHTS) == GroupWeights(torch.tensor(WEIGHTS)) == WEIGHTS


# ---------------------------------------------------------------------- certificates

every_penalty = pytest.mark.parametrize(
    ("penalty", "oracle"),
    [
        (tr.GroupLasso(0.5), oracles.Grouped(0.0, 0.5)),
        (tr.GroupLasso(0.5, tr.Columns(), range(5)), oracles.Grouped(0.0, 0.5, 1, (0.0, 1.0, 2.0, 3.0, 4.0))),
        (tr.SparseGroupLasso(0.2, 0.3), oracles.Grouped(0.2, 0.3)),
        (tr.SparseGroupLasso(0.2, 1e-7), oracles.Grouped(0.2, 1e-7)),
        (tr.SparseGroupLasso(1e-7, 0.3), oracles.Grouped(1e-7, 0.3)),
        (tr.SparseGroupLasso(0.2, 0.0, tr.Columns()), oracles.Grouped(0.2, 0.0, 1)),
        (tr.SparseGroupLasso(0.0, 0.3, tr.Columns()), oracles.Grouped(0.0, 0.3, 1)),
        (
            tr.SparseGroupLasso(0.2, 0.3, group_weights=[0.0, 1.0, 2.0, 3.0]),
            oracles.Grouped(0.2, 0.3, weights=(0.0, 1.0, 2.0, 3.0)),
        ),
    ],
    ids=lambda x: repr(x) if isinstance(x, tr.Penalty) else "",
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@every_penalty
def test_the_subgradient_is_the_nearest_to_the_negative_gradient(penalty, oracle, dtype):
    w = cases.weights((4, 5), dtype)
    w[1], w[:, 2] = 0.0, 0.0
    h = 1e-9
    for size in (0.0, 0.1, 0.5, 1.0, 10.0):
        gradient = size * cases.weights((4, 5), dtype, seed=1)
        # As its step h goes to 0, a proximal gradient step is h times the shortest subgradient of loss + penalty.
        shortest = (w.numpy() - oracle.prox(w.numpy() - h * gradient.numpy(), h)) / h
        found = gradient + penalty.nearest_subgradient(w, gradient)
        np.testing.assert_allclose(found.numpy(), shortest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@every_penalty
def test_the_dual_norm_is_the_least_factor_of_the_penalty_that_holds_all_at_zero(penalty, oracle, dtype):
    for size, seed in [(1e-6, 1), (1.0, 2), (1e6, 3)]:
        gradient = size * cases.weights((4, 5), dtype, seed=seed)
        if 0.0 in (oracle.weights or ()) and oracle.l1 == 0:
            assert penalty.dual_norm(gradient) == math.inf  # nothing holds the group without a weight
            gradient.select(oracle.axis, 0).zero_()
        factor = penalty.dual_norm(gradient)
        assert factor.shape == ()
        for nudge in (1 - 1e-12, 1 + 1e-12):
            c = factor.item() * nudge
            scaled = oracles.Grouped(c * oracle.l1, c * oracle.group, oracle.axis, oracle.weights)
            assert scaled.prox(gradient.numpy(), 1.0).any() != (nudge > 1)
            assert (penalty.conjugate(gradient / c) == 0) == (nudge > 1)
            assert penalty.conjugate(gradient / c) in (0.0, math.inf)


def test_the_dual_norm_sees_the_largest_of_a_thousand_entries_that_are_almost_equal():
    gradient = 1 + 1e-6 * torch.rand(1, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for l1, group in [(1.0, 1e-6), (1.0, 1e-2), (1e-3, 1.0)]:
        c = tr.SparseGroupLasso(l1, group, group_weights=[1.0]).dual_norm(gradient).item()
        for nudge in (1 - 1e-14, 1 + 1e-14):
            scaled = oracles.Grouped(c * nudge * l1, c * nudge * group, weights=(1.0,))
            assert scaled.prox(gradient.numpy(), 1.0).any() == (nudge < 1)


@pytest.mark.parametrize("kind", [tr.GroupLasso, lambda s: tr.SparseGroupLasso(s, s)], ids=["group", "sparse group"])
def test_the_dual_norm_of_nothing_is_zero_and_without_a_penalty_infinite(kind):
    for strength, shape in [(0.0, (2, 3)), (0.5, (2, 3)), (0.0, (0, 3)), (0.5, (0, 3)), (0.5, (2, 0))]:
        assert kind(strength).dual_norm(torch.zeros(shape)) == 0
        assert kind(strength).conjugate(torch.zeros(shape)) == 0
    assert kind(0.0).dual_norm(torch.tensor([[0.0, 1e-9]])) == math.inf
    assert kind(0.0).conjugate(torch.tensor([[0.0, 1e-9]])) == math.inf


@every_penalty
def test_the_conjugate_and_the_value_meet_at_a_subgradient(penalty, oracle):
    w = cases.weights((4, 5))
    v = penalty.nearest_subgradient(w, torch.zeros(4, 5, dtype=torch.float64)) * (1 - 1e-12)
    assert penalty.conjugate(v) == 0
    assert penalty(w).item() == pytest.approx((v * w).sum().item(), rel=1e-11)


# ---------------------------------------------------------------------- training


def tasks():
    """Four targets on the diabetes data that share some of its ten features; and the loss's gradient."""
    x, y = oracles.diabetes()
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(10, 3, generator=generator, dtype=torch.float64) * (torch.arange(10) % 3 == 0)[:, None]
    y = torch.cat([y[:, None] / y.std(), x @ mix + torch.randn(len(y), 3, generator=generator, dtype=torch.float64)], 1)
    y = y - y.mean(0)
    gram, target = x.T @ x / len(y), y.T @ x / len(y)
    return x, y, lambda w: w @ gram - target


def train(penalty, make, gradient, steps=500):
    """A linear model of the tasks trained with the gradient of ½·Σ squares/n."""
    model = nn.Linear(10, 4, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 0.3)
    optimizer = make(model.parameters(), regularizer=tr.Regularizer(model, penalty))
    for _ in range(steps):
        model.weight.grad = gradient(model.weight.detach())
        optimizer.step()
    return model.weight.detach()


def prox_sgd(params, **kwargs):
    return tr.optim.ProxSGD(params, lr=0.1, momentum=0.9, **kwargs)


def prox_adam(params, **kwargs):
    return tr.optim.ProxAdam(params, lr=0.1, **kwargs)


every_optimizer = pytest.mark.parametrize("make", [prox_sgd, prox_adam])


@every_optimizer
def test_the_group_lasso_of_columns_is_scikit_learn_s_multi_task_lasso(make):
    alpha = 0.4
    x, y, gradient = tasks()
    solver = MultiTaskLasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
    solution = torch.from_numpy(solver.coef_)
    w = train(tr.GroupLasso(alpha, tr.Columns(), group_weights=[1.0] * 10), make, gradient)

    def objective(w):
        return 0.5 * (x @ w.T - y).square().sum() / len(y) + alpha * torch.linalg.vector_norm(w, dim=0).sum()

    support = (solution != 0).any(0)
    assert 2 <= support.sum() <= 8
    assert torch.equal((w != 0).any(0), support)
    assert abs(objective(w) / objective(solution) - 1) <= 1e-12
    torch.testing.assert_close(w, solution, rtol=0, atol=1e-6)


@every_optimizer
@pytest.mark.parametrize(
    ("penalty", "oracle"),
    [
        (tr.GroupLasso(0.4), oracles.Grouped(0.0, 0.4)),
        (tr.SparseGroupLasso(0.1, 0.05, tr.Columns()), oracles.Grouped(0.1, 0.05, 1)),
        (tr.SparseGroupLasso(0.1, 0.35), oracles.Grouped(0.1, 0.35)),
    ],
    ids=lambda x: repr(x) if isinstance(x, tr.Penalty) else "",
)
def test_training_rests_where_a_proximal_gradient_step_of_any_size_rests(penalty, oracle, make):
    _, _, gradient = tasks()
    w = train(penalty, make, gradient)
    for step in (0.01, 1.0, 100.0):
        moved = oracle.prox((w - step * gradient(w)).numpy(), step)
        np.testing.assert_allclose(moved, w.numpy(), rtol=0, atol=1e-9 * max(step, 1))
        np.testing.assert_array_equal(moved == 0, w.numpy() == 0)
    assert ((w == 0).all(1 - oracle.axis)).any()
    assert (w != 0).any()


@every_optimizer
def test_a_dead_group_revives_when_the_data_ask_for_it(make):
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    reg = tr.Regularizer(model, tr.GroupLasso(0.1))
    optimizer = make(model.parameters(), regularizer=reg)
    target = torch.tensor([[1.0, 1.0, 1.0], [0.05, 0.05, 0.05]], dtype=torch.float64)
    for goal in (torch.zeros_like(target), target):
        for _ in range(200):
            model.weight.grad = model.weight.detach() - goal
            optimizer.step()
        assert (model.weight != 0).any(1).tolist() == [bool(goal.any()), False]  # ‖target‖ is above λ√3, and below it
    torch.testing.assert_close(model.weight[0].detach(), torch.full((3,), 0.9, dtype=torch.float64), rtol=0, atol=1e-4)


def test_toward_lets_whole_groups_stay_at_their_pretrained_value():
    model = nn.Linear(3, 2, bias=False)
    start = copy.deepcopy(model.state_dict())
    reg = tr.Regularizer(model, tr.GroupLasso(0.1), toward=start)
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.01, regularizer=reg)
    pull = torch.tensor([[1.0, 1.0, 1.0], [0.05, 0.05, 0.05]])
    for _ in range(200):
        model.weight.grad = model.weight.detach() - start["weight"] - pull
        optimizer.step()
    assert torch.equal(model.weight[1], start["weight"][1])
    assert (model.weight[0] != start["weight"][0]).all()
