"""What is zero: counts against numpy, and zeros that stay zero through a refit."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import torchreg as tr
from tests.models import Lazy, Reads, array, batch, mlp, same, snapshot


@torch.no_grad()
def prune(weight: Tensor, seed: int = 0) -> None:
    """Sets about half of the weights to zero, one whole row and one whole column among them; some zeros negative."""
    generator = torch.Generator().manual_seed(seed)
    dead = torch.rand(weight.shape, generator=generator) < 0.4
    dead[0] = True
    if weight.dim() > 1:
        dead[:, 0] = True
    weight[dead] = 0.0
    weight.view(-1)[0] = -0.0


def dense(module: nn.Module) -> np.ndarray:
    """Entry (o, i) is the kernel by which output channel o reads input channel i: zero where they share no group."""
    w = array(module.weight)
    if isinstance(module, nn.Linear):
        return w[:, :, None]
    groups = module.groups
    full = np.zeros((module.out_channels, module.in_channels, w[0, 0].size))
    outs, ins = module.out_channels // groups, module.in_channels // groups
    for o in range(module.out_channels):
        for i in range(module.in_channels):
            if o // outs == i // ins:
                transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                full[o, i] = (w[i, o % outs] if transposed else w[o, i % ins]).ravel()
    return full


LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (2, 3)),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed grouped": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


# ---------------------------------------------------------------------- counts


@every_layer
def test_a_layer_counts_as_numpy_counts(layer):
    torch.manual_seed(0)
    module = layer()
    prune(module.weight)
    (found,) = tr.sparsity(module).layers
    w, full = array(module.weight), dense(module)
    assert (found.name, found.shape) == ("weight", w.shape)
    assert (found.weights, found.zeros) == (w.size, w.size - np.count_nonzero(w))
    assert found.fraction == np.mean(w == 0)
    assert (found.neurons, found.inputs) == full.shape[:2]
    assert found.dead_neurons == sum(not full[o].any() for o in range(full.shape[0]))
    assert found.dead_inputs == sum(not full[:, i].any() for i in range(full.shape[1]))


@every_layer
def test_a_dead_input_changes_nothing_in_the_output(layer):
    """The definition: not a formula on the weights, but what the layer computes."""
    torch.manual_seed(0)
    module = layer().requires_grad_(False)
    prune(module.weight)
    (found,) = tr.sparsity(module).layers
    is_linear = isinstance(module, nn.Linear)
    x = torch.randn(2, found.inputs, *([] if is_linear else [4] * (module.weight.dim() - 2)))
    y = module(x)
    dead = 0
    for i in range(x.shape[1]):
        changed = x.clone()
        changed[:, i] += 1
        dead += torch.equal(module(changed), y)
    assert found.dead_inputs == dead
    nothing = module(torch.zeros_like(x))
    assert found.dead_neurons == sum(torch.equal(y[:, o], nothing[:, o]) for o in range(y.shape[1]))


class Mixed(nn.Module):
    """Weights that count, beside biases, norms and embeddings that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 5).requires_grad_(False)
        self.head = nn.Linear(5, 3)
        self.mask = nn.Parameter(torch.zeros(2, 2, dtype=torch.long), requires_grad=False)


@pytest.mark.parametrize("freeze_all", [False, True])
def test_a_model_counts_its_weights_frozen_ones_too_but_no_norms_biases_or_embeddings(freeze_all):
    torch.manual_seed(0)
    model = Mixed()
    if freeze_all:
        model.requires_grad_(False)
    for module in (model.conv, model.frozen, model.head):
        prune(module.weight)
        nn.init.zeros_(module.bias)
    found = tr.sparsity(model)
    assert [layer.name for layer in found.layers] == ["conv.weight", "frozen.weight", "head.weight"]
    weights = [array(module.weight) for module in (model.conv, model.frozen, model.head)]
    assert [layer.zeros for layer in found.layers] == [w.size - np.count_nonzero(w) for w in weights]
    assert found.weights == sum(w.size for w in weights)
    assert found.zeros == sum(w.size - np.count_nonzero(w) for w in weights)
    assert found.fraction == np.mean(np.concatenate([w.ravel() for w in weights]) == 0)


