"""Zeros that stay zero: freeze them for a refit, or copy them to another model."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchreg.binding.regularizer import Regularizer
from torchreg.binding.selection import named_parameters
from torchreg.optim.step_hooks import unwrapped_optimizer


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
        TypeError: an argument is not a regularizer or not an optimizer.
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
    optimizer = unwrapped_optimizer(optimizer)
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    bindings = regularizer.bindings()
    if missing := [binding.name for binding in bindings if id(binding.parameter()) not in own]:
        raise ValueError(
            f"{type(optimizer).__name__} does not hold the selected {', '.join(missing)}, whose zeros it would have to "
            "keep; give it these parameters, or exclude them from the regularizer"
        )
    kept = []
    for binding in bindings:
        parameter = binding.parameter()
        anchor = None if binding.anchor is None else binding.anchor.to(parameter.dtype)
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
        TypeError: an argument is not a regularizer or not a model.
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
    bindings = regularizer.bindings()
    places = {name: entry for entry in named_parameters(model) for name in entry.names}
    for binding in bindings:
        shape = tuple(binding.parameter().shape)
        if binding.name not in places:
            raise ValueError(
                f"{type(model).__name__} has no {binding.name}, which the regularizer selects; pass a copy or an "
                f"average "
                "of the regularizer's model (of a wrapper of one's own, its inner module)"
            )
        if (other := tuple(places[binding.name].parameter.shape)) != shape:
            raise ValueError(
                f"{binding.name} has shape {other} in what is given and {shape} in the regularizer's model"
            )
    for binding in bindings:
        source, w = binding.parameter(), places[binding.name].parameter
        if binding.anchor is None:
            w.masked_fill_((source == 0).to(w.device), 0)
        else:
            anchor = binding.anchor.to(source)
            w.copy_(torch.where((source == anchor).to(w.device), anchor.to(w), w))


def _clear_gradient(parameter: Tensor, zero: Tensor) -> None:
    _clear(parameter.grad, zero)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _clear(tensor: Tensor | None, zero: Tensor) -> None:
    if tensor is not None:
        tensor.masked_fill_(zero, 0)
