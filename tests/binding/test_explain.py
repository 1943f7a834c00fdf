"""What explain() warns of: a norm layer that undoes a weight's scale, and neurons that never come back."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import torchreg as tr
from torchreg.binding.selection import LAYERS, named_modules, norms_behind


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Residual(), Residual())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


class PreActivation(nn.Module):
    """The norm before the layer: bn2 stands behind conv1, and nothing behind conv2."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())).mean((2, 3))


class Block(nn.Module):
    """A transformer block with its norms behind the sums: the residual keeps a scale that the norm alone would undo."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm1 = nn.LayerNorm(6)
        self.fc1 = nn.Linear(6, 6)
        self.fc2 = nn.Linear(6, 6)
        self.norm2 = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.fc2(self.fc1(x).relu()))


class NormsLast(nn.Module):
    """All layers first, then all norms, which serve other layers than they stand behind: fc2 ends without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.bn1 = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.bn1(self.fc1(x)).relu())


class Skip(nn.Sequential):
    """A Sequential that has a `forward` of its own is read as any other module."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Other(nn.Module):
    """A batch norm of another width than the layer in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 4), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(x))


def mlp() -> nn.Module:
    hidden = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.Dropout(0.0), nn.ReLU()]
    return nn.Sequential(*hidden, nn.LayerNorm(5), nn.Linear(5, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 2))


def convolutions() -> nn.Module:
    named = [("up", nn.ConvTranspose2d(3, 4, 2)), ("group", nn.GroupNorm(2, 4)), ("down", nn.Conv2d(4, 4, 2, groups=2))]
    named += [("instance", nn.InstanceNorm2d(4)), ("last", nn.Conv2d(4, 2, 1)), ("pool", nn.AdaptiveAvgPool2d(1))]
    return nn.Sequential(OrderedDict(named))


IMAGES, ROWS, TOKENS = (16, 3, 6, 6), (16, 6), (4, 5, 6)
RESNET = {"conv1": "bn1"}
for block in ("layer1.0", "layer1.1"):
    RESNET |= {f"{block}.conv1": f"{block}.bn1", f"{block}.conv2": f"{block}.bn2"}
    RESNET |= {f"{block}.downsample.0": f"{block}.downsample.1"}