def test_minus_zero_counts_and_the_smallest_number_does_not():
    module = nn.Linear(3, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-0.0, 1e-45, float("nan")]]))
    assert tr.sparsity(module).zeros == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_dtype_counts(dtype):
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.tensor([[0.0, 1.0], [0.0, 2.0]]).to(dtype))
    (found,) = tr.sparsity(module).layers
    assert (found.zeros, found.dead_inputs, found.dead_neurons) == (2, 1, 0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (0, 3, 2), (2, 3, 0)])
def test_an_empty_weight_counts_nothing_and_divides_by_nothing(shape):
    module = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(shape))})
    found = tr.sparsity(module)
    assert (found.weights, found.zeros, found.fraction, found.layers[0].fraction) == (0, 0, 0.0, 0.0)
    assert "0.00%" in str(found)
    json.dumps(found.to_dict())


def test_a_tied_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert tr.sparsity(model).weights == 16


def test_a_regularizer_counts_what_it_selects():
    model = mlp()
    prune(model.fc1.weight)
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(0.1), "norm.weight": tr.L1(0.1)})
    found = tr.sparsity(reg)
    assert [layer.name for layer in found.layers] == ["fc1.weight", "norm.weight"]
    assert found["fc1.weight"] == tr.sparsity(model)["fc1.weight"]
    assert found.zeros == int((array(model.fc1.weight) == 0).sum())


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("fc1.*", None, ["fc1.weight"]),
        (None, "fc1.*", ["fc2.weight"]),
        (["fc1.bias", "norm.*"], "norm.bias", ["fc1.bias", "norm.weight"]),
    ],
)
def test_include_and_exclude_select(include, exclude, names):
    assert [layer.name for layer in tr.sparsity(mlp(), include, exclude).layers] == names


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Linear(4, 6)])
def test_a_vector_has_neurons_and_no_inputs(layer):
    with torch.no_grad():
        layer.bias.fill_(1.0)[:2] = 0.0
    (found,) = tr.sparsity(layer, "bias").layers
    assert (found.weights, found.zeros, found.neurons, found.dead_neurons) == (6, 2, 6, 2)
    assert (found.inputs, found.dead_inputs) == (0, 0)


def test_a_number_counts_as_one_weight():
    module = nn.Linear(2, 2)
    module.temperature = nn.Parameter(torch.tensor(0.0))
    found = tr.sparsity(module, "temperature")
    assert (found.weights, found.zeros, found.fraction) == (1, 1, 1.0)


def test_a_report_is_plain_numbers():
    model = mlp()
    prune(model.fc2.weight)
    found = tr.sparsity(model)
    report = json.loads(json.dumps(found.to_dict()))
    w = array(model.fc2.weight)
    assert (report["weights"], report["zeros"], report["fraction"]) == (45, int((w == 0).sum()), (w == 0).sum() / 45)
    assert report["layers"]["fc2.weight"] == {
        "shape": [3, 5],
        "weights": 15,
        "zeros": int((w == 0).sum()),
        "fraction": float(np.mean(w == 0)),
        "inputs": 5,
        "dead_inputs": int((w == 0).all(0).sum()),
        "neurons": 3,
        "dead_neurons": int((w == 0).all(1).sum()),
    }
    assert list(report["layers"]) == ["fc1.weight", "fc2.weight"]


def test_a_report_prints_as_a_table():
    module = nn.Linear(1000, 2)
    with torch.no_grad():
        module.weight.fill_(1.0)[0] = 0
        module.weight[1, :5] = 0
    lines = str(tr.sparsity(module)).splitlines()
    assert lines[0].split() == ["weight", "shape", "left", "zeros", "dead", "inputs", "dead", "neurons"]
    assert lines[2].split() == ["weight", "2×1000", "995", "50.25%", "5", "of", "1000", "1", "of", "2"]
    assert lines[3].split() == ["total", "2,000", "995", "50.25%"]


