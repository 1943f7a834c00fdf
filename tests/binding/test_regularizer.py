"""Regularizer: what is penalized, by how much, and that it stays true while the model changes."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import torchreg as tr
from tests.models import MLP, Halved, Lazy, Reads, array, batch, l1, l2, mlp, same, snapshot

NET = tr.ElasticNet(l1=1e-2, l2=1e-3)
lazy = pytest.mark.filterwarnings("ignore:Lazy modules")  # torch before 2.7 warns of each


def close(value: torch.Tensor, expected: float, rel: float = 2e-6) -> bool:
    return value.dim() == 0 and math.isclose(value.item(), expected, rel_tol=rel, abs_tol=1e-12)


def row(reg: tr.Regularizer, name: str) -> str:
    """The line of `explain()` on the parameter `name`."""
    (line,) = [line for line in reg.explain().splitlines() if line.split(" ")[0] == name]
    return line


def is_fc(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    return name.startswith("fc") and name.endswith("weight")


# ---------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize(
    ("penalty", "value"),
    [
        (tr.L1(1e-2), lambda w: 1e-2 * l1(w)),
        (tr.L2(1e-3), lambda w: 1e-3 * l2(w)),
        (NET, lambda w: 1e-2 * l1(w) + 1e-3 * l2(w)),
        (tr.L1(0.0), lambda w: 0.0),
    ],
)
def test_a_lone_penalty_sums_over_the_weights_and_nothing_else(penalty, value):
    model = mlp()
    reg = tr.Regularizer(model, penalty)
    assert [name for name, _ in reg.named_parameters()] == ["fc1.weight", "fc2.weight"]
    assert close(reg(), value(model.fc1.weight) + value(model.fc2.weight))


def test_the_total_is_the_sum_of_its_components_and_each_is_its_own_formula():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": NET, "*.weight": tr.L2(0.5), "norm.*": tr.L1(0.1), "fc1.bias": None})
    components = reg.components()
    expected = {
        "fc1.weight": 1e-2 * l1(model.fc1.weight) + 1e-3 * l2(model.fc1.weight),
        "*.weight": 0.5 * l2(model.fc2.weight),
        "norm.*": 0.1 * (l1(model.norm.weight) + l1(model.norm.bias)),
    }
    assert list(components) == list(expected)
    assert all(close(components[key], value) for key, value in expected.items())
    assert close(reg(), sum(expected.values()))


def test_the_gradient_is_that_of_the_formula_and_leaves_the_rest_alone():
    model = mlp().double()
    tr.Regularizer(model, {"fc1.weight": NET, "fc2.weight": tr.L2(0.5)})().backward()
    w1, w2 = array(model.fc1.weight), array(model.fc2.weight)
    np.testing.assert_allclose(model.fc1.weight.grad, 1e-2 * np.sign(w1) + 2e-3 * w1, rtol=1e-14)
    np.testing.assert_allclose(model.fc2.weight.grad, w2, rtol=1e-14)
    assert all(p.grad is None for p in (model.fc1.bias, model.fc2.bias, *model.norm.parameters()))


def test_components_carry_the_gradient_too():
    model = mlp()
    tr.Regularizer(model, {"fc1.weight": tr.L1(0.1), "fc2.weight": tr.L2(1.0)}).components()["fc1.weight"].backward()
    np.testing.assert_allclose(model.fc1.weight.grad, 0.1 * np.sign(array(model.fc1.weight)), rtol=1e-6)
    assert model.fc2.weight.grad is None


def test_a_tied_tensor_counts_once_under_any_of_its_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    expected = 0.1 * l1(model[0].weight)
    for reg in (tr.Regularizer(model, tr.L1(0.1)), tr.Regularizer(model, {"1.weight": tr.L1(0.1)})):
        assert close(reg(), expected)
        assert len(list(reg.named_parameters())) == 1
        assert "tied to 1.weight" in row(reg, "0.weight")
    reg().backward()
    np.testing.assert_allclose(model[0].weight.grad, 0.1 * np.sign(array(model[0].weight)), rtol=1e-6)


def test_a_shared_module_counts_once():
    shared = nn.Linear(4, 4)
    assert close(tr.Regularizer(nn.Sequential(shared, nn.ReLU(), shared), tr.L2(1.0))(), l2(shared.weight))


def test_reading_does_not_make_the_device_wait():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": NET, "fc2.weight": tr.L2(0.5)}, toward=model.state_dict())
    with Reads() as reads:
        reg().backward()
        reg.components()
        with reg.disabled():
            reg()
    assert reads.count == 0


# ---------------------------------------------------------------------- rules


@pytest.mark.parametrize("as_pairs", [False, True])
def test_the_first_rule_that_matches_wins_and_none_leaves_out(as_pairs):
    model = mlp()
    rules = {"fc1.weight": None, "fc1.bias": tr.L1(9.0), "*.weight": tr.L1(1.0), "re:.*bias": tr.L2(1.0)}
    reg = tr.Regularizer(model, list(rules.items()) if as_pairs else rules)
    assert [name for name, _ in reg.named_parameters()] == ["fc1.bias", "norm.bias", "fc2.weight", "fc2.bias"]
    biases = l2(model.norm.bias) + l2(model.fc2.bias)
    assert close(reg(), 9 * l1(model.fc1.bias) + l1(model.fc2.weight) + biases)
    assert 'left out by rule "fc1.weight"' in row(reg, "fc1.weight")


@pytest.mark.parametrize(
    ("rules", "keys"),
    [
        (tr.L1(0.1), ["l1"]),
        (tr.L2(0.1), ["l2"]),
        (NET, ["elastic_net"]),
        ({"fc1.weight": tr.L1(0.1), "fc2.weight": None, "norm.*": tr.L2(0.1)}, ["fc1.weight", "norm.*"]),
        ([(nn.LayerNorm, tr.L1(0.1)), (nn.Linear, tr.L1(0.1))], ["LayerNorm", "Linear"]),
        ([((nn.Linear, "bias"), tr.L1(0.1))], ["Linear.bias"]),
        ([(["fc1.weight", "fc2.*"], tr.L1(0.1))], ["fc1.weight|fc2.*"]),
        ({("fc1.weight", "fc2.*"): tr.L1(0.1)}, ["fc1.weight|fc2.*"]),
        ([("re:fc1.*", tr.L1(0.1)), (is_fc, tr.L2(0.1))], ["re:fc1.*", "is_fc"]),
        ([(lambda n, m, p: n == "fc1.bias", tr.L1(1)), (lambda *_: True, tr.L1(1))], ["<lambda>", "<lambda>#2"]),
    ],
)
def test_terms_are_keyed_by_the_text_of_their_rule(rules, keys):
    reg = tr.Regularizer(mlp(), rules)
    assert list(reg.terms) == list(reg.components()) == list(reg.state_dict()) == keys
    assert [reg[key].key for key in keys] == keys


def test_modules_and_parameters_serve_as_selectors():
    model = mlp()
    reg = tr.Regularizer(model, {model.fc1: tr.L1(1.0), model.fc2.bias: tr.L1(10.0)})
    assert list(reg.terms)[1] == "fc2.bias"
    assert close(reg(), l1(model.fc1.weight) + 10 * l1(model.fc2.bias))


@pytest.mark.parametrize("first", ["*.weight", "fc1.*", "re:fc[12].weight"])
@pytest.mark.parametrize("penalty", [tr.L1(1.0), None])
def test_a_wholly_shadowed_rule_is_an_error_that_names_the_earlier_one(first, penalty):
    rules = [(first, penalty), ("fc2.bias", tr.L1(0.1)), ("fc1.weight", tr.L2(1.0))]
    with pytest.raises(ValueError, match=r'rule "fc1\.weight" is wholly shadowed by the earlier') as error:
        tr.Regularizer(mlp(), rules)
    assert f'"{first}"' in str(error.value)
    assert "fc2.bias" not in str(error.value)


def test_every_earlier_rule_that_shadows_is_named():
    rules = {"fc1.weight": tr.L1(1.0), "fc2.weight": tr.L1(1.0), "fc*.weight": tr.L2(1.0)}
    with pytest.raises(ValueError, match=r'"fc1\.weight" and "fc2\.weight"'):
        tr.Regularizer(mlp(), rules)


@pytest.mark.parametrize(
    ("arguments", "kwargs", "error", "match"),
    [
        (({"fc1.weight": tr.L1(1.0)},), {"include": "fc2.*"}, ValueError, "include goes with a single penalty"),
        ((tr.L1(1.0),), {"include": "fc3.weight"}, ValueError, 'did you mean "fc2.weight" or "fc1.weight"'),
        ((tr.L1(1.0),), {"exclude": "fc3.*"}, ValueError, "matches no parameter of MLP"),
        ((tr.L1(1.0),), {"exclude": "fc*"}, ValueError, "leave no parameter to regularize"),
        (({"encoder.*": tr.L1(1.0)},), {}, ValueError, '"encoder.*" matches no parameter of MLP'),
        (({},), {}, ValueError, "the rules hold no penalty"),
        (({"fc1.weight": None},), {}, ValueError, "the rules hold no penalty"),
        (([("fc1.weight", 0.1)],), {}, TypeError, "not a pair"),
        (([("fc1.weight", tr.L1(0.1), "fc2.weight")],), {}, TypeError, "not a pair"),
        ((0.1,), {}, TypeError, "expected a penalty or rules"),
        (("fc1.weight",), {}, TypeError, "expected a penalty or rules"),
        ((tr.L1,), {}, TypeError, "expected a penalty or rules"),
        ((tr.L1(1.0),), {"toward": MLP()}, TypeError, "toward=model.state_dict"),
    ],
)
def test_what_cannot_serve_is_refused_at_construction(arguments, kwargs, error, match):
    with pytest.raises(error, match=match.replace(".", r"\.").replace("*", r"\*")):
        tr.Regularizer(mlp(), *arguments, **kwargs)


def test_a_tensor_for_a_model_is_refused():
    with pytest.raises(TypeError, match=r"nn\.Module"):
        tr.Regularizer(torch.ones(3, 3), tr.L1(0.1))


def test_include_takes_what_it_names():
    model = mlp()
    assert close(tr.Regularizer(model, tr.L1(1.0), include="norm.weight")(), l1(model.norm.weight))


@pytest.mark.parametrize("rules", [tr.L1(1.0), {"*.weight": tr.L1(1.0)}])
@pytest.mark.parametrize("exclude", ["fc1.*", nn.LayerNorm, ["fc1.weight", "norm.*"], (nn.Linear, "bias")])
def test_exclude_leaves_out_whatever_else_selects(rules, exclude):
    model = mlp()
    reg = tr.Regularizer(model, rules, exclude=exclude)
    names = {"fc2.weight"} if "fc1" in str(exclude) else {"fc1.weight", "fc2.weight"}
    assert dict(reg.named_parameters()).keys() == names
    assert close(reg(), sum(l1(model.get_parameter(name)) for name in names))


def test_exclude_takes_modules_and_parameters():
    model = mlp()
    reg = tr.Regularizer(model, {"*": tr.L1(1.0), "fc1.bias": tr.L1(1.0)}, exclude=[model.fc2, model.fc1.weight])
    assert [name for name, _ in reg.named_parameters()] == ["fc1.bias"]
    assert "excluded by" in row(reg, "fc1.weight")


def test_a_selection_that_is_all_frozen_warns_where_it_was_made():
    model = mlp().requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen") as caught:
        tr.Regularizer(model, {"fc1.weight": tr.L1(0.1)})
    assert caught[0].filename == __file__


# ---------------------------------------------------------------------- scale


def test_scale_multiplies_the_strengths_and_is_called_once_for_each_parameter():
    model, calls = mlp(), []

    def scale(name, parameter):
        calls.append((name, parameter))
        return parameter.shape[1]

    reg = tr.Regularizer(model, NET, scale=scale)
    expected = sum(w.shape[1] * (1e-2 * l1(w) + 1e-3 * l2(w)) for w in (model.fc1.weight, model.fc2.weight))
    assert close(reg(), expected)
    reg["elastic_net"].factor = 0.5
    assert close(reg(), expected / 2)
    assert [name for name, _ in calls] == ["fc1.weight", "fc2.weight"]
    assert all(parameter is model.get_parameter(name) for name, parameter in calls)
    assert "l1=0.03, l2=0.003" in row(reg, "fc1.weight")


def test_scale_acts_in_the_prox():
    model = mlp()
    w = array(model.fc1.weight)
    tr.Regularizer(model, tr.L1(0.1), scale=lambda name, _: 2 if name == "fc1.weight" else 0).prox_(0.5)
    np.testing.assert_allclose(array(model.fc1.weight), np.sign(w) * np.maximum(np.abs(w) - 0.1, 0), atol=1e-7)


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf, None, "2", True, torch.tensor(2.0)])
def test_a_scale_that_is_no_factor_is_an_error_that_names_the_parameter(factor):
    with pytest.raises((ValueError, TypeError), match=r"scale for fc2\.weight"):
        tr.Regularizer(mlp(), tr.L1(0.1), scale=lambda name, _: factor if name == "fc2.weight" else 1.0)


# ---------------------------------------------------------------------- toward


def test_toward_penalizes_the_distance_and_training_on_does_not_move_the_anchor():
    model = mlp()
    w1, w2 = array(model.fc1.weight), array(model.fc2.weight)
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(0.1), "fc2.weight": tr.L2(0.5)}, toward=model.state_dict())
    assert reg().item() == 0
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(3)
    expected = 0.1 * np.abs(2 * w1).sum() + 0.5 * (4 * w2**2).sum()
    assert close(reg(), expected, rel=1e-5)
    reg().backward()
    np.testing.assert_allclose(model.fc1.weight.grad, 0.1 * np.sign(w1), rtol=1e-6)
    np.testing.assert_allclose(model.fc2.weight.grad, 2 * w2, rtol=1e-5)
    assert "toward" in row(reg, "fc1.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_prox_of_a_penalty_toward_reaches_the_anchor_exactly(dtype):
    anchor, model = mlp(0).to(dtype), mlp(1).to(dtype)
    reg = tr.Regularizer(model, tr.L1(1.0), toward=anchor.state_dict())
    reg.prox_(100.0)
    assert torch.equal(model.fc1.weight, anchor.fc1.weight)
    assert torch.equal(model.fc2.weight, anchor.fc2.weight)
    assert reg().item() == 0


def test_a_step_of_zero_toward_an_anchor_far_away_leaves_every_bit():
    model = mlp()
    before = snapshot(model)
    tr.Regularizer(model, NET, toward={name: 1e3 * w for name, w in before.items()}).prox_(0.0)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."],
    ids=["none", "ddp", "compile", "ddp(compile)", "compile(ddp)", "fsdp"],
)
def test_toward_takes_the_state_dict_of_a_wrapped_model(prefix):
    model = mlp()
    state = {prefix + name: w for name, w in model.state_dict().items()}
    assert tr.Regularizer(model, tr.L1(0.1), toward=state)().item() == 0


def test_toward_takes_the_state_dict_of_an_averaged_model():
    model = mlp()
    assert tr.Regularizer(model, tr.L1(0.1), toward=AveragedModel(model).state_dict())().item() == 0


def test_toward_takes_a_model_whose_own_child_is_called_module():
    model = nn.ModuleDict({"module": nn.Linear(3, 2), "head": nn.Linear(2, 2)})
    model.weight = nn.Parameter(torch.ones(2, 2))  # what the child's would be without its prefix
    assert tr.Regularizer(model, tr.L1(0.1), toward=model.state_dict())().item() == 0


def test_toward_takes_a_tied_tensor_under_either_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    state = {"1.weight": model[0].weight + 1}
    assert close(tr.Regularizer(model, tr.L1(0.1), toward=state)(), 1.6)


def test_toward_without_a_selected_parameter_or_in_another_shape_is_an_error():
    model = mlp()
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"toward has no fc2\.weight"):
        tr.Regularizer(model, tr.L1(0.1), toward={"fc1.weight": state["fc1.weight"]})
    with pytest.raises(ValueError, match=r"fc2\.weight in shape \(1, 5\), the model in \(3, 5\)"):
        tr.Regularizer(model, tr.L1(0.1), toward={**state, "fc2.weight": torch.ones(1, 5)})
    tr.Regularizer(model, {"fc1.weight": tr.L1(0.1)}, toward={"fc1.weight": state["fc1.weight"]})


# ---------------------------------------------------------------------- strengths


def test_a_changed_strength_takes_effect_at_the_next_call_and_the_next_prox():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1.0), "fc2.weight": NET})
    reg(), reg.prox_(0.0)
    reg["fc1.weight"].strength = 0.25
    reg["fc1.weight"].factor = 0.5
    reg["fc2.weight"].l1 = 0.0
    reg["fc2.weight"].l2 = 2
    w1, w2 = array(model.fc1.weight), array(model.fc2.weight)
    assert close(reg(), 0.125 * np.abs(w1).sum() + 2 * (w2**2).sum())
    assert (reg["fc1.weight"].strength, reg["fc1.weight"].factor) == (0.25, 0.5)
    assert reg["fc1.weight"].penalty == tr.L1(0.125)
    assert "strength=0.125" in row(reg, "fc1.weight")
    reg.prox_(1.0)
    np.testing.assert_allclose(
        array(model.fc1.weight), np.sign(w1) * np.maximum(np.abs(w1) - 0.125, 0), rtol=1e-6, atol=1e-8
    )
    np.testing.assert_allclose(array(model.fc2.weight), w2 / 5, rtol=1e-6)


def test_penalties_are_immutable_and_may_be_shared():
    penalty = tr.L1(1.0)
    one, other = tr.Regularizer(mlp(), penalty), tr.Regularizer(mlp(), penalty)
    one["l1"].strength = 5.0
    assert (penalty.strength, other["l1"].strength) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("l1", -1.0, ValueError),
        ("l2", math.nan, ValueError),
        ("factor", math.inf, ValueError),
        ("factor", -0.5, ValueError),
        ("l1", "0.1", TypeError),
        ("l1", None, TypeError),
        ("l2", True, TypeError),
        ("strength", 0.1, AttributeError),
        ("lambda_", 0.1, AttributeError),
        ("key", "other", AttributeError),
        ("penalty", tr.L1(1.0), AttributeError),
    ],
)
def test_a_wrong_name_or_value_raises_and_changes_nothing(name, value, error):
    reg = tr.Regularizer(mlp(), NET)
    before, state = reg().item(), reg.state_dict()
    with pytest.raises(error, match="elastic_net") as caught:
        setattr(reg["elastic_net"], name, value)
    if error is AttributeError:
        assert "l1, l2, factor" in str(caught.value)
    assert (reg().item(), reg.state_dict()) == (before, state)


def test_an_unknown_term_or_strength_is_an_error_that_lists_the_known_ones():
    reg = tr.Regularizer(mlp(), NET)
    with pytest.raises(KeyError, match=r"\['elastic_net'\]"):
        reg["l1"]
    with pytest.raises(AttributeError, match="l1, l2, factor"):
        _ = reg["elastic_net"].strength


def test_terms_is_a_copy_that_cannot_damage_the_regularizer():
    reg = tr.Regularizer(mlp(), NET)
    reg.terms.clear()
    assert list(reg.terms) == ["elastic_net"]


# ---------------------------------------------------------------------- state


def test_the_state_is_plain_numbers_and_comes_back_through_a_safe_load():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(np.float32(0.5)), "fc2.weight": NET})
    reg["fc1.weight"].factor = 3
    state = reg.state_dict()
    assert state["fc1.weight"] == {"strength": 0.5, "factor": 3.0}
    assert state["fc2.weight"] == {"l1": 1e-2, "l2": 1e-3, "factor": 1.0}
    assert {type(value) for values in state.values() for value in values.values()} == {float}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = tr.Regularizer(model, {"fc1.weight": tr.L1(9.0), "fc2.weight": tr.ElasticNet(9.0, 9.0)})
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state_dict() == state
    assert other().item() == reg().item()


def test_a_state_is_a_copy():
    reg = tr.Regularizer(mlp(), tr.L1(0.1))
    reg.state_dict()["l1"]["strength"] = 9.0
    assert reg["l1"].strength == 0.1


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"fc2.weight": {"strength": 1.0, "factor": 1.0}},
        {"fc1.weight": {"strength": 1.0, "factor": 1.0}, "fc2.weight": {"strength": 1.0, "factor": 1.0}},
        {"fc1.weight": {"l1": 1.0, "l2": 1.0, "factor": 1.0}},
        {"fc1.weight": {"strength": 1.0}},
    ],
)
def test_the_state_of_other_terms_is_an_error_that_lists_both(state):
    reg = tr.Regularizer(mlp(), {"fc1.weight": tr.L1(0.1)})
    with pytest.raises(ValueError, match="other terms") as error:
        reg.load_state_dict(state)
    assert "fc1.weight(strength, factor)" in str(error.value)
    assert all(f"{key}({', '.join(values)})" in str(error.value) for key, values in state.items())
    assert reg.state_dict() == {"fc1.weight": {"strength": 0.1, "factor": 1.0}}


@pytest.mark.parametrize("number", [-1.0, math.nan, "1", None])
def test_a_bad_number_in_a_state_changes_nothing(number):
    reg = tr.Regularizer(mlp(), {"fc1.weight": tr.L1(0.1), "fc2.weight": tr.L1(0.1)})
    before = reg.state_dict()
    good = {"strength": 7.0, "factor": 7.0}
    with pytest.raises((ValueError, TypeError), match=r"fc2\.weight\.factor"):
        reg.load_state_dict({"fc1.weight": good, "fc2.weight": {**good, "factor": number}})
    assert reg.state_dict() == before


# ---------------------------------------------------------------------- prox_


@pytest.mark.parametrize(
    "step",
    [
        0.1,
        torch.tensor(0.1),
        {"fc1.weight": 0.1, "fc2.weight": torch.full((3, 5), 0.1)},
        {"fc1.weight": torch.full((5, 1), 0.1, dtype=torch.float64), "fc2.weight": 0.1},
    ],
    ids=["number", "tensor", "dict", "broadcast"],
)
def test_prox_shrinks_the_selected_parameters_in_place(step):
    model = mlp()
    before = snapshot(model)
    parameters = dict(model.named_parameters())
    tr.Regularizer(model, {"fc1.weight": tr.L1(2.0), "fc2.weight": tr.L2(1.0)}).prox_(step)
    w1, w2 = array(before["fc1.weight"]), array(before["fc2.weight"])
    np.testing.assert_allclose(
        array(model.fc1.weight), np.sign(w1) * np.maximum(np.abs(w1) - 0.2, 0), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(array(model.fc2.weight), w2 / 1.2, rtol=1e-6)
    assert (model.fc1.weight == 0).any()
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert torch.equal(model.norm.weight, before["norm.weight"])


@pytest.mark.parametrize(
    ("step", "error", "match"),
    [
        (-0.1, ValueError, "at least 0"),
        (math.nan, ValueError, "finite"),
        ("0.1", TypeError, "not a number"),
        (torch.ones(7), ValueError, "does not broadcast"),
        (torch.ones(5, 6), ValueError, "does not broadcast"),  # fits the first parameter, not the second
        ({"fc1.weight": 0.1}, ValueError, r"no step for fc2\.weight"),
        ({"fc1.weight": 0.1, "fc2.weight": -1.0}, ValueError, "at least 0"),
        ({"fc1.weight": 0.1, "fc2.weight": torch.full((3, 5), -1.0)}, ValueError, "at least 0"),
    ],
)
def test_a_bad_step_is_an_error_and_nothing_has_changed(step, error, match):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        tr.Regularizer(model, tr.L1(1.0)).prox_(step)
    assert same(before, snapshot(model))


def test_prox_is_refused_while_an_optimizer_is_attached():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = tr.optim.attach(optimizer, reg)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"prox \(SGD\) already applies"):
        reg.prox_(0.1)
    assert same(before, snapshot(model))
    handle.remove()
    reg.prox_(0.1)
    assert not same(before, snapshot(model))


def test_prox_is_allowed_again_once_the_carrier_is_removed():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    handle = tr.optim.attach(torch.optim.SGD(model.parameters(), lr=0.1), reg)
    with pytest.raises(RuntimeError, match="already applies the prox"):
        reg.prox_(100.0)
    handle.remove()
    reg.prox_(100.0)
    assert tr.sparsity(reg).fraction == 1


# ---------------------------------------------------------------------- switching off


def test_disabled_switches_every_route_off_and_restores_what_was():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1.0), "fc2.weight": tr.L2(1.0)})
    before, value = snapshot(model), reg().item()
    with reg.disabled():
        assert not reg.enabled
        assert reg().item() == 0
        assert [v.item() for v in reg.components().values()] == [0, 0]
        reg.prox_(1.0)
        assert "disabled" in row(reg, "fc1.weight")
        with reg.disabled():
            pass
        assert not reg.enabled
    assert reg.enabled
    assert same(before, snapshot(model))
    assert reg().item() == value
    assert "disabled" not in reg.explain()


def test_disabled_ends_with_an_exception_too_and_keeps_a_disable_before_it():
    reg = tr.Regularizer(mlp(), tr.L1(1.0))
    with pytest.raises(KeyboardInterrupt), reg.disabled():
        raise KeyboardInterrupt
    assert reg.enabled
    reg.disable()
    with reg.disabled():
        pass
    assert not reg.enabled
    reg.enable()
    assert reg().item() > 0


def test_a_disabled_regularizer_adds_zero_to_a_loss_that_still_has_its_gradient():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    with reg.disabled():
        (model(batch()[0]).sum() + reg()).backward()
    assert model.fc1.weight.grad is not None


# ---------------------------------------------------------------------- the model is left alone


def test_the_model_gets_no_parameters_no_state_and_no_submodules():
    model = mlp()
    state, modules, attributes = list(model.state_dict()), list(model.modules()), set(vars(model))
    reg = tr.Regularizer(model, tr.L1(1.0), toward=model.state_dict())
    criterion = tr.RegularizedLoss(nn.MSELoss(), reg)
    reg()
    assert list(model.state_dict()) == state
    assert list(model.modules()) == modules
    assert set(vars(model)) == attributes
    assert list(criterion.parameters()) == []
    assert criterion.state_dict() == {}


def test_a_model_may_hold_its_regularizer():
    model = mlp()
    state, parameters = list(model.state_dict()), len(list(model.parameters()))
    model.reg = tr.Regularizer(model, tr.L1(1.0))
    model.criterion = tr.RegularizedLoss(nn.MSELoss(), model.reg)
    assert close(model.reg(), l1(model.fc1.weight) + l1(model.fc2.weight))
    assert list(model.state_dict()) == state
    assert len(list(model.parameters())) == parameters
    assert "MLP" in repr(model)
    model.load_state_dict(mlp(1).state_dict())
    model.to(torch.float64).train().requires_grad_(True).zero_grad()
    assert close(model.reg(), l1(model.fc1.weight) + l1(model.fc2.weight))


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_every_dtype_sums_in_float32_or_wider(dtype):
    # 300×300 weights near 1: a sum in float16 overflows, one in bfloat16 keeps two digits.
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(torch.rand(300, 300).to(dtype) + (2j if dtype.is_complex else 0.5))
    reg = tr.Regularizer(model, NET)
    assert close(reg(), 1e-2 * l1(model.weight) + 1e-3 * l2(model.weight), rel=1e-5)
    assert reg().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    reg().backward()
    assert model.weight.grad.dtype == dtype
    w = array(model.weight)
    np.testing.assert_allclose(array(model.weight.grad), 1e-2 * w / np.abs(w) + 2e-3 * w, rtol=0.01)


def test_a_model_of_mixed_dtypes_sums_to_one_scalar():
    model = mlp()
    model.fc1.half()
    model.fc2.double()
    reg = tr.Regularizer(model, {"fc*.weight": tr.L1(1.0), "norm.weight": tr.L2(1.0)})
    assert close(reg(), l1(model.fc1.weight) + l1(model.fc2.weight) + l2(model.norm.weight))
    assert reg().dtype == torch.float64
    reg().backward()
    assert model.fc1.weight.grad.dtype == torch.float16
    reg.prox_(torch.tensor(0.01, dtype=torch.float64))
    assert model.fc1.weight.dtype == torch.float16


# ---------------------------------------------------------------------- explain


def test_explain_says_of_every_parameter_what_acts_on_it_and_why_the_rest_is_left_out():
    model = nn.ModuleDict({"table": nn.Embedding(4, 2), "fc1": nn.Linear(2, 3), "fc2": nn.Linear(3, 3)})
    model["norm"], model["fc3"] = nn.BatchNorm1d(3), nn.Linear(3, 3)
    model["fc3"].requires_grad_(False)
    model["fc2"].count = nn.Parameter(torch.zeros(2, 2, dtype=torch.long), requires_grad=False)
    reg = tr.Regularizer(model, {"fc1.weight": NET, "fc*.weight": tr.L2(0.5)}, exclude="fc2.weight")
    assert len(reg.explain().splitlines()) == 2 + len(list(model.parameters()))
    for name, *words in [
        ("table.weight", "4×2", "8", "embedding"),
        ("fc1.weight", "3×2", "6", "fc1.weight", "l1=0.01, l2=0.001", "loss", 'also matched by "fc*.weight"'),
        ("fc1.bias", "3", "bias"),
        ("fc2.weight", "3×3", "9", "excluded by fc2.weight"),
        ("fc2.count", "2×2", "integer type"),
        ("norm.weight", "norm layer"),
        ("fc3.weight", "frozen"),
    ]:
        assert all(word in row(reg, name) for word in words), row(reg, name)


def test_explain_shows_the_strength_in_force_and_the_route():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1e-3), "fc2.weight": tr.L2(0.5)}, scale=lambda n, _: 2.0)
    reg["fc1.weight"].factor = 0.25
    optimizer = torch.optim.SGD([model.fc1.weight], lr=0.1)
    handle = tr.optim.attach(optimizer, reg, partial=True)
    assert "strength=0.0005" in row(reg, "fc1.weight")
    assert "prox (SGD)" in row(reg, "fc1.weight")
    assert "strength=1" in row(reg, "fc2.weight")
    assert "loss" in row(reg, "fc2.weight")
    handle.remove()
    assert "loss" in row(reg, "fc1.weight")


def test_explain_says_when_no_rule_matches():
    assert "no rule matches" in row(tr.Regularizer(mlp(), {"fc1.weight": tr.L1(1.0)}), "fc2.weight")


# ---------------------------------------------------------------------- it stays true


def test_it_follows_load_state_dict_with_assign():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    model.load_state_dict(mlp(1).double().state_dict(), assign=True)
    assert close(reg(), l1(model.fc1.weight) + l1(model.fc2.weight))
    assert reg().dtype == torch.float64
    reg().backward()
    assert model.fc1.weight.grad is not None


def test_it_follows_to_empty():
    with torch.device("meta"):
        model = MLP()
    reg = tr.Regularizer(model, tr.L1(1.0))
    assert reg().is_meta  # nothing was read: a meta tensor has no data
    model.to_empty(device="cpu")
    model.load_state_dict(mlp().state_dict())
    assert close(reg(), l1(model.fc1.weight) + l1(model.fc2.weight))


@pytest.mark.parametrize("assign", [False, True])
def test_an_anchor_survives_a_model_that_starts_on_the_meta_device(assign):
    state = mlp().state_dict()
    with torch.device("meta"):
        model = MLP()
    reg = tr.Regularizer(model, tr.L1(1.0), toward=state)
    assert reg().is_meta
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(state, assign=assign)
    assert reg().item() == 0
    with torch.no_grad():
        model.fc1.weight.add_(1)
    assert close(reg(), 30.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("toward", [False, True])
def test_it_follows_a_change_of_dtype(dtype, toward):
    model = mlp()
    state = snapshot(model)
    reg = tr.Regularizer(model, tr.L1(1.0), toward=state if toward else None)
    with torch.no_grad():
        model.fc1.weight.add_(0.5)
    model.to(dtype)
    expected = sum(
        np.abs(array(model.get_parameter(name)) - toward * array(state[name])).sum()
        for name in ("fc1.weight", "fc2.weight")
    )
    assert close(reg(), expected, rel=2e-2 if toward else 2e-6)


def test_a_parametrization_registered_later_is_penalized_in_the_effective_weight():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1.0)})
    with torch.no_grad():
        parametrize.register_parametrization(model.fc1, "weight", Halved())
        model.fc1.parametrizations.weight.original.mul_(3)
    assert close(reg(), l1(model.fc1.weight))
    reg().backward()
    original = model.fc1.parametrizations.weight.original
    np.testing.assert_allclose(original.grad, 0.5 * np.sign(array(original)))
    assert "fc1.weight" in [line.split(" ")[0] for line in reg.explain().splitlines()]
    parametrize.remove_parametrizations(model.fc1, "weight")
    assert close(reg(), l1(model.fc1.weight))


def test_prox_of_a_parametrized_weight_is_refused_and_not_lost():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    parametrize.register_parametrization(model.fc1, "weight", Halved())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"fc1\.weight"):
        reg.prox_(1.0)
    assert same(before, snapshot(model))


def test_a_parameter_that_is_gone_is_an_error_that_names_it():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    del model.fc2.weight
    with pytest.raises(RuntimeError, match=r"fc2\.weight is no longer a tensor"):
        reg()


def test_a_parameter_that_is_replaced_is_followed():
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1.0)})
    model.fc1.weight = nn.Parameter(torch.full((2, 2), 3.0))
    assert close(reg(), 12.0)


def checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


WRAPPERS = pytest.mark.parametrize("wrap", [nn.DataParallel, checkpointed, torch.compile])


@WRAPPERS
def test_it_goes_on_when_a_module_is_wrapped_in_mid_training(wrap):
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    value = reg().item()
    model.fc1 = wrap(model.fc1)
    assert reg().item() == value
    model.fc1 = nn.DataParallel(model.fc1)
    assert reg().item() == value
    assert "loss" in row(reg, "fc1.weight")
    assert [name for name, _ in reg.named_parameters()] == ["fc1.weight", "fc2.weight"]
    with torch.no_grad():
        model.get_parameter("fc2.weight").zero_()
    assert reg().item() < value


@WRAPPERS
def test_wrapping_the_whole_model_changes_neither_names_nor_values(wrap):
    model = mlp()
    before = tr.Regularizer(model, {"fc1.weight": tr.L1(1.0), "fc2.weight": tr.L2(1.0)})
    after = tr.Regularizer(wrap(model), {"fc1.weight": tr.L1(1.0), "fc2.weight": tr.L2(1.0)})
    assert before().item() == after().item()
    assert before.explain() == after.explain()


def test_the_average_of_a_model_has_a_regularizer_of_its_own():
    model = mlp()
    average = AveragedModel(model)
    reg, other = tr.Regularizer(model, tr.L1(1.0)), tr.Regularizer(average, tr.L1(1.0))
    with torch.no_grad():
        average.module.fc1.weight.zero_()
    assert [name for name, _ in other.named_parameters()] == ["fc1.weight", "fc2.weight"]
    assert close(other(), l1(model.fc2.weight))
    assert close(reg(), l1(model.fc1.weight) + l1(model.fc2.weight))


@pytest.mark.parametrize("replace", [lambda m: setattr(m, "fc1", nn.Linear(6, 5)), lambda m: delattr(m, "fc1")])
def test_a_module_replaced_in_mid_training_is_an_error_at_every_reading(replace):
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    reg()
    replace(model)
    for read in (reg, reg.components, reg.explain, lambda: reg.prox_(0.1), lambda: list(reg.named_parameters())):
        with pytest.raises(RuntimeError, match=r"module 'fc1' was replaced .* build a new Regularizer"):
            read()


def replace_head(model: MLP) -> None:
    model.fc2 = nn.Linear(5, 4)


def assign_weights(model: MLP) -> None:
    model.load_state_dict(mlp(1).state_dict(), assign=True)


@pytest.mark.parametrize("change", [replace_head, assign_weights])
@pytest.mark.parametrize("hooked", [False, True])
def test_after_a_change_a_new_regularizer_and_optimizer_work_while_the_old_ones_are_alive(change, hooked):
    model = mlp()
    old_reg = tr.Regularizer(model, tr.L1(1.0))
    old = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=old_reg)
    change(model)
    with pytest.raises(RuntimeError, match="optimizer"):
        old_reg()
    with pytest.raises(RuntimeError, match="optimizer"):
        old.step()
    old.attachment.remove()
    reg = tr.Regularizer(model, tr.L1(100.0))
    if hooked:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tr.optim.attach(optimizer, reg)
    else:
        optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
    assert not reg().requires_grad
    model(batch()[0]).sum().backward()
    optimizer.step()
    assert tr.sparsity(reg).fraction == 1


def test_an_optimizer_built_again_for_weights_that_were_assigned_takes_the_place_of_the_old():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(100.0))
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
    assign_weights(model)
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
    assert not reg().requires_grad
    model(batch()[0]).sum().backward()
    optimizer.step()
    assert tr.sparsity(reg).fraction == 1


@pytest.mark.parametrize("change", [replace_head, assign_weights])
def test_a_model_that_was_changed_is_no_concern_of_another_one(change):
    broken = mlp()
    reg = tr.Regularizer(broken, tr.L1(1.0))
    optimizer = tr.optim.ProxSGD(broken.parameters(), lr=0.1, regularizer=reg)
    change(broken)
    model = mlp()
    other = tr.Regularizer(model, tr.L1(1.0))
    handle = tr.optim.attach(torch.optim.SGD(model.parameters(), lr=0.1), other)
    assert handle.active
    assert optimizer.regularizer is reg


def test_a_whole_block_replaced_is_an_error_and_one_that_holds_nothing_selected_is_not():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    reg = tr.Regularizer(model, tr.L1(1.0))
    model[0][1] = nn.GELU()
    assert close(reg(), l1(model[0][0].weight) + l1(model[1].weight))
    model[0] = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(RuntimeError, match=r"module '0\.0' was replaced"):
        reg()


def test_modules_added_later_are_left_alone():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(1.0))
    value = reg().item()
    model.fc3 = nn.Linear(9, 9)
    assert reg().item() == value
    assert "not selected" in row(reg, "fc3.weight")


# ---------------------------------------------------------------------- lazy modules


@lazy
def test_a_lazy_module_is_refused_before_its_first_forward_and_right_after_it():
    model = Lazy()
    reg = tr.Regularizer(model, {"fc2.weight": tr.L1(1.0), "*.weight": tr.L2(1.0)})
    assert "lazy" in row(reg, "fc2.weight")
    assert list(reg.terms) == ["fc2.weight", "*.weight"]
    for read in (reg, reg.components, lambda: reg.prox_(0.1), lambda: list(reg.named_parameters())):
        with pytest.raises(RuntimeError, match=r"fc2\.weight is not materialized yet; run one forward"):
            read()
    reg["fc2.weight"].strength = 2.0
    model(batch()[0])
    assert close(reg(), 2 * l1(model.fc2.weight) + l2(model.fc1.weight))
    assert "3×5" in row(reg, "fc2.weight")


@lazy
@pytest.mark.parametrize("selector", [nn.LazyLinear, (nn.LazyLinear, "weight"), nn.Linear, "fc*.weight", is_fc])
def test_a_lazy_module_may_be_selected_in_every_way(selector):
    model = Lazy()
    reg = tr.Regularizer(model, [(selector, tr.L1(1.0))])
    model(batch()[0])
    lazy_alone = "Lazy" in str(selector)
    assert close(reg(), l1(model.fc2.weight) + (0 if lazy_alone else l1(model.fc1.weight)))


@lazy
def test_scale_and_toward_reach_a_lazy_module_once_its_shape_is_known():
    torch.manual_seed(0)
    model, calls = Lazy(), []

    def scale(name, parameter):
        calls.append(name)
        return float(parameter.shape[1])

    state = {"fc1.weight": torch.ones(5, 6), "fc2.weight": torch.ones(3, 5)}
    reg = tr.Regularizer(model, tr.L1(1.0), scale=scale, toward=state)
    for w in state.values():
        w.zero_()
    model(batch()[0])
    reg()
    w1, w2 = array(model.fc1.weight), array(model.fc2.weight)
    assert close(reg(), 6 * np.abs(w1 - 1).sum() + 5 * np.abs(w2 - 1).sum())
    assert sorted(calls) == ["fc1.weight", "fc2.weight"]


@lazy
def test_an_optimizer_attached_before_the_first_forward_uses_the_scale_and_the_anchor():
    model = Lazy()
    state = {"fc1.weight": torch.ones(5, 6), "fc2.weight": torch.ones(3, 5)}
    reg = tr.Regularizer(model, tr.L1(1.0), scale=lambda *_: 1e3, toward=state)
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
    model(batch()[0]).sum().backward()
    optimizer.step()
    assert torch.equal(model.fc2.weight, torch.ones(3, 5))


@lazy
def test_an_anchor_of_another_shape_than_a_lazy_module_gets_is_an_error():
    model = Lazy()
    reg = tr.Regularizer(model, {"fc2.weight": tr.L1(1.0)}, toward={"fc2.weight": torch.ones(9, 9)})
    model(batch()[0])
    with pytest.raises(ValueError, match=r"fc2\.weight in shape \(9, 9\)"):
        reg()


# ---------------------------------------------------------------------- slips, and ties that change


def test_a_strength_set_on_the_regularizer_itself_is_refused():
    reg = tr.Regularizer(mlp(), tr.L1(0.1))
    for name in ("strength", "factor"):
        with pytest.raises(AttributeError, match=rf"reg\['l1'\]\.{name}"):
            setattr(reg, name, 1.0)
    assert "l1" in reg
    assert list(reg) == ["l1"]
    assert "L1(strength=0.1)" in repr(reg)


def test_tensors_tied_after_the_build_are_refused_before_they_count_twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reg = tr.Regularizer(model, tr.L1(1.0))
    model[1].weight = model[0].weight
    with pytest.raises(RuntimeError, match=r"1\.weight was tied to 0\.weight"):
        reg()


def test_a_tie_that_comes_apart_is_refused_until_it_is_tied_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    reg = tr.Regularizer(model, tr.L1(1.0))
    model.load_state_dict({name: w.clone() for name, w in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"0\.weight is no longer tied to 1\.weight"):
        reg()
    model[1].weight = model[0].weight
    assert reg().item() == pytest.approx(l1(model[0].weight), rel=1e-6)
