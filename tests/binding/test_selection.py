"""Which parameters a selector means."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from torchreg import select
from torchreg.binding.selection import Inventory


class Net(nn.Module):
    """Every kind of parameter, in two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.fc1 = nn.Linear(4, 6)
        self.norm = nn.LayerNorm((2, 3))
        self.fc2 = nn.Linear(6, 6, bias=False)
        self.bn = nn.BatchNorm1d(6)
        self.gain = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 2)


def everything(name, module, parameter):
    return True


def names(model, *args, **kwargs):
    return [entry.name for entry in select(model, *args, **kwargs)]


DEFAULT = ["fc1.weight", "fc2.weight", "head.weight"]

# ---------------------------------------------------------------------- what is left out by default


def test_by_default_weights_of_two_dimensions_are_taken_in_the_models_order():
    model = Net()
    assert names(model) == [name for name, _ in model.named_parameters() if name in DEFAULT] == DEFAULT


@pytest.mark.parametrize(
    ("module", "reasons"),
    [
        (nn.Linear(2, 2), {"weight": "", "bias": "bias"}),
        (nn.Conv2d(2, 2, 3), {"weight": "", "bias": "bias"}),
        (nn.LayerNorm((2, 3)), {"weight": "norm layer", "bias": "norm layer"}),
        (nn.GroupNorm(1, 2), {"weight": "norm layer", "bias": "norm layer"}),
        (nn.RMSNorm((2, 3)), {"weight": "norm layer"}),
        (nn.BatchNorm2d(2), {"weight": "norm layer", "bias": "norm layer"}),
        (nn.SyncBatchNorm(2), {"weight": "norm layer", "bias": "norm layer"}),
        (nn.InstanceNorm2d(2, affine=True), {"weight": "norm layer", "bias": "norm layer"}),
        (nn.Embedding(3, 2), {"weight": "embedding"}),
        (nn.EmbeddingBag(3, 2), {"weight": "embedding"}),
        (nn.PReLU(), {"weight": "fewer than two dimensions"}),
        (nn.Linear(2, 2).requires_grad_(False), {"weight": "frozen", "bias": "frozen"}),
        (nn.ParameterList([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(()))]), None),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True),
            {
                "in_proj_weight": "",
                "in_proj_bias": "bias",
                "bias_k": "bias",
                "bias_v": "bias",
                "out_proj.weight": "",
                "out_proj.bias": "bias",
            },
        ),
        (
            nn.LSTM(3, 4, proj_size=2),
            {"weight_ih_l0": "", "weight_hh_l0": "", "bias_ih_l0": "bias", "bias_hh_l0": "bias", "weight_hr_l0": ""},
        ),
        (nn.LazyLinear(3), {"weight": "", "bias": "bias"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_parameter_that_is_left_out_has_its_reason(module, reasons):
    reasons = {"0": "", "1": "fewer than two dimensions"} if reasons is None else reasons
    assert Inventory(module).why_not == reasons
    taken = [name for name, reason in reasons.items() if not reason]
    if taken:
        assert names(module) == taken


def test_complex_weights_are_taken_and_integer_ones_are_not():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    model.codes = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert names(model) == ["weight"]
    assert Inventory(model).why_not["codes"] == "integer type"


def test_a_bias_is_a_bias_by_its_name_and_not_by_chance():
    model = nn.Module()
    for name in ["bias", "q_bias", "bias_hh_l0", "bias1", "relative_bias_table", "unbiased", "biased", "debias"]:
        setattr(model, name, nn.Parameter(torch.ones(2, 2)))
    assert names(model) == ["unbiased", "biased", "debias"]


def test_a_model_with_nothing_to_take_by_default_says_why_and_what_next():
    with pytest.raises(
        ValueError, match=r"^BatchNorm1d has no parameter .* by default \(norm layer\); name one: includ"
    ):
        select(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"^ReLU has no parameter .* by default \(it has no parameters\); name one"):
        select(nn.ReLU())


# ---------------------------------------------------------------------- selectors

SELECTORS = {
    "exact name": ("fc1.weight", ["fc1.weight"]),
    "exact name of an excluded kind": ("embed.weight", ["embed.weight"]),
    "exact name of one dimension": ("bn.weight", ["bn.weight"]),
    "glob": ("fc*.weight", ["fc1.weight", "fc2.weight"]),
    "glob with a set": ("fc[13].weight", ["fc1.weight"]),
    "glob of everything": ("*", DEFAULT),
    "glob of both kinds takes the default one": ("fc1.*", ["fc1.weight"]),
    "glob of excluded kinds alone": ("*.bias", ["fc1.bias", "norm.bias", "bn.bias", "head.bias"]),
    "glob of one excluded layer": ("norm.*", ["norm.weight", "norm.bias"]),
    "regular expression": (r"re:fc\d\.weight", ["fc1.weight", "fc2.weight"]),
    "regular expression of both kinds": ("re:.*", DEFAULT),
    "regular expression of excluded kinds": (r"re:(bn|gain).*", ["gain", "bn.weight", "bn.bias"]),
    "type": (nn.Linear, DEFAULT),
    "type of an excluded kind": (nn.LayerNorm, ["norm.weight", "norm.bias"]),
    "embedding by type": (nn.Embedding, ["embed.weight"]),
    "type of everything": (nn.Module, DEFAULT),
    "type and name": ((nn.Linear, "weight"), DEFAULT),
    "type and name of an excluded kind": ((nn.Linear, "bias"), ["fc1.bias", "head.bias"]),
    "type and name of both kinds": (
        (nn.Module, "weight"),
        ["embed.weight", "fc1.weight", "norm.weight", "fc2.weight", "bn.weight", "head.weight"],
    ),
    "type and name of the model": ((Net, "gain"), ["gain"]),
    "predicate": (
        lambda name, module, parameter: parameter.shape[0] == 6,
        ["gain", "fc1.weight", "fc1.bias", "fc2.weight", "bn.weight", "bn.bias"],
    ),
    "predicate on the module": (
        lambda name, module, parameter: isinstance(module, nn.Embedding) or name == "gain",
        ["gain", "embed.weight"],
    ),
    "list": (["head.weight", "fc1.weight"], ["fc1.weight", "head.weight"]),
    "list of kinds": (
        [nn.Embedding, (nn.Linear, "weight"), "bn.*"],
        ["embed.weight", *DEFAULT, "bn.weight", "bn.bias"],
    ),
    "nested list": ([["head.weight"], ("fc1.weight", ["bn.weight"])], ["fc1.weight", "bn.weight", "head.weight"]),
    "each part of a list on its own": (["head.*", "bn.*"], ["bn.weight", "bn.bias", "head.weight"]),
    "two types": ((nn.Linear, nn.Embedding), ["embed.weight", *DEFAULT]),
    "set": ({"head.weight", "fc1.weight"}, ["fc1.weight", "head.weight"]),
    "the same twice": (["fc1.weight", "fc*.weight"], ["fc1.weight", "fc2.weight"]),
}


@pytest.mark.parametrize("key", SELECTORS)
def test_selector(key):
    selector, expected = SELECTORS[key]
    model = Net()
    assert names(model, selector) == sorted(expected, key=[name for name, _ in model.named_parameters()].index)


def test_a_glob_matches_the_whole_name_and_not_a_part_of_it():
    model = nn.Sequential(nn.Linear(2, 2))
    for part in ("weight", "0", "0.w", "re:weight", "re:0"):
        with pytest.raises(ValueError, match="matches no parameter"):
            select(model, part)


def test_a_module_means_its_parameters():
    model = nn.Sequential(Net(), Net())
    assert names(model, model[1]) == [f"1.{name}" for name in DEFAULT]
    assert names(model, model[0].head) == ["0.head.weight"]
    assert names(model, model[0].norm) == ["0.norm.weight", "0.norm.bias"]
    assert names(model, model) == names(model)


def test_a_parameter_always_counts():
    model = Net()
    assert names(model, model.bn.weight) == ["bn.weight"]
    assert names(model, [model.head.bias, model.fc1.weight]) == ["fc1.weight", "head.bias"]


def test_a_frozen_parameter_is_passed_over_by_a_glob_and_taken_by_name():
    model = Net()
    model.fc1.weight.requires_grad_(False)
    assert names(model, "fc*") == ["fc2.weight"]
    assert names(model, ["fc1.weight", "fc2.weight"]) == ["fc1.weight", "fc2.weight"]


def test_names_and_order_are_those_of_the_model():
    for model in [Net(), nn.Sequential(Net(), Net()), nn.LSTM(3, 4, 2), nn.TransformerEncoderLayer(8, 2, 8)]:
        assert names(model, everything) == [name for name, _ in model.named_parameters()]


def test_a_selected_parameter_is_read_through_its_module():
    model = Net()
    [entry] = select(model, "fc1.weight")
    assert (entry.owner, entry.attribute) == (model.fc1, "weight")
    assert entry.parameter is model.fc1.weight
    model.load_state_dict({name: w.clone() for name, w in model.state_dict().items()}, assign=True)
    assert entry.parameter is model.fc1.weight
    del model.fc1.weight
    with pytest.raises(
        RuntimeError, match=r"^fc1\.weight is no longer a tensor of its Linear; build the Regularizer aga"
    ):
        _ = entry.parameter


def test_a_weight_that_is_parametrized_later_is_read_as_it_is_computed():
    model = Net()
    [entry] = select(model, "fc1.weight")
    assert not entry.computed
    parametrizations.orthogonal(model.fc1)
    assert entry.computed
    assert torch.equal(entry.parameter, model.fc1.weight)


# ---------------------------------------------------------------------- tied weights


def tied():
    model = nn.Module()
    model.encoder, model.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
    model.decoder.weight = model.encoder.weight
    return model


@pytest.mark.parametrize("selector", [None, "encoder.weight", "decoder.weight", "dec*", "re:dec.*", "*.weight"])
def test_a_tied_weight_counts_once_and_goes_by_either_name(selector):
    model = tied()
    [entry] = select(model, selector)
    assert entry.names == ["encoder.weight", "decoder.weight"]
    assert entry.parameter is model.decoder.weight


def test_a_tied_weight_goes_by_either_module():
    model = tied()
    assert names(model, model.decoder) == ["encoder.weight"]
    with pytest.raises(ValueError, match="leaves nothing"):
        select(model, "encoder.weight", exclude="decoder.weight")


def test_a_weight_tied_to_an_embedding_is_an_embedding():
    model = nn.Module()
    model.head, model.embed, model.fc = nn.Linear(4, 10), nn.Embedding(10, 4), nn.Linear(4, 4)
    model.embed.weight = model.head.weight
    assert names(model) == ["fc.weight"]
    assert names(model, "head.weight") == ["head.weight"]
    assert names(model, nn.Embedding) == names(model, (nn.Embedding, "weight")) == ["head.weight"]


def test_a_module_in_two_places_has_its_parameters_once():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert names(model) == names(model, "2.weight") == names(model, shared) == ["0.weight"]


# ---------------------------------------------------------------------- exclude


def test_exclude_leaves_out_all_that_it_matches():
    assert names(Net(), exclude="fc1.*") == ["fc2.weight", "head.weight"]
    assert names(Net(), "*.bias", exclude=[nn.LayerNorm, nn.BatchNorm1d]) == ["fc1.bias", "head.bias"]
    assert names(Net(), lambda name, module, parameter: name.startswith("fc1"), exclude="fc1.*s") == ["fc1.weight"]
    model = Net()
    assert names(model, exclude=model.head) == names(model, exclude=[model.head.weight]) == ["fc1.weight", "fc2.weight"]


def test_exclude_takes_a_frozen_parameter_without_complaint():
    model = Net()
    model.fc1.weight.requires_grad_(False)
    assert names(model, exclude=["fc1.weight", "embed.weight"]) == ["fc2.weight", "head.weight"]


def test_exclude_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^exclude=\*\.weight leaves nothing of the selection; narrow it$"):
        select(Net(), exclude="*.weight")


def test_exclude_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r'^pattern "haed\.\*" matches no parameter of Net; did you mean "head\.'):
        select(Net(), exclude="haed.*")


# ---------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        AveragedModel,
        lambda model: torch.compile(nn.DataParallel(model)),
        lambda model: nn.DataParallel(torch.compile(model)),
        checkpoint_wrapper,
    ],
    ids=["compile", "DataParallel", "AveragedModel", "compile(DataParallel)", "DataParallel(compile)", "checkpoint"],
)
def test_a_wrapper_leaves_no_trace_in_the_names(wrap):
    model = Net()
    wrapped = wrap(model)
    assert names(wrapped) == DEFAULT
    assert names(wrapped, "fc1.*") == ["fc1.weight"]
    assert names(wrapped, everything) == [name for name, _ in model.named_parameters()]
    assert names(nn.Sequential(wrapped)) == [f"0.{name}" for name in DEFAULT]