def test_an_unknown_layer_is_an_error_that_lists_the_layers():
    with pytest.raises(KeyError, match=r"no layer 'fc3\.weight'; the layers are \['fc1\.weight', 'fc2\.weight'\]"):
        tr.sparsity(mlp())["fc3.weight"]


@pytest.mark.parametrize("depth", [1, 12])
def test_however_many_layers_there_are_a_device_is_read_once(depth):
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(depth)])
    with Reads() as reads:
        tr.sparsity(model)
    assert reads.count == 1


def test_counting_leaves_the_model_as_it_was():
    model = mlp()
    before = snapshot(model)
    tr.sparsity(model)
    assert same(before, snapshot(model))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("count", "error", "match"),
    [
        (lambda: tr.sparsity(nn.ReLU()), ValueError, "no weight of two or more dimensions"),
        (lambda: tr.sparsity(nn.LayerNorm(3)), ValueError, "no weight of two or more dimensions"),
        (lambda: tr.sparsity(mlp(), "fc3.*"), ValueError, "matches no parameter"),
        (lambda: tr.sparsity(mlp(), exclude="fc*"), ValueError, "leaves nothing"),
        (
            lambda: tr.sparsity(tr.Regularizer(mlp(), tr.L1(1.0)), "fc1.*"),
            ValueError,
            "a regularizer already has a selection",
        ),
        (lambda: tr.sparsity(torch.zeros(3, 3)), TypeError, "nn.Module"),
        (lambda: tr.sparsity(Lazy()), (RuntimeError, ValueError), "forward"),
        (lambda: tr.sparsity(tr.Regularizer(Lazy(), tr.L1(1.0))), RuntimeError, "forward"),
    ],
)
def test_what_cannot_be_counted_is_an_error(count, error, match):
    with pytest.raises(error, match=match):
        count()


# ---------------------------------------------------------------------- freezing


