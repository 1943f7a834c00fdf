"""What the benchmarks of single steps share: the weights of three networks, and a user's own prox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Shapes = list[tuple[int, ...]]
LAMBDA = 1e-6


def lenet() -> Shapes:
    """LeNet-300-100."""
    return [(300, 784), (300,), (100, 300), (100,), (10, 100), (10,)]


def resnet50() -> Shapes:
    """Convolutions, two vectors a norm layer, and the classifier: 161 tensors, 25.6 M weights."""
    convolutions: Shapes = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return [shape for c in convolutions for shape in (c, c[:1], c[:1])] + [(1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """GPT-2 small: 148 tensors, 124.4 M weights."""
    block: Shapes = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


NETWORKS: dict[str, Callable[[], Shapes]] = {"LeNet-300-100": lenet, "ResNet-50": resnet50, "GPT-2 small": gpt2}


class Weights(nn.Module):
    """Parameters of given shapes, with gradients, and no forward pass."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.all = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.05) for shape in shapes])
        for w in self.all:
            w.grad = torch.randn_like(w) * 0.01


def users_loop(optimizer: Any) -> None:
    """The stock step as it comes, then w ← sign(w)·max(|w| − s·λ, 0), with the step of the metric for each weight."""
    optimizer.step()
    with torch.no_grad():
        for group in optimizer.param_groups:
            for w in group["params"]:
                if w.dim() < 2:
                    continue
                step: Any = group["lr"]
                if "betas" in group:
                    state = optimizer.state[w]
                    correction = (1 - group["betas"][1] ** state["step"].item()) ** 0.5
                    step = step / (state["exp_avg_sq"].sqrt() / correction + group["eps"])
                else:
                    step = step / (1 - group["momentum"])
                w.copy_(torch.sign(w) * torch.relu(w.abs() - step * LAMBDA))