def test_an_inner_module_may_be_wrapped():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.ReLU(), checkpoint_wrapper(nn.Linear(2, 2)))
    model.add_module("sharded", nn.Module())
    model.sharded._fsdp_wrapped_module = nn.Linear(2, 2)
    assert names(model) == ["0.weight", "2.weight", "sharded.weight"]


def test_a_users_own_module_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert names(model) == ["module.weight"]
    assert names(nn.DataParallel(model)) == names(AveragedModel(model)) == ["module.weight"]


# ---------------------------------------------------------------------- warnings


def test_a_selection_that_is_all_frozen_warns():
    model = Net().requires_grad_(False)
    with pytest.warns(UserWarning, match=r"^every selected parameter is frozen \(fc1\.weight, \.\.\.\)"):
        assert names(model, "fc1.weight") == ["fc1.weight"]
    model.fc2.weight.requires_grad_(True)
    assert names(model, ["fc1.weight", "fc2.weight"]) == ["fc1.weight", "fc2.weight"]


@pytest.mark.parametrize("part", ["g", "v"])
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated:FutureWarning")
def test_the_inputs_of_an_old_weight_norm_warn(part):
    model = nn.utils.weight_norm(nn.Linear(3, 2))
    with pytest.warns(UserWarning, match=rf"^weight_{part} is the input of a parametrization: .* Remove the parametri"):
        select(model, f"weight_{part}")


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_the_inputs_of_a_parametrization_warn(parametrize):
    model = nn.Sequential(parametrize(nn.Linear(3, 2)), nn.Linear(2, 2))
    with pytest.warns(
        UserWarning, match=r"^0\.parametrizations\.weight\.original\d? is the input of a parametrization"
    ):
        select(model)
    assert names(model, exclude="*parametrizations*") == ["1.weight"]