OPTIMIZERS = {
    "sgd": lambda ps: SGD(ps, lr=0.05),
    "momentum": lambda ps: SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda ps: SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "foreach": lambda ps: SGD(ps, lr=0.05, momentum=0.9, foreach=True),
    "adam": lambda ps: Adam(ps, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda ps: Adam(ps, lr=0.01, amsgrad=True, foreach=True),
    "adamw": lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1),
    "fused": lambda ps: AdamW(ps, lr=0.01, fused=True),
    "rmsprop": lambda ps: RMSprop(ps, lr=0.01, momentum=0.9, centered=True),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def steps(model: nn.Module, optimizer: Optimizer, n: int = 20, clip: float | None = None) -> Iterator[int]:
    """Trains, and hands over after each step."""
    x, y = batch()
    for i in range(n):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        yield i


def warmed(make) -> tuple[nn.Module, Optimizer, tr.Regularizer, dict[str, Tensor]]:
    """A model pruned in mid-training: zeros in the weights, momentum in the optimizer; and where the zeros are."""
    model = mlp()
    optimizer = make(model.parameters())
    for _ in steps(model, optimizer, 3):
        pass
    for weight in (model.fc1.weight, model.fc2.weight):
        prune(weight)
    nn.init.zeros_(model.fc1.bias)
    reg = tr.Regularizer(model, tr.L1(0.1))
    return model, optimizer, reg, {name: w == 0 for name, w in snapshot(model).items()}


def zeros_moved(model: nn.Module, zero: dict[str, Tensor]) -> int:
    return sum(int((model.get_parameter(name)[zero[name]] != 0).sum()) for name in ("fc1.weight", "fc2.weight"))


@every_optimizer
def test_without_freezing_the_zeros_move(make):
    model, optimizer, _, zero = warmed(make)
    for _ in steps(model, optimizer, 1):
        pass
    assert zeros_moved(model, zero) > 0


@every_optimizer
def test_frozen_zeros_stay_exactly_zero_and_the_rest_trains_on(make):
    model, optimizer, reg, zero = warmed(make)
    before = snapshot(model)
    tr.freeze_zeros(reg, optimizer)
    for _ in steps(model, optimizer):
        assert zeros_moved(model, zero) == 0
    for name in ("fc1.weight", "fc2.weight"):
        assert (model.get_parameter(name)[~zero[name]] != before[name][~zero[name]]).all()
    assert (model.fc1.bias != 0).all(), "a bias that starts at zero trains on"


@every_optimizer
def test_the_optimizer_has_no_memory_of_frozen_zeros(make):
    model, optimizer, reg, zero = warmed(make)
    tr.freeze_zeros(reg, optimizer)
    for _ in steps(model, optimizer, 3):
        pass
    # A decay in the gradient is 0 at a weight that is 0: nothing builds up behind the mask.
    for name in ("fc1.weight", "fc2.weight"):
        state = optimizer.state[model.get_parameter(name)]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == zero[name].shape:
                assert (value[zero[name]] == 0).all(), key
                assert (value[~zero[name]] != 0).any(), key


@every_optimizer
def test_the_weights_that_live_move_as_if_the_zeros_were_masked_in_the_model(make):
    model, optimizer, reg, zero = warmed(make)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    twin_zero = {twin.get_parameter(name): zero[name] for name in ("fc1.weight", "fc2.weight")}
    tr.freeze_zeros(reg, optimizer)
    x, y = batch()
    for _ in steps(model, optimizer, 5):
        twin_optimizer.zero_grad()
        F.mse_loss(twin(x), y).backward()
        twin_optimizer.step()
        with torch.no_grad():
            for w, dead in twin_zero.items():
                w[dead] = 0
    for name, w in model.named_parameters():
        assert torch.equal(w, twin.get_parameter(name)), name


def test_clipping_measures_the_gradients_that_live():
    model, optimizer, reg, zero = warmed(OPTIMIZERS["momentum"])
    x, y = batch()
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    dead = {name: array(zero[name].double()) for name in ("fc1.weight", "fc2.weight")}
    square = sum((array(p.grad) ** 2 * (1 - dead.get(name, 0))).sum() for name, p in model.named_parameters())
    everything = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.zero_grad()
    tr.freeze_zeros(reg, optimizer)
    F.mse_loss(model(x), y).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm.item() == pytest.approx(square**0.5, rel=1e-6)
    assert norm < everything
    for _ in steps(model, optimizer, 20, clip=0.1):
        assert zeros_moved(model, zero) == 0


def test_a_gradient_that_is_there_already_is_cleared_too():
    model, optimizer, reg, zero = warmed(OPTIMIZERS["momentum"])
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    tr.freeze_zeros(reg, optimizer)
    optimizer.step()
    assert zeros_moved(model, zero) == 0
    assert (optimizer.state[model.fc1.weight]["momentum_buffer"][zero["fc1.weight"]] == 0).all()


def test_gradients_accumulate_where_weights_live():
    model, optimizer, reg, zero = warmed(OPTIMIZERS["sgd"])
    optimizer.zero_grad()
    tr.freeze_zeros(reg, optimizer)
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    once = model.fc1.weight.grad.clone()
    F.mse_loss(model(x), y).backward()
    torch.testing.assert_close(model.fc1.weight.grad, 2 * once)
    assert (once[zero["fc1.weight"]] == 0).all()
    assert (once[~zero["fc1.weight"]] != 0).any()


@pytest.mark.parametrize("make", [OPTIMIZERS["momentum"], lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3)])
def test_a_step_with_a_closure_keeps_them_too(make):
    model, optimizer, reg, zero = warmed(OPTIMIZERS["sgd"])
    optimizer = make(model.parameters())
    before = snapshot(model)
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    tr.freeze_zeros(reg, optimizer)
    for _ in range(5):
        optimizer.step(closure)
        assert zeros_moved(model, zero) == 0
    assert not torch.equal(model.fc1.weight, before["fc1.weight"])


@pytest.mark.parametrize("dirty", ["momentum", "adamw"])
def test_a_checkpoint_with_momentum_loaded_afterwards_does_not_move_them(dirty):
    make = OPTIMIZERS[dirty]
    model, optimizer, reg, zero = warmed(make)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    tr.freeze_zeros(reg, optimizer)
    optimizer.load_state_dict(checkpoint)
    for _ in steps(model, optimizer):
        assert zeros_moved(model, zero) == 0


