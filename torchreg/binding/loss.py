"""RegularizedLoss: any loss with a regularizer added."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.binding.regularizer import Regularizer


class LastLoss:
    """The parts of the last loss, read as numbers. Reading one waits for the device; keeping it costs nothing.

    Attributes:
        on_device: the wrapped loss alone, still on its device; reading it waits for nothing.

    >>> LastLoss(torch.tensor(2.0), {"l1": torch.tensor(0.25), "l2": torch.tensor(0.5)}).penalty
    0.75
    """

    def __init__(self, data: Tensor, by_term: Mapping[str, Tensor]) -> None:
        self.on_device = data
        self._by_term = by_term

    @property
    def data(self) -> float:
        """The wrapped loss alone."""
        return float(self.on_device)

    @property
    def penalty(self) -> float:
        """The penalty that was added; 0 where none was (in evaluation, or while the regularizer is disabled)."""
        return float(sum(self.by_term.values()))

    @property
    def total(self) -> Tensor:
        """Their sum, still on its device."""
        total = self.on_device
        for value in self._by_term.values():
            total = total + value.to(total.device)
        return total

    @property
    def by_term(self) -> dict[str, float]:
        """The penalty of each term, by its key; empty in evaluation."""
        return {key: float(value) for key, value in self._by_term.items()}

    def __repr__(self) -> str:
        return f"LastLoss(data={self.data:.6g}, penalty={self.penalty:.6g})"


class RegularizedLoss(nn.Module):
    """loss(...) + reg(), in training mode with gradients enabled; loss(...) alone elsewhere.

    So a validation loss is never polluted: call `criterion.eval()`, or evaluate under `torch.no_grad()`.
    Parameters that a proximal optimizer holds add their value without a gradient: the sum is the true objective.

    Args:
        loss: any callable that returns a scalar: a module, a function, a lambda. It gets all arguments as they are.
        regularizer: what is added.
    Attributes:
        last: the parts of the last call: `last.data`, `last.penalty`, `last.by_term`.
    Raises:
        TypeError: `loss` cannot be called, or is a class; the result is not a tensor.
        ValueError: the result is not a scalar (use `reduction="mean"`).

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> criterion = RegularizedLoss(nn.MSELoss(), Regularizer(model, L1(0.5)))
    >>> criterion(model(torch.ones(1, 2)), torch.zeros(1, 1)).item()
    5.0
    >>> criterion.last
    LastLoss(data=4, penalty=1)
    >>> criterion.eval()(model(torch.ones(1, 2)), torch.zeros(1, 1)).item()
    4.0
    """

    last: LastLoss | None

    def __init__(self, loss: Callable[..., Tensor], regularizer: Regularizer) -> None:
        super().__init__()
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(
                f"loss={loss!r} cannot be called as a loss; pass an instance or a function: nn.CrossEntropyLoss()"
            )
        if not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"regularizer is a {type(regularizer).__name__}; build one first: Regularizer(model, L1(1e-4))"
            )
        self.loss = loss
        self.regularizer = regularizer
        self.last = None
        self._warned = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        data = self.loss(*args, **kwargs)
        if not isinstance(data, Tensor):
            raise TypeError(f"the loss returned a {type(data).__name__}; it must return a scalar tensor")
        if data.dim() != 0:
            raise ValueError(
                f"the loss has shape {tuple(data.shape)} and is not a scalar; reduce it first, as with reduction='mean'"
            )
        # A copy: `loss /= accumulation` in the caller would write through it.
        alone = data.detach().clone()
        if not (self.training and torch.is_grad_enabled()):
            self.last = LastLoss(alone, {})
            return data
        if not self.regularizer.model.training and not self._warned:
            self._warned = True
            warnings.warn(
                "the penalty is added to a loss of a model in evaluation mode, with gradients enabled. If this is "
                "validation, call criterion.eval() or use torch.no_grad()",
                stacklevel=2,
            )
        by_term = self.regularizer.components()
        self.last = LastLoss(alone, {key: value.detach() for key, value in by_term.items()})
        for value in by_term.values():
            data = data + value.to(data.device)
        return data

    def extra_repr(self) -> str:
        return f"terms={list(self.regularizer.terms)}"
