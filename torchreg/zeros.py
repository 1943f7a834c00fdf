"""What is zero: how much of a network, and keeping it so."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchreg import tables, units
from torchreg.regularizer import Regularizer
from torchreg.selection import Selected, Selector, kind_of, named_parameters, select


@dataclass(frozen=True)
class LayerSparsity:
    """The exact zeros of one weight.

    Attributes:
        name: the parameter's dotted name.
        shape: its shape.
        weights, zeros: how many entries it has, and how many of them are exactly 0.
        inputs, dead_inputs: its input features or channels, and those whose every weight is 0.
        neurons, dead_neurons: its output features or channels, and those whose every weight is 0.
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
        """Plain numbers, for a log or JSON."""
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
        layers: one `LayerSparsity` a weight, in the model's order.
    """

    layers: tuple[LayerSparsity, ...]

    @property
    def weights(self) -> int:
        """The number of weights counted."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        """How many of them are exactly 0."""
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
        """Plain numbers, for a log or JSON: the total, and each layer under `layers`."""
        return {
            "weights": self.weights,
            "zeros": self.zeros,
            "fraction": self.fraction,
            "layers": {layer.name: layer.to_dict() for layer in self.layers},
        }

    def __str__(self) -> str:
        return table(self)


def sparsity(
    model: nn.Module | Regularizer, include: Selector | None = None, exclude: Selector | None = None
) -> Sparsity:
    """Counts exact zeros: in total, by layer, and the inputs and neurons that are dead.

    An input is dead if every weight that reads it is 0, a neuron if every weight into it is 0 (its bias aside).

    Args:
        model: a model, whose floating or complex weights with two or more dimensions count (frozen ones too, but no
            norm layers and no embeddings), or a regularizer, whose selected parameters count.
        include, exclude: other weights of the model; see `torchreg.select`.
    Returns:
        A `Sparsity`: prints as a table, and converts with `to_dict()`. One synchronization a device.
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
    entries = counted(model, include, exclude)
    counts: dict[torch.device, list[Tensor]] = {}
    for entry in entries:
        counts.setdefault(entry.parameter.device, []).append(count(units.nonzero(entry), entry.owner))
    # One stack and one read a device, however many layers there are.
    read = {device: iter(torch.stack(rows).tolist()) for device, rows in counts.items()}
    layers = []
    for entry in entries:
        parameter = entry.parameter
        numbers = next(read[parameter.device])
        layers.append(LayerSparsity(entry.name, tuple(parameter.shape), parameter.numel(), *numbers))
    return Sparsity(tuple(layers))


def counted(
    model: nn.Module | Regularizer, include: Selector | None = None, exclude: Selector | None = None
) -> list[Selected]:
    """The weights that `sparsity` counts, and errors, for the same arguments."""
    if isinstance(model, Regularizer):
        if include is not None or exclude is not None:
            raise ValueError("a regularizer has its selection; for another pass the model, with include")
        return [bound.selected for bound in model._current()]
    if include is not None or exclude is not None:
        return select(model, include, exclude)
    entries = [entry for entry in named_parameters(model) if not kind_of(entry)]
    if not entries:
        raise ValueError(f"{type(model).__name__} has no weight of two or more dimensions; name some: include=...")
    return entries


def table(found: Sparsity, **columns: Sequence[str]) -> str:
    """The table that `print` shows, with more columns at its end: by title, one text a layer and one for the total.

    >>> print(table(Sparsity((LayerSparsity("fc.weight", (2, 3), 6, 4, 3, 1, 2, 0),)), dtype=["float16", ""]))
    weight     shape  left   zeros  dead inputs  dead neurons  dtype
    ---------  -----  ----  ------  -----------  ------------  -------
    fc.weight  2×3       2  66.67%       1 of 3        0 of 2  float16
    total      6         2  66.67%
    """
    header, *rows = cells(found)
    rows = [[*row, *more] for row, *more in zip(rows, *columns.values(), strict=True)]
    return tables.render([*header, *columns], rows, right=[2, 3, 4, 5])