def test_weights_loaded_afterwards_are_zeroed_by_the_next_step():
    model, optimizer, reg, zero = warmed(OPTIMIZERS["momentum"])
    tr.freeze_zeros(reg, optimizer)
    model.load_state_dict(mlp(5).state_dict())
    for _ in steps(model, optimizer, 1):
        assert zeros_moved(model, zero) == 0


def test_a_refit_with_a_swap_in_and_the_penalty_off():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(0.3))
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.02, regularizer=reg)
    for _ in steps(model, optimizer, 8):
        pass
    zero = {name: w == 0 for name, w in snapshot(model).items()}
    assert 0 < zero["fc1.weight"].sum() < 30
    x, y = batch()
    sparse_loss = F.mse_loss(model(x), y).item()
    with reg.disabled(), tr.freeze_zeros(reg, optimizer):
        for _ in steps(model, optimizer):
            assert zeros_moved(model, zero) == 0
    assert F.mse_loss(model(x), y).item() < sparse_loss
    assert tr.sparsity(reg).zeros == sum(int(zero[name].sum()) for name in ("fc1.weight", "fc2.weight"))


@pytest.mark.parametrize("hooked", [False, True])
def test_the_prox_goes_on_beside_frozen_zeros(hooked):
    model, optimizer, reg, zero = warmed(OPTIMIZERS["adam"])
    if hooked:
        tr.optim.attach(optimizer, reg)
    else:
        optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.01, regularizer=reg)
    before = tr.sparsity(reg).zeros
    tr.freeze_zeros(reg, optimizer)
    for _ in steps(model, optimizer):
        assert zeros_moved(model, zero) == 0
    assert tr.sparsity(reg).zeros > before


@pytest.mark.parametrize("end", ["remove", "with", "exception"])
def test_the_zeros_move_again_once_it_has_ended(end):
    model, optimizer, reg, zero = warmed(OPTIMIZERS["sgd"])
    handle = tr.freeze_zeros(reg, optimizer)
    if end == "remove":
        handle.remove()
        handle.remove()
    elif end == "with":
        with handle as same_handle:
            assert same_handle is handle
    else:
        with pytest.raises(KeyboardInterrupt), handle:
            raise KeyboardInterrupt
    for _ in steps(model, optimizer, 1):
        pass
    assert zeros_moved(model, zero) > 20
    assert (model.fc1.weight.grad[zero["fc1.weight"]] != 0).any()


@pytest.mark.parametrize("keep_handle", [False, True])
def test_it_ends_with_its_optimizer(keep_handle):
    model, optimizer, reg, zero = warmed(OPTIMIZERS["momentum"])
    handle = tr.freeze_zeros(reg, optimizer)
    if not keep_handle:
        del handle
    del optimizer
    for _ in steps(model, SGD(model.parameters(), lr=0.1), 1):
        assert (model.fc1.weight.grad[zero["fc1.weight"]] != 0).any()
    assert zeros_moved(model, zero) > 20


@every_optimizer
def test_toward_an_anchor_what_is_at_the_anchor_is_kept_and_zeros_move(make):
    model, optimizer, _, zero = warmed(make)
    anchor = snapshot(model)
    with torch.no_grad():
        model.fc1.weight[1:3] += 0.1
        anchor["fc2.weight"] += 1
    reg = tr.Regularizer(model, tr.L1(0.1), toward=anchor)
    tr.freeze_zeros(reg, optimizer)
    for _ in steps(model, optimizer, 5):
        assert torch.equal(model.fc1.weight[3:], anchor["fc1.weight"][3:])
        assert torch.equal(model.fc1.weight[:1], anchor["fc1.weight"][:1])
    assert (model.fc1.weight[1:3] != anchor["fc1.weight"][1:3]).all()
    assert (model.fc2.weight[zero["fc2.weight"]] != 0).any()


def test_only_selected_parameters_are_kept():
    model, optimizer, _, zero = warmed(OPTIMIZERS["momentum"])
    tr.freeze_zeros(tr.Regularizer(model, {"fc1.weight": tr.L1(0.1)}), optimizer)
    for _ in steps(model, optimizer, 3):
        assert (model.fc1.weight[zero["fc1.weight"]] == 0).all()
    assert (model.fc2.weight[zero["fc2.weight"]] != 0).any()


