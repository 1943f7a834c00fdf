"""The exact zeros of a network: counts, dead inputs and dead neurons, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchreg._tables import printable, render_table, shape_text
from torchreg.binding import connectivity
from torchreg.binding.regularizer import Regularizer
from torchreg.binding.selection import ParameterRef, Selector, kind_of, named_parameters, select


@dataclass(frozen=True)
class LayerSparsity:
    """The exact zeros of one weight.

    Attributes:
        name: the parameter's dotted name.
        shape: its shape.
        weights, zeros: the number of its entries, and of those that are exactly 0.
        inputs, dead_inputs: the number of its input features or channels, and of those whose weights are all 0.
        neurons, dead_neurons: the number of its output features or channels, and of those whose weights are all 0.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    inputs: int
    dead_inputs: int
    neurons: int
    dead_neurons: int

    @property
    def fraction(self) -> float:
        """Zeros over weights; 0 for an empty weight."""
        return self.zeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The numbers of this weight, for a log or JSON."""
        return {
            "shape": list(self.shape),
            "weights": self.weights,
            "zeros": self.zeros,
            "fraction": self.fraction,
            "inputs": self.inputs,
            "dead_inputs": self.dead_inputs,
            "neurons": self.neurons,
            "dead_neurons": self.dead_neurons,
        }


@dataclass(frozen=True)
class Sparsity:
    """The exact zeros of a network, total and by layer; `print` shows a table.

    Attributes:
        layers: one `LayerSparsity` per weight, in the order of the model.
    """

    layers: tuple[LayerSparsity, ...]

    @property
    def weights(self) -> int:
        """The number of weights counted."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """The number of weights that are exactly 0."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def fraction(self) -> float:
        """Zeros over weights; 0 for an empty network."""
        return self.zeros / self.weights if self.weights else 0.0

    def __getitem__(self, name: str) -> LayerSparsity:
        """The layer of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; the layers are {[layer.name for layer in self.layers]}")

    def to_dict(self) -> dict[str, Any]:
        """The numbers for a log or JSON: the total, and each layer under `layers`."""
        return {
            "weights": self.weights,
            "zeros": self.zeros,
            "fraction": self.fraction,
            "layers": {layer.name: layer.to_dict() for layer in self.layers},
        }

    def __str__(self) -> str:
        return sparsity_table(self)


def sparsity(
    model: nn.Module | Regularizer, include: Selector | None = None, exclude: Selector | None = None
) -> Sparsity:
    """Counts exact zeros, in total and by layer, and the dead inputs and neurons.

    An input is dead if every weight that reads it is 0. A neuron is dead if every weight of it is 0, whatever its bias.

    Args:
        model: a model, whose floating or complex weights with two or more dimensions count (frozen ones too, but no
            norm layers and no embeddings), or a regularizer, whose selected parameters count.
        include, exclude: other weights of the model; see `torchreg.select`.
    Returns:
        A `Sparsity`, which prints as a table and has `to_dict()`. Counting synchronizes with each device once.
    Raises:
        ValueError: there is nothing to count, or a selector matches nothing.

    >>> net = nn.Sequential(nn.Linear(3, 2))
    >>> with torch.no_grad():
    ...     _ = net[0].weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]))
    >>> print(sparsity(net))
    weight    shape  left   zeros  dead inputs  dead neurons
    --------  -----  ----  ------  -----------  ------------
    0.weight  2×3       3  50.00%       1 of 3        0 of 2
    total     6         3  50.00%
    """
    entries = counted_weights(model, include, exclude)
    counts: dict[torch.device, list[Tensor]] = {}
    for entry in entries:
        counts.setdefault(entry.parameter.device, []).append(zero_counts(connectivity.nonzero(entry), entry.owner))
    # One stack and one read per device, for any number of layers.
    rows = {device: iter(torch.stack(tensors).tolist()) for device, tensors in counts.items()}
    layers = []
    for entry in entries:
        parameter = entry.parameter
        numbers = next(rows[parameter.device])
        layers.append(LayerSparsity(entry.name, tuple(parameter.shape), parameter.numel(), *numbers))
    return Sparsity(tuple(layers))


def counted_weights(
    model: nn.Module | Regularizer, include: Selector | None = None, exclude: Selector | None = None
) -> list[ParameterRef]:
    """The weights that `sparsity` counts for the same arguments, with its errors."""
    if isinstance(model, Regularizer):
        if include is not None or exclude is not None:
            raise ValueError("a regularizer already has a selection; for another one pass the model and include")
        return [binding.selected for binding in model.bindings()]
    if include is not None or exclude is not None:
        return select(model, include, exclude)
    entries = [entry for entry in named_parameters(model) if not kind_of(entry)]
    if not entries:
        raise ValueError(f"{type(model).__name__} has no weight of two or more dimensions; name some: include=...")
    return entries


def sparsity_table(sparsity: Sparsity, **columns: Sequence[str]) -> str:
    """The table that `print` shows, with more columns at its end: by title, one text per layer and one for the total.

    >>> print(sparsity_table(Sparsity((LayerSparsity("fc.weight", (2, 3), 6, 4, 3, 1, 2, 0),)), dtype=["float16", ""]))
    weight     shape  left   zeros  dead inputs  dead neurons  dtype
    ---------  -----  ----  ------  -----------  ------------  -------
    fc.weight  2×3       2  66.67%       1 of 3        0 of 2  float16
    total      6         2  66.67%
    """
    header, *rows = sparsity_cells(sparsity)
    rows = [[*row, *cells] for row, *cells in zip(rows, *columns.values(), strict=True)]
    return render_table([*header, *columns], rows, right=[2, 3, 4, 5])


def sparsity_cells(sparsity: Sparsity) -> list[list[str]]:
    """The texts of the table: a header, a row for each layer, and a row of the total."""
    rows = [["weight", "shape", "left", "zeros", "dead inputs", "dead neurons"]]
    rows += [
        [
            printable(layer.name),
            shape_text(layer.shape),
            f"{layer.weights - layer.zeros:,}",
            f"{layer.fraction:.2%}",
            f"{layer.dead_inputs} of {layer.inputs}",
            f"{layer.dead_neurons} of {layer.neurons}",
        ]
        for layer in sparsity.layers
    ]
    n_nonzero = sparsity.weights - sparsity.zeros
    return [*rows, ["total", f"{sparsity.weights:,}", f"{n_nonzero:,}", f"{sparsity.fraction:.2%}", "", ""]]


def zero_counts(alive: Tensor, owner: nn.Module | None = None) -> Tensor:
    """[zeros, inputs, dead inputs, neurons, dead neurons] of a weight, on its device.

    Args:
        alive: whether each entry is nonzero.
        owner: the module of the weight; without it the weight counts as that of a linear layer or plain convolution.

    >>> zero_counts(torch.tensor([[True, False, True], [False, False, False]])).tolist()
    [4, 3, 1, 2, 1]
    """
    # count_nonzero is ten times as fast as a sum of booleans.
    zeros = alive.numel() - alive.count_nonzero()
    inputs, neurons = connectivity.alive_units(alive, owner)
    sizes = [torch.full_like(zeros, count) for count in (inputs.numel(), neurons.numel())]
    return torch.stack([zeros, sizes[0], (~inputs).sum(), sizes[1], (~neurons).sum()])