def test_a_warning_points_at_the_line_that_selects():
    model = Net().requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        select(model, "fc1.weight")
    assert caught[0].filename == __file__


# ---------------------------------------------------------------------- errors: value, reason, next move


@pytest.mark.parametrize(
    ("selector", "near"),
    [
        ("fc1.wieght", "fc1.weight"),
        ("encodr.0.weight", "encoder.0.weight"),
        ("re:encodr.0.weight", "encoder.0.weight"),
        ("module.fc1.weight", "fc1.weight"),
        ("_orig_mod.fc1.weight", "fc1.weight"),
        ("fc1", "fc1."),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(selector, near):
    model = Net()
    model.encoder = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="matches no parameter of Net; did you mean ") as caught:
        select(model, selector)
    assert str(caught.value).startswith(f'pattern "{selector}" matches no parameter of Net; did you mean "')
    assert f'"{near}' in str(caught.value)


def test_a_pattern_with_no_near_name_is_refused_with_the_first_names():
    with pytest.raises(ValueError, match=r'did you mean "gain" or "embed\.weight" or "fc1\.weight"\?$'):
        select(Net(), "zzzzzzzz")
    with pytest.raises(ValueError, match=r'^pattern "x" matches no parameter of ReLU, which has none$'):
        select(nn.ReLU(), "x")


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (nn.Conv2d, "Conv2d"),
        ((nn.Linear, "gamma"), "Linear.gamma"),
        ((nn.Conv2d, "weight"), "Conv2d.weight"),
        (lambda name, module, parameter: False, "<lambda>"),
    ],
    ids=["type", "type and name", "type of another", "predicate"],
)
def test_a_selector_that_matches_nothing_is_refused_by_its_text(selector, text):
    for again in (selector, ["fc1.weight", selector]):
        with pytest.raises(
            ValueError, match=r"matches no parameter of Net; print\(model\) shows its modules$"
        ) as caught:
            select(Net(), again)
        assert str(caught.value).startswith(text)