def test_a_frozen_parameter_may_be_among_the_selected():
    model, _, _, zero = warmed(OPTIMIZERS["sgd"])
    model.fc1.weight.requires_grad_(False)
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(0.1), "fc2.weight": tr.L1(0.1)})
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    tr.freeze_zeros(reg, optimizer)
    for _ in steps(model, optimizer, 3):
        assert zeros_moved(model, zero) == 0
    model.fc1.weight.requires_grad_(True)
    for _ in steps(model, optimizer, 3):
        assert zeros_moved(model, zero) == 0


def test_a_number_that_is_zero_keeps_the_optimizers_step_count():
    model = nn.Linear(2, 1)
    model.temperature = nn.Parameter(torch.tensor(0.0))
    optimizer = Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    tr.freeze_zeros(tr.Regularizer(model, {"temperature": tr.L1(0.1)}), optimizer)
    assert optimizer.state[model.temperature]["step"] == 3


@pytest.mark.parametrize("lacking", ["fc1.weight", "fc2.weight"])
def test_an_optimizer_that_lacks_a_selected_parameter_is_an_error_and_nothing_has_changed(lacking):
    model, _, reg, zero = warmed(OPTIMIZERS["sgd"])
    held = [p for name, p in model.named_parameters() if name != lacking]
    optimizer = SGD(held, lr=0.1, momentum=0.9)
    for _ in steps(model, optimizer, 2):
        pass
    before, gradients = snapshot(model), [p.grad.clone() for p in held]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in held]
    with pytest.raises(ValueError, match=lacking.replace(".", r"\.")):
        tr.freeze_zeros(reg, optimizer)
    assert same(before, snapshot(model))
    assert all(torch.equal(p.grad, g) for p, g in zip(held, gradients, strict=True))
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in zip(held, momenta, strict=True))
    for _ in steps(model, optimizer, 1):
        pass
    assert zeros_moved(model, zero) > 0


def test_a_model_in_place_of_the_regularizer_is_refused():
    """A module has named_parameters too, and biases among them: it would freeze every bias that starts at zero."""
    model = mlp()
    with pytest.raises(TypeError, match="Regularizer"):
        tr.freeze_zeros(model, SGD(model.parameters(), lr=0.1))


def test_with_toward_it_is_the_unchanged_weights_that_are_kept():
    layer = nn.Linear(3, 2)
    pretrained = {"weight": layer.weight.detach().clone()}
    with torch.no_grad():
        layer.weight[0, 0] += 1.0
        layer.weight[1, 1] = 0.0  # changed, and so no zero to keep
    reg = tr.Regularizer(layer, tr.L1(0.1), toward=pretrained)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with reg.disabled(), tr.freeze_zeros(reg, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    same = layer.weight == pretrained["weight"]
    assert same.tolist() == [[False, True, True], [True, False, True]]
    assert layer.weight[1, 1] != 0


def test_a_refit_that_is_over_takes_no_gradients():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = tr.freeze_zeros(tr.Regularizer(layer, tr.L1(0.1)), optimizer)
    del optimizer
    layer(torch.ones(1, 3)).sum().backward()
    assert (layer.weight.grad == 1).all()
    del handle


def test_a_pruned_weight_counts_its_masked_entries_as_zeros():
    layer = nn.Linear(4, 3)
    l1_unstructured(layer, "weight", 0.5)
    assert tr.sparsity(layer).zeros == 6


def test_ended_refits_leave_no_hooks_behind():
    layer = nn.Linear(3, 2)
    reg = tr.Regularizer(layer, tr.L1(0.1))
    for _ in range(3):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        tr.freeze_zeros(reg, optimizer)
    del optimizer
    assert not layer.weight._post_accumulate_grad_hooks


def test_what_is_no_optimizer_is_refused():
    layer = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got Linear"):
        tr.freeze_zeros(tr.Regularizer(layer, tr.L1(0.1)), layer)
