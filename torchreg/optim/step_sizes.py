"""Each optimizer's step for the prox: its unit response.

By how much would this step have moved a weight whose gradient had been the constant 1, in the direction and scale
that the optimizer's state gives it? A prox with that step has the penalty's own stationary points: at a weight that
rests, the optimizer moves by step·gradient and the prox back by step·λ, so gradient + λ·∂|w| = 0 whatever the
learning rate, the momentum or the preconditioner.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from torchreg import checks
from torchreg.checks import Step


class StepSize(Protocol):
    """The prox step of one parameter, asked for once after every real step in which it had a gradient and a penalty.

    An object with a method `before(optimizer, group, parameter)` is told of each parameter just before the step, while
    the optimizer's state is still the old one, and is asked after it even where the strength is 0; one with
    `forget(optimizer, parameter)` is told of the prox's removal.
    """

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step: ...


class SGDStep:
    """lr·c, where c is SGD's own momentum buffer driven by a constant 1; with Nesterov lr·(1 + μ·c).

    c starts at 1 and goes c ← μ·c + (1 − dampening), so it is right from the first step on and under a cycled
    momentum. It stands in the optimizer's state as `unit_momentum`. Where the state has a momentum buffer and no
    c, as after loading a checkpoint of the stock optimizer, c starts at its limit (1 − dampening)/(1 − μ).
    """

    KEY = "unit_momentum"

    def before(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
        momentum = _number(group["momentum"])
        if momentum == 0:
            return
        state = optimizer.state.get(parameter, {})
        if state.get("momentum_buffer") is not None and self.KEY not in state and momentum < 1:
            state[self.KEY] = (1 - group["dampening"]) / (1 - momentum)

    def forget(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Once removed, nobody follows the momentum: when attached again, it counts as built up."""
        optimizer.state.get(parameter, {}).pop(self.KEY, None)

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        lr, momentum = _number(group["lr"]), _number(group["momentum"])
        if momentum == 0:
            return lr
        state = optimizer.state[parameter]
        old = state.get(self.KEY)
        new = 1.0 if old is None else momentum * old + (1 - group["dampening"])
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            # A fused optimizer skips a step without telling the host: neither does its momentum build up.
            found, kept = _number(found_inf.reshape(())), 0.0 if old is None else old
            new = torch.where(found > 0, kept, new) if isinstance(found, Tensor) else kept if found else new
        state[self.KEY] = new
        return lr * (1 + momentum * new) if group["nesterov"] else lr * new


class AdamStep:
    """lr/(√v̂ + ε), with the optimizer's own bias correction and amsgrad's maximum. In float32 or wider.

    AdamW's decay is decoupled from the gradient, so it is no part of the response.
    """

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        state = optimizer.state[parameter]
        square = checks.widened(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
        lr, beta2 = _number(group["lr"]), _number(group["betas"][1])
        count = _number(state["step"])
        if isinstance(count, Tensor):  # on the device; 1 − β₂ᵗ in float32 would cancel
            correction: Any = (-torch.expm1(count * math.log(beta2))).sqrt()
        else:
            correction = math.sqrt(1 - beta2**count) or 1.0  # no step yet: the first one was skipped
        if square.requires_grad:  # a differentiable step
            return lr / (square.sqrt() / correction + group["eps"])
        # In place: most of the cost of a step is the page faults of fresh memory. And a CPU's sqrt is ten times slower
        # on zeros, of which a sparse net has many; 1/rsqrt is not.
        root = square.rsqrt().reciprocal_()
        step = root.div_(correction).add_(group["eps"]).reciprocal_().mul_(lr)
        # Without ε a weight that never had a gradient has an infinite step, and 0·∞ would be NaN where λ is 0.
        return step if group["eps"] > 0 else step.clamp_(max=torch.finfo(step.dtype).max)


sgd_step = SGDStep()
adam_step = AdamStep()


def learning_rate(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
    """The learning rate of the parameter's group as the prox step, for `attach(..., step_size=learning_rate)`.

    It is the unit response of plain SGD. Under momentum or a preconditioner it solves another problem than the one
    written: under Adam with a penalty λ its stationary points are those of λ·(√v̂ + ε), another λ for each weight.
    """
    return _number(group["lr"])


STOCK: dict[type[Optimizer], StepSize] = {SGD: sgd_step, Adam: adam_step, AdamW: adam_step}
STEP_SIZES = dict(STOCK)
"""By exact class, the swap-ins too: a subclass may step otherwise."""


def step_size_of(optimizer: Optimizer) -> StepSize:
    """The unit response of a stock optimizer.

    Raises:
        ValueError: this class has none that is known.
    """
    try:
        return STEP_SIZES[type(optimizer)]
    except KeyError:
        raise ValueError(
            f"{type(optimizer).__name__} has no known unit response, so no prox step gives the penalty its own "
            f"solution; use one of {', '.join(kind.__name__ for kind in STOCK)}, add reg() to the loss, or pass "
            "step_size=fn(optimizer, group, parameter)"
        ) from None


def _number(value: Any) -> Any:
    """A tensor setting as a number where reading it costs no synchronization: on the CPU, outside a graph."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and not value.requires_grad:
        return value if torch.compiler.is_compiling() else value.item()
    return value
