"""The value of a penalty, and what every penalty object promises."""

import copy
import dataclasses
import inspect
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn import linear_model
from torch import nn

import torchreg
from tests import cases
from tests.cases import every_case, every_dtype, every_plain_case
from tests.oracles import diabetes
from torchreg import L1, L2, ElasticNet, GroupLasso, Penalty, SparseGroupLasso
from torchreg.penalties.toward import Toward

# ---------------------------------------------------------------------- the list of cases


def test_every_penalty_has_its_rows():
    missing = cases.lacking(cases.concrete_penalties(), cases.CASES)
    assert not missing, f"{', '.join(missing)}: add rows to tests/cases.py, with a strength of 0 and with another"


def test_the_completeness_test_names_the_class_that_lacks_a_row():
    kinds = cases.concrete_penalties()
    assert {L1, L2, ElasticNet, GroupLasso, SparseGroupLasso, Toward} <= set(kinds)
    assert cases.lacking(kinds, [case for case in cases.CASES if case.kind is not L1]) == ["L1"]
    nonzero = [case for case in cases.CASES if not (case.kind is Toward and case.penalty.is_zero)]
    assert cases.lacking(kinds, nonzero) == ["Toward"]


# ---------------------------------------------------------------------- values


@every_dtype
@every_case
def test_value_is_the_exact_sum(case, dtype):
    for shape in case.shapes:
        w = cases.weights(shape, dtype)
        value = case.on(w)(w)
        assert value.shape == ()
        assert value.dtype == (torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32)
        # A dozen roundings in a term and one for each term of the sum, all of them positive.
        tolerance = (12 + w.numel()) * torch.finfo(value.dtype).eps
        # Moved weights are differences: the rounding of |w| + |anchor| enters with Ω's slope, at most 300 here.
        cancelled = 300 * tolerance * float(case.size(w).sum()) if case.anchored else 0.0
        assert value.item() == pytest.approx(case.value(w), rel=tolerance, abs=cancelled)


@every_case
def test_value_does_not_depend_on_strides(case):
    for shape in case.shapes:
        w = cases.weights(shape)
        for other in cases.layouts(w):
            assert case.on(w)(other).item() == pytest.approx(case.on(w)(w).item(), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("penalty", "power"), [(L1(0.5), 1), (L2(0.5), 2), (ElasticNet(0.5, 0.0), 1)], ids=["l1", "l2", "net"]
)
def test_two_million_half_precision_weights_neither_overflow_nor_stall(penalty, power, dtype):
    w = torch.full((2_000_000,), 0.1, dtype=dtype)
    exact = Fraction(1, 2) * 2_000_000 * Fraction(w[0].item()) ** power
    assert penalty(w).item() == pytest.approx(float(exact), rel=1e-5)


@every_case
def test_nan_weights_give_a_nan_value(case):
    w = case.shaped(torch.tensor([1.0, math.nan]))
    assert math.isnan(case.on(w)(w).item()) or case.penalty.is_zero


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.penalty.separable], ids=str)
def test_a_separable_value_is_the_sum_over_single_weights(case):
    w = cases.weights((6,))
    penalty = case.on(w)
    assert penalty.separable
    anchors = case.anchor(w)
    parts = [Toward(case.penalty, a)(x) if case.anchored else penalty(x) for x, a in zip(w, anchors, strict=True)]
    assert penalty(w).item() == pytest.approx(math.fsum(part.item() for part in parts), rel=1e-14)


@pytest.mark.parametrize("case", [case for case in cases.PLAIN if not case.penalty.separable], ids=str)
def test_the_value_of_a_group_penalty_is_the_sum_over_its_groups(case):
    w = cases.weights((4, 3, 2))
    slices = w.split(1, case.oracle.axis)
    assert case.penalty(w).item() == pytest.approx(math.fsum(case.penalty(g).item() for g in slices), rel=1e-14)


# ---------------------------------------------------------------------- gradients


def off_the_kink(case, dtype, shape=(2, 3)):
    """Weights at least 0.1 away from the minimum, where every penalty here is differentiable."""
    signs = torch.where(torch.arange(math.prod(shape)).reshape(shape) % 2 == 0, 1.0, -1.0)
    distance = 0.1 + cases.weights(shape).abs().clamp(max=2)
    w = case.anchor(torch.zeros(shape, dtype=dtype)) + (signs * distance).to(dtype)
    return (w * (0.6 + 0.8j) if dtype.is_complex and not case.anchored else w).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@every_case