def test_a_module_without_parameters_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="matches no parameter of Sequential"):
        select(model, model[1])


def test_a_module_or_parameter_of_another_model_is_refused():
    other = Net()
    with pytest.raises(ValueError, match=r"^the Linear is not a module of Net; pass one that is, or a glob$"):
        select(Net(), other.fc1)
    with pytest.raises(
        ValueError, match=r"^the parameter of shape \(6, 4\) is not a parameter of Net; pass one that is, or"
    ):
        select(Net(), other.fc1.weight)


@pytest.mark.parametrize("empty", [[], (), [[]], set()], ids=repr)
def test_an_empty_list_is_refused(empty):
    with pytest.raises(
        ValueError, match=r"^an empty list selects nothing; name at least one parameter, or leave the arg"
    ):
        select(Net(), empty)


@pytest.mark.parametrize("selector", [3, 1.5, torch.ones(2), nn.Parameter, int, b"fc1.weight"], ids=repr)
def test_a_selector_of_no_known_kind_is_refused(selector):
    with pytest.raises(TypeError, match=r"selects nothing: a selector is a name or glob, 're:\.\.\.', a module type, "):
        select(Net(), selector)


def test_a_broken_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r'^"re:\[" is not a regular expression: unterminated character set'):
        select(Net(), "re:[")


def test_a_model_that_is_a_tensor_is_refused():
    with pytest.raises(
        TypeError, match=r"^expected the model, an nn\.Module, got Tensor; for a tensor call the penalty"
    ):
        select(torch.ones(2, 2))


def test_an_integer_parameter_is_passed_over_by_a_glob_and_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].codes = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert names(model, "0.*") == ["0.weight"]
    assert names(model, "0.[bc]*") == ["0.bias"]
    for selector in ["0.codes", "*.codes", model[0].codes, (nn.Linear, "codes"), ["0.weight", "0.codes"], everything]:
        refusal = r"^0\.codes has the integer type torch\.int8, which has no gradient; leave it out of the selection$"
        with pytest.raises(TypeError, match=refusal):
            select(model, selector)