ARCHITECTURES = {
    "ResNet": (ResNet, IMAGES, RESNET),
    "pre-activation": (PreActivation, IMAGES, {"conv1": "bn2"}),
    "transformer": (Block, TOKENS, {}),
    "norms last": (NormsLast, ROWS, {}),
    "skip": (lambda: nn.Sequential(Skip(nn.Linear(6, 6), nn.BatchNorm1d(6)), nn.Linear(6, 2)), ROWS, {"0.0": "0.1"}),
    "skip, layer norm": (lambda: nn.Sequential(Skip(nn.Linear(6, 6), nn.LayerNorm(6)), nn.Linear(6, 2)), ROWS, {}),
    "another width": (Other, ROWS, {}),
    "MLP": (mlp, ROWS, {"0": "1", "3": "6"}),
    "convolutions": (convolutions, IMAGES, {"up": "group", "down": "instance"}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_norm_layers_behind_the_weights_are_found(name):
    build, _, expected = ARCHITECTURES[name]
    model = build()
    norms = norms_behind(model)
    assert {path: norms[id(module)] for path, module in named_modules(model) if id(module) in norms} == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_output_does_not_feel_the_scale_of_a_layer_with_a_norm_behind_it(name):
    torch.manual_seed(0)
    build, shape, _ = ARCHITECTURES[name]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    norms, before = norms_behind(model), model(x)
    felt = set()
    for path, layer in named_modules(model):
        if isinstance(layer, LAYERS) and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            for parameter in layer.parameters():
                parameter.mul_(1e3)
            change = (model(x) - before).norm() / before.norm()
            for parameter in layer.parameters():
                parameter.div_(1e3)
            if change > 0.05:
                felt.add(path)
            assert not (id(layer) in norms and change > 0.05), f"{path} has a norm behind it and its scale counts"
    assert felt, "the last layer's scale always counts"


def test_explain_names_the_norm_layer_and_only_at_weights():
    model = mlp()
    reg = tr.Regularizer(model, {"*.weight": tr.L1(1e-3), "0.bias": tr.L2(1e-3)})
    lines = {line.split(" ")[0]: line for line in reg.explain().splitlines()}
    assert "norm layer 1 undoes its scale" in lines["0.weight"]
    assert "norm layer 6 undoes its scale" in lines["3.weight"]
    assert not any("undoes" in lines[name] for name in ("0.bias", "7.weight", "10.weight"))


def test_toward_pretrained_weights_a_norm_layer_is_no_trouble():
    model = mlp()
    assert "undoes" not in tr.Regularizer(model, tr.L1(1e-3), toward=model.state_dict()).explain()


def test_names_are_free_of_wrappers():
    model = nn.DataParallel(ResNet())
    norms = norms_behind(model)
    assert norms[id(model.module.layer1[1].conv2)] == "layer1.1.bn2"


# ---------------------------------------------------------------------- dead neurons

LAYER_KINDS = {
    "linear": (lambda: nn.Linear(6, 8), (32, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), (32, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (8, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (8, 4, 5, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (8, 4, 3, 3)),
}


def without_gradient(layer: nn.Module, x: Tensor) -> int:
    """Output channels through whose ReLU no gradient comes back, measured."""
    out = layer(x).requires_grad_()
    out.retain_grad()
    (out.relu() * torch.randn_like(out)).sum().backward()
    others = [dim for dim in range(out.dim()) if dim != 1]
    return int((out.grad.abs().sum(others) == 0).sum())


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_the_neurons_called_dead_are_those_through_whose_relu_no_gradient_comes_back(kind):
    torch.manual_seed(0)
    build, shape = LAYER_KINDS[kind]
    layer = build()
    reg = tr.Regularizer(layer, tr.L1(1e-3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg)
    assert "dead" not in reg.explain()
    with torch.no_grad():
        # Whole channels of either kind of layout; of the biases there, every other one is positive.
        w = layer.weight
        transposed = isinstance(layer, nn.ConvTranspose2d)
        (w[:, 0] if transposed else w[:4]).zero_()
        if layer.bias is not None:
            layer.bias.copy_(torch.tensor([1.0, -1.0] * (len(layer.bias) // 2)))
    measured = without_gradient(layer, 100 * torch.randn(shape))  # whatever has a weight left fires
    assert measured > 0
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert f"{measured} of {outputs} outputs dead under ReLU" in reg.explain()


def test_zeros_that_are_no_deaths_are_not_called_so():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    reg = tr.Regularizer(net, tr.L1(1e-3))
    with torch.no_grad():
        net[0].weight[0] = 0  # the norm's own bias feeds the neuron
        net[3].weight[0, 1:] = 0
        net[3].weight[1] = 0
        net[3].bias[1] = 0.5
    assert "dead" not in reg.explain()
    optimizer = tr.optim.ProxAdam(net.parameters(), regularizer=reg)
    assert "dead" not in reg.explain()
    with torch.no_grad():
        net[3].bias[1] = 0.0
    assert "1 of 2 outputs dead under ReLU" in reg.explain()
    optimizer.attachment.remove()
    assert "dead" not in reg.explain(), "in the loss no weight is exactly zero for long"


def test_weights_without_data_are_not_counted():
    with torch.device("meta"):
        layer = nn.Linear(4, 3)
    reg = tr.Regularizer(layer, tr.L1(1e-3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg)
    assert "prox (SGD)" in reg.explain()


def test_weights_that_are_zero_and_pulled_elsewhere_are_not_dead():
    layer = nn.Linear(4, 3)
    reg = tr.Regularizer(layer, tr.L1(1e-3), toward=layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    tr.optim.attach(optimizer, reg)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    assert "dead" not in reg.explain()


def test_a_centered_variance_is_named():
    model = nn.Linear(3, 2)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = torch.optim.RMSprop(model.parameters(), centered=True)
    tr.optim.attach(optimizer, reg)
    assert "prox (RMSprop; its centered variance vanishes at a stationary point)" in reg.explain()