def test_gradient_is_that_of_the_value(case, dtype):
    for shape in filter(case.oracle.takes, [(), (0,), (0, 3), (2, 3)]):
        w = off_the_kink(case, dtype, shape)
        assert torch.autograd.gradcheck(case.on(w.detach()), (w,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("case", [case for case in cases.CASES if case.penalty.smooth], ids=str)
def test_smooth_penalties_have_second_derivatives_at_their_minimum_too(case, dtype):
    w = off_the_kink(case, dtype).detach()
    w[0] = case.anchor(w)[0]
    assert torch.autograd.gradcheck(case.on(w), (w.requires_grad_(),))
    assert torch.autograd.gradgradcheck(case.on(w.detach()), (w,))


@every_case
def test_gradient_at_the_minimum_is_zero_and_of_the_weights_dtype(case):
    for dtype in cases.DTYPES:
        w = case.anchor(torch.zeros(2, 3, dtype=dtype)).requires_grad_()
        case.on(w.detach())(w).backward()
        assert w.grad.dtype == dtype
        assert torch.equal(w.grad, torch.zeros_like(w)), dtype


@every_case
def test_smooth_says_whether_the_minimum_is_a_kink(case):
    w = case.shaped(torch.zeros(3, dtype=torch.float64))
    penalty, minimum, h = case.on(w), case.anchor(w), 1e-6
    slope = (penalty(minimum + h) / h).item()
    # A smooth Ω is of order h² beside its minimum; a kink has slope λ₁ there (none of the cases' λ₁ is below 0.1).
    assert slope < 1e-4 if penalty.smooth else slope > 0.1 or not case.oracle.is_kinked


# ---------------------------------------------------------------------- penalties as objects


@every_case
def test_is_zero_says_that_the_value_is_zero_everywhere(case):
    w = case.weights(5) + 10
    assert case.on(w).is_zero == (case.value(w) == 0)


@every_case
def test_scaled_multiplies_the_value_and_leaves_the_original(case):
    w = case.weights(5)
    penalty = case.on(w)
    before = penalty(w)
    if penalty.convex:
        assert penalty.scaled(2.5)(w).item() == pytest.approx(2.5 * case.value(w), rel=1e-12)
    else:  # λ may set the width too: near 0 it multiplies all the same
        near = case.anchor(w) + 1e-8 * (w - case.anchor(w))
        assert penalty.scaled(2.5)(near).item() == pytest.approx(2.5 * penalty(near).item(), rel=1e-5)
    assert penalty.scaled(0.0).is_zero
    assert type(penalty.scaled(2.5)) is type(penalty)
    assert torch.equal(penalty(w), before)


def test_scaled_by_a_negative_factor_is_refused():
    with pytest.raises(ValueError, match=r"strength=-0\.5 must be finite and at least 0"):
        L1(0.5).scaled(-1)


@every_case
def test_penalties_are_immutable(case):
    penalty = case.on(torch.zeros(3))
    for field in dataclasses.fields(penalty):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(penalty, field.name, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        penalty.brand_new = 1.0


def test_penalties_are_equal_by_class_and_strength():
    assert L1(0.5) == L1(0.5)
    assert hash(L1(0.5)) == hash(L1(0.5))
    assert len({L1(0.5), L1(0.25), L2(0.5), ElasticNet(0.5, 0), ElasticNet(0, 0.5), L1(0.5)}) == 5


@every_case
def test_penalties_survive_pickle_and_deepcopy(case):
    w = case.weights(5)
    penalty = case.on(w)
    for twin in (pickle.loads(pickle.dumps(penalty)), copy.deepcopy(penalty)):
        assert twin(w).item() == penalty(w).item()
        if case not in (*cases.TOWARD, *cases.WEIGHTED) and not case.anchored:
            assert twin == penalty


@every_plain_case
def test_repr_evaluates_to_an_equal_penalty_also_in_a_list(case):
    assert eval(repr([case.penalty]), vars(torchreg)) == [case.penalty]


def test_repr_of_a_moved_penalty_gives_the_penalty_and_its_anchor():
    assert (
        repr(Toward(L1(0.5), torch.tensor([1.0, 2.0]))) == "Toward(penalty=L1(strength=0.5), anchor=tensor([1., 2.]))"
    )


@pytest.mark.parametrize("kind", cases.concrete_penalties(), ids=lambda kind: kind.__name__)
def test_docstring_opens_with_the_formula(kind):
    assert inspect.getdoc(kind).splitlines()[0] == f"{kind.formula}."


@pytest.mark.parametrize("number", [1, np.float32(1), np.float64(1), np.int64(1), Fraction(1)], ids=repr)
def test_any_real_number_is_a_strength_and_becomes_a_float(number):
    assert type(L1(number).strength) is float
    assert L1(number) == L1(1.0)


# ---------------------------------------------------------------------- other people's conventions


def test_from_weight_decay_is_what_sgd_does():
    decayed = nn.Linear(4, 3, dtype=torch.float64)
    penalized = copy.deepcopy(decayed)
    x = cases.weights((8, 4))
    stock = torch.optim.SGD(decayed.parameters(), lr=0.1, weight_decay=0.3)
    plain = torch.optim.SGD(penalized.parameters(), lr=0.1)
    penalty = L2.from_weight_decay(0.3)
    decayed(x).square().mean().backward()
    (penalized(x).square().mean() + sum(penalty(p) for p in penalized.parameters())).backward()
    stock.step()
    plain.step()
    for a, b in zip(decayed.parameters(), penalized.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)  # the same sum in another order


def test_from_ratio_divides_the_strength():
    assert ElasticNet.from_ratio(2.0, l1_ratio=0.25) == ElasticNet(l1=0.5, l2=1.5)
    assert ElasticNet.from_ratio(2.0, l1_ratio=1) == ElasticNet(l1=2.0, l2=0.0)
    assert ElasticNet.from_ratio(2.0, l1_ratio=0) == ElasticNet(l1=0.0, l2=2.0)


def gradient_of_mse(coefficients, factor):
    x, y = diabetes()
    w = torch.from_numpy(coefficients).requires_grad_()
    (factor * nn.MSELoss()(x @ w, y)).backward()
    return w.detach(), w.grad


@pytest.mark.parametrize(("factor", "double"), [(0.5, 1), (1.0, 2)], ids=["half MSE", "nn.MSELoss, alpha doubled"])
@pytest.mark.parametrize("l1_ratio", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_from_sklearn_has_its_minimum_where_scikit_learn_finds_it(alpha, l1_ratio, factor, double):
    x, y = diabetes()
    solver = linear_model.ElasticNet(alpha=alpha, l1_ratio=l1_ratio, fit_intercept=False, tol=1e-12, max_iter=100_000)
    w, gradient = gradient_of_mse(solver.fit(x.numpy(), y.numpy()).coef_, factor)
    penalty = ElasticNet.from_sklearn(double * alpha, l1_ratio)
    active = w != 0
    assert active.sum() >= 4
    slope = gradient + penalty.l1 * w.sign() + 2 * penalty.l2 * w
    # The target is about 77 wide: its scale times the solver's tolerance 1e-12 leaves 1e-5 of the slopes, near 1.
    assert slope[active].abs().max() < 1e-5
    assert (gradient[~active].abs() <= penalty.l1 + 1e-5).all()


def test_from_sklearn_has_the_default_ratio_of_scikit_learn():
    assert ElasticNet.from_sklearn(1.0) == ElasticNet.from_sklearn(1.0, linear_model.ElasticNet().l1_ratio)


@pytest.mark.parametrize("alpha", [0.5, 50.0])
def test_ridge_is_l2_of_alpha_over_n_with_mse_loss(alpha):
    x, y = diabetes()
    solver = linear_model.Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy())
    w, gradient = gradient_of_mse(solver.coef_, 1.0)
    w.requires_grad_()
    L2(alpha / len(y))(w).backward()
    # Direct solver: what is left is rounding of sums over 442 rows with entries near 1e2.
    torch.testing.assert_close(-w.grad, gradient, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------- errors: value, reason, next move

NUMBERS = [
    ("L1", L1, "strength", r"write L1\(strength=1e-4\)"),
    ("L2", L2, "strength", r"write L2\(strength=1e-4\)"),
    ("l1", lambda x: ElasticNet(x, 0.1), "l1", r"write ElasticNet\(l1=1e-4\)"),
    ("l2", lambda x: ElasticNet(0.1, x), "l2", r"write ElasticNet\(l2=1e-4\)"),
    ("decay", L2.from_weight_decay, "weight_decay", r"write L2\.from_weight_decay\(1e-4\)"),
    ("from_ratio", lambda x: ElasticNet.from_ratio(x, 0.5), "strength", r"write ElasticNet\.from_ratio\(1e-4, "),
    ("from_sklearn", ElasticNet.from_sklearn, "alpha", r"write ElasticNet\.from_sklearn\(0\.1, l1_ratio=0\.5\)"),
    ("ratio", lambda x: ElasticNet.from_ratio(0.1, x), "l1_ratio", "it is the share of L1, between 0 and 1"),
    (
        "ratio of sklearn",
        lambda x: ElasticNet.from_sklearn(0.1, x),
        "l1_ratio",
        "it is the share of L1, between 0 and 1",
    ),
]
every_number = pytest.mark.parametrize(
    ("make", "name", "move"), [row[1:] for row in NUMBERS], ids=[row[0] for row in NUMBERS]
)
NO_STRENGTHS = {r"-0\.1": -0.1, "inf": math.inf, "-inf": -math.inf, "nan": math.nan, "1000": 10**400}
NO_NUMBERS = {"True is a bool": True, "'0.1' is a str": "0.1", ".* is a Tensor": torch.tensor(0.1), "None is a": None}


@every_number
@pytest.mark.parametrize("shown", NO_STRENGTHS)
def test_a_number_that_is_no_strength_is_refused(make, name, move, shown):
    with pytest.raises(ValueError, match=f"^{name}={shown}.* must be finite and at least 0; {move}"):
        make(NO_STRENGTHS[shown])


@every_number
@pytest.mark.parametrize("shown", NO_NUMBERS)
def test_what_is_no_number_is_refused(make, name, move, shown):
    with pytest.raises(TypeError, match=f"^{name}={shown}.*, not a number; {move}"):
        make(NO_NUMBERS[shown])


@pytest.mark.parametrize("make", [ElasticNet.from_ratio, ElasticNet.from_sklearn])
def test_an_l1_ratio_above_one_is_refused(make):
    with pytest.raises(ValueError, match=r"^l1_ratio=1\.5 must be at most 1; it is the share of L1, between 0 and 1$"):
        make(0.1, 1.5)


every_penalty = pytest.mark.parametrize("penalty", [L1(0.1), L2(0.1), ElasticNet(0.1, 0.1)], ids=lambda p: p.name)


@every_penalty
def test_integer_weights_are_refused(penalty):
    for dtype in (torch.int64, torch.uint8, torch.bool):
        refusal = (
            rf"^{type(penalty).__name__} needs floating or complex weights, got {dtype}; convert them with \.float"
        )
        with pytest.raises(TypeError, match=refusal):
            penalty(torch.ones(3, dtype=dtype))


@every_penalty
def test_weights_that_are_no_tensor_are_refused(penalty):
    for w in ([1.0], 1.0, None, np.ones(3), nn.Linear(2, 2)):
        refusal = f"^{type(penalty).__name__} takes a tensor of weights, got {type(w).__name__}; for a model use Regula"
        with pytest.raises(TypeError, match=refusal):
            penalty(w)


def test_a_penalty_of_one_s_own_that_does_not_say_what_it_is_is_refused():
    class Nameless(Penalty):
        def value(self, w):
            return w.sum()

        def prox_map(self, w, step):
            return w

    refusal = "^Nameless does not declare name, formula, convex, separable; write them as class attributes"
    with pytest.raises(TypeError, match=refusal):
        Nameless()


def test_a_penalty_of_one_s_own_may_leave_out_what_most_penalties_say():
    assert (L1.strengths, L1.smooth, L1.linearizes) == (("strength",), False, False)
    assert not {"strengths", "smooth", "linearizes"} & vars(L1).keys()


@every_plain_case
def test_other_strengths_are_checked_numbers(case):
    names = case.penalty.strengths
    other = case.penalty.with_strengths(**dict.fromkeys(names, 2))
    assert {name: getattr(other, name) for name in names} == dict.fromkeys(names, 2.0)
    assert type(other) is type(case.penalty)
    with pytest.raises(ValueError, match=f"^{names[0]}=-1 must be finite and at least 0; write "):
        case.penalty.with_strengths(**{names[0]: -1})
    refusal = f"has no strength 'lam'; it has {', '.join(names)}$"
    for value in (1.0, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=refusal):
            case.penalty.with_strengths(lam=value)


@every_plain_case
def test_strengths_that_are_tensors_give_the_same_value_and_prox(case):
    w = case.weights(12)
    tensors = {name: torch.tensor(getattr(case.penalty, name)) for name in case.penalty.strengths}
    traced = case.penalty.with_strengths(**tensors)
    assert all(getattr(traced, name) is tensors[name] for name in tensors)
    torch.testing.assert_close(traced(w), case.penalty(w), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(traced.prox(w, 0.7), case.penalty.prox(w, 0.7), rtol=1e-6, atol=1e-6)


def test_some_of_the_strengths_may_be_tensors():
    mixed = ElasticNet(0.5, 0.25).with_strengths(l2=torch.tensor(2.0))
    assert mixed.l1 == 0.5
    assert mixed.l2.item() == 2.0


@pytest.mark.parametrize("strengths", [("lam",), "strength", ["strength"]], ids=repr)
def test_strengths_that_are_no_fields_are_refused(strengths):
    kind = type("Own", (L1,), {"strengths": strengths})
    with pytest.raises(TypeError, match=r"^Own\.strengths is .*, but must be a tuple of names of its fields \(str"):
        kind(0.1)