def cells(found: Sparsity) -> list[list[str]]:
    """The texts of that table: a header, a row for each layer, and one of the total."""
    rows = [["weight", "shape", "left", "zeros", "dead inputs", "dead neurons"]]
    rows += [
        [
            tables.printable(layer.name),
            tables.shape_text(layer.shape),
            f"{layer.weights - layer.zeros:,}",
            f"{layer.fraction:.2%}",
            f"{layer.dead_inputs} of {layer.inputs}",
            f"{layer.dead_neurons} of {layer.neurons}",
        ]
        for layer in found.layers
    ]
    left = found.weights - found.zeros
    return [*rows, ["total", f"{found.weights:,}", f"{left:,}", f"{found.fraction:.2%}", "", ""]]


class FrozenZeros:
    """The handle of `freeze_zeros`: `remove()` lets the zeros move again. Works as a `with` block too."""

    def __init__(self, kept: list[tuple[Tensor, Tensor, Tensor | None]], optimizer: Optimizer) -> None:
        self._kept = kept  # (parameter, where it is kept, at what: None is 0)
        handles: list[Any] = [optimizer.register_step_post_hook(self._restore)]
        # Gradients too, so that clipping by norm measures the weights that live.
        for parameter, zero, _ in kept:
            if parameter.requires_grad:
                clear = functools.partial(_clear_gradient, zero=zero)
                handles.append(parameter.register_post_accumulate_grad_hook(clear))
        # It ends with the optimizer too: a parameter must not lose gradients to a refit that is over.
        self._end = weakref.finalize(optimizer, _remove, handles)
        self._end.atexit = False

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, zero, anchor in self._kept:
            if anchor is None:
                parameter.masked_fill_(zero, 0)
            else:
                parameter.copy_(torch.where(zero, anchor, parameter))

    def remove(self) -> None:
        """Lets the zeros move again."""
        self._end()

    def __enter__(self) -> FrozenZeros:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@torch.no_grad()
def freeze_zeros(regularizer: Regularizer, optimizer: Optimizer) -> FrozenZeros:
    """Keeps every weight that is exactly 0 now at 0, through momentum and decay: for a refit of what is left.

    Only the selected parameters of `regularizer` are kept; a bias that starts at zero trains on. The gradients and
    the optimizer's state at the zeros are cleared, and each step ends with the zeros restored. Where the regularizer
    pulls toward w₀, it is the weights that are exactly w₀ that are kept. It ends with the optimizer.

    Args:
        regularizer: selects the parameters.
        optimizer: the optimizer of the refit; it holds all of them.
    Returns:
        A handle: `remove()`, or a `with` block, ends it.
    Raises:
        TypeError: what is given is no regularizer or no optimizer.
        ValueError: the optimizer lacks a selected parameter; nothing has changed.

    A copy of the three, or a run resumed from a checkpoint, is not frozen: call it again there.

    >>> model = nn.Linear(2, 1)
    >>> _ = nn.init.zeros_(model.weight)
    >>> reg = Regularizer(model, L1(1e-2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with reg.disabled(), freeze_zeros(reg, optimizer):
    ...     (model(torch.ones(1, 2)) - 1).square().sum().backward()
    ...     optimizer.step()
    >>> model.weight.detach()
    tensor([[0., 0.]])
    """
    if not isinstance(regularizer, Regularizer):
        raise TypeError(
            f"expected a Regularizer, which selects what is frozen, got {type(regularizer).__name__}; "
            "build one: Regularizer(model, L1(1e-4))"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the optimizer of the refit"
        )
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    bounds = regularizer._current()
    if missing := [bound.name for bound in bounds if id(bound.parameter()) not in own]:
        raise ValueError(
            f"{type(optimizer).__name__} does not hold the selected {', '.join(missing)}, whose zeros it would have to "
            "keep; give it these parameters, or exclude them from the regularizer"
        )
    kept = []
    for bound in bounds:
        parameter = bound.parameter()
        anchor = None if bound.anchor is None else bound.anchor.to(parameter.dtype)
        zero = parameter == (0 if anchor is None else anchor)
        kept.append((parameter, zero, anchor))
        for key, value in optimizer.state.get(parameter, {}).items():
            if key != "step" and isinstance(value, Tensor) and value.shape == zero.shape:
                _clear(value, zero)
        _clear(parameter.grad, zero)
    return FrozenZeros(kept, optimizer)


