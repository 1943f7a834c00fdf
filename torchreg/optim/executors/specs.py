"""Optimizers as the kernels know them: settings, buffers and numbers, and the unit response of a momentum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from torchreg.kernels.step_tables import AdamNumbers, SGDNumbers
from torchreg.optim.step_sizes import Group, as_number
from torchreg.penalties.coefficients import L1L2


class Spec(ABC):
    """One stock optimizer, as the kernels step it.

    Attributes:
        stock: the class.
        kernel: the name of its function in the native library and in Triton's kernels.
        counts: its state has a count of steps that the kernel needs.
    """

    stock: type[Optimizer]
    kernel: ClassVar[str]
    counts: ClassVar[bool]

    def __init__(self, stock: type[Optimizer]) -> None:
        self.stock = stock

    @abstractmethod
    def buffers(self, group: Group) -> Sequence[str]:
        """The names of a parameter's buffers in the order of the kernel's table; "" for one that is not used."""

    @abstractmethod
    def numbers(self, group: Group, strengths: L1L2, key: int) -> AdamNumbers | SGDNumbers:
        """The row of numbers of a parameter; the unit response of a momentum is filled in at each step."""

    @abstractmethod
    def unit_response(self, group: Group) -> tuple[float, float, float, float] | None:
        """(a, b, p, q), where the momentum of a constant 1 goes c ← a·c + b and the response over lr is p + q·c."""


class AdamSpec(Spec):
    """Adam and AdamW."""

    kernel = "adam"
    counts = True

    def buffers(self, group: Group) -> Sequence[str]:
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else ""

    def unit_response(self, group: Group) -> tuple[float, float, float, float]:
        beta1 = group["betas"][0]
        return beta1, 1 - beta1, 0.0, 1.0

    def numbers(self, group: Group, strengths: L1L2, key: int) -> AdamNumbers:
        return AdamNumbers(
            unit=0.0,
            lr=as_number(group["lr"]),
            decay=group["weight_decay"],
            # AdamW of torch before 2.7 has no such key.
            decoupled=group.get("decoupled_weight_decay", self.stock is AdamW),
            sign=-1.0 if group["maximize"] else 1.0,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            key=key,
            strength1=strengths.l1,
            strength2=strengths.l2,
        )


class SGDSpec(Spec):
    """SGD, with and without momentum."""

    kernel = "sgd"
    counts = False

    def buffers(self, group: Group) -> Sequence[str]:
        return ("momentum_buffer" if group["momentum"] != 0 else "",)

    def unit_response(self, group: Group) -> tuple[float, float, float, float] | None:
        momentum = group["momentum"]
        if momentum == 0:
            return None
        return momentum, 1 - group["dampening"], *((1.0, momentum) if group["nesterov"] else (0.0, 1.0))

    def numbers(self, group: Group, strengths: L1L2, key: int) -> SGDNumbers:
        return SGDNumbers(
            unit=1.0,
            lr=as_number(group["lr"]),
            decay=group["weight_decay"],
            sign=-1.0 if group["maximize"] else 1.0,
            momentum=group["momentum"],
            gain=1 - group["dampening"],
            ahead=group["momentum"] if group["nesterov"] else 0.0,
            key=key,
            strength1=strengths.l1,
            strength2=strengths.l2,
        )


SPECS: dict[type[Optimizer], type[Spec]] = {SGD: SGDSpec, Adam: AdamSpec, AdamW: AdamSpec}

NUMBERS = ("weight_decay", "momentum", "dampening", "eps")
"""The settings that the kernels take as plain numbers, beside the betas and lr."""


def supports(group: Group, lr_is_readable: bool) -> bool:
    """The kernels can step this group: it leaves the choice of an implementation open, and its settings are numbers.

    Args:
        lr_is_readable: a learning rate that is a tensor lies where the kernel's tables are written.
    """
    lr = group["lr"]
    return (
        group["foreach"] is None
        and group["fused"] is not False
        and not group["differentiable"]
        and not (isinstance(lr, Tensor) and (lr.requires_grad or not lr_is_readable))
        and not any(isinstance(x, Tensor) for x in (*group.get("betas", ()), *(group.get(key) for key in NUMBERS)))
    )


def layout_settings(group: Group) -> list[Any]:
    """The settings that shape the tables: all but lr, which schedulers change at every step and which is written in."""
    return [value for key, value in group.items() if key not in ("params", "lr", "initial_lr")]