@torch.no_grad()
def copy_zeros_(regularizer: Regularizer, model: nn.Module) -> None:
    """Sets the weights of `model`, an average of the regularizer's model over time, to 0 where that one is exactly 0.

    A mean of iterates (SWA, EMA) is 0 only where all of them were. The last proximal iterate knows the support: where
    that holds the solution's, each weight of the average comes nearer to the solution or stays. Call it before each
    evaluation of the average, and before `update_bn`; averaging may go on from there. Where the regularizer pulls
    toward w₀, the weights that are exactly w₀ are copied.

    Args:
        regularizer: selects the parameters; its model has been trained with a prox.
        model: has the same names and shapes, wrapped (`AveragedModel`) or not.
    Raises:
        TypeError: what is given is no regularizer or no model.
        ValueError: `model` lacks a selected parameter, or has it in another shape; nothing has changed.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> average = torch.optim.swa_utils.AveragedModel(model)
    >>> with torch.no_grad():
    ...     _ = average.module.weight.copy_(torch.tensor([[0.5, 1e-3]]))
    ...     _ = model.weight.copy_(torch.tensor([[0.75, 0.0]]))
    >>> copy_zeros_(Regularizer(model, L1(1e-2)), average)
    >>> average.module.weight.detach()
    tensor([[0.5000, 0.0000]])
    """
    if not isinstance(regularizer, Regularizer):
        raise TypeError(
            f"expected a Regularizer, whose model has the zeros, got {type(regularizer).__name__}; "
            "build one: Regularizer(model, L1(1e-4))"
        )
    bounds = regularizer._current()
    places = {name: entry for entry in named_parameters(model) for name in entry.names}
    for bound in bounds:
        shape = tuple(bound.parameter().shape)
        if bound.name not in places:
            raise ValueError(
                f"{type(model).__name__} has no {bound.name}, which the regularizer selects; pass a copy or an average "
                "of the regularizer's model (of a wrapper of one's own, its inner module)"
            )
        if (other := tuple(places[bound.name].parameter.shape)) != shape:
            raise ValueError(f"{bound.name} has shape {other} in what is given and {shape} in the regularizer's model")
    for bound in bounds:
        source, w = bound.parameter(), places[bound.name].parameter
        if bound.anchor is None:
            w.masked_fill_((source == 0).to(w.device), 0)
        else:
            anchor = bound.anchor.to(source)
            w.copy_(torch.where((source == anchor).to(w.device), anchor.to(w), w))


def count(alive: Tensor, owner: nn.Module | None = None) -> Tensor:
    """[zeros, inputs, dead inputs, neurons, dead neurons] of a weight, on its device.

    Args:
        alive: which of its entries are not 0.
        owner: the module that holds it; without one it is taken for a linear layer or a plain convolution.

    >>> count(torch.tensor([[True, False, True], [False, False, False]])).tolist()
    [4, 3, 1, 2, 1]
    """
    # Counting the others is ten times as fast as a sum of booleans.
    zeros = alive.numel() - alive.count_nonzero()
    inputs, neurons = units.alive_units(alive, owner)
    sizes = [torch.full_like(zeros, count) for count in (inputs.numel(), neurons.numel())]
    return torch.stack([zeros, sizes[0], (~inputs).sum(), sizes[1], (~neurons).sum()])


def _clear_gradient(parameter: Tensor, zero: Tensor) -> None:
    _clear(parameter.grad, zero)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _clear(tensor: Tensor | None, zero: Tensor) -> None:
    if tensor is not None:
        tensor.masked_fill_(zero, 0)
