"""Each optimizer's step for the prox: its unit response.

By how much would this step have moved a weight whose gradient had been the constant 1, in the direction and scale
that the optimizer's state gives it? A prox with that step has the penalty's own stationary points: at a weight that
rests, the optimizer moves by step·gradient and the prox back by step·λ, so gradient + λ·∂|w| = 0 whatever the
learning rate, the momentum or the preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from torchreg._distributed import local_part, unsharded
from torchreg._tensors import Step, widened

PIECE = 1 << 16
"""Weights at a time where a CPU goes through a large parameter: its processors' caches hold what belongs to them."""


class StepSize(Protocol):
    """The prox step of one parameter, asked for once after every real step in which it had a gradient and a penalty.

    Three things are optional. An object with a method `before(optimizer, group, parameter)` is told of each parameter
    just before the update, while the optimizer's state is still the old one; the function that it may return is asked
    in its stead after this one update. One with `follow(optimizer, group, parameter)` is told so of the updates at
    strength 0, which need no step but build up a momentum. One with `forget(optimizer, parameter)` is told of the
    prox's removal.

    `torchreg.testing.check_step_size` certifies one.
    """

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step: ...


# ---------------------------------------------------------------------- momentum


class Followed:
    """A step that follows the optimizer's momentum in a number of its own, which stands in the optimizer's state."""

    KEY: ClassVar[str] = "unit_momentum"

    def follow(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
        """An update without a prox, through which the momentum builds up all the same."""
        raise NotImplementedError

    def forget(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Once removed, nobody follows the momentum: when attached again, it counts as built up."""
        optimizer.state.get(parameter, {}).pop(self.KEY, None)


class BuildUp(Followed):
    """A momentum buffer driven by a constant 1: c ← μ·c + gain.

    Where the state has a momentum buffer and no c, as after loading a checkpoint of the stock optimizer, c starts at
    its limit, gain/(1 − μ).
    """

    def before(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
        momentum = _number(group["momentum"])
        state = optimizer.state.get(parameter, {})
        if 0 < momentum < 1 and self.KEY not in state and state.get("momentum_buffer") is not None:
            state[self.KEY] = self._gain(group) / (1 - momentum)

    def follow(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
        if _number(group["momentum"]) != 0:
            self._advanced(optimizer, group, parameter)

    def _gain(self, group: dict[str, Any]) -> Any:
        return 1.0

    def _advanced(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Any:
        """c after this step; its first value is 1, whatever the gain."""
        state = optimizer.state[parameter]
        old = _number(state.get(self.KEY))  # a compiled step leaves a tensor
        if old is None:
            # Distributed checkpoints build the state by a step of zeros at lr 0, which pushes no momentum.
            idle = not isinstance(group["lr"], Tensor) and group["lr"] == 0 and _is_zero(parameter.grad)
            new: Any = 0.0 if idle else 1.0
        else:
            new = _number(group["momentum"]) * old + self._gain(group)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            # A fused optimizer skips a step without telling the host: neither does its momentum build up.
            found, kept = _number(found_inf.reshape(())), 0.0 if old is None else old
            new = torch.where(found > 0, kept, new) if isinstance(found, Tensor) else kept if found else new
        if torch.compiler.is_compiling():  # a graph would be one of that number
            new = torch.as_tensor(new, dtype=widened(parameter).real.dtype, device=parameter.device)
        state[self.KEY] = new
        return new


class SGDStep(BuildUp):
    """lr·c, where c is SGD's own momentum buffer driven by a constant 1; with Nesterov lr·(1 + μ·c).

    c starts at 1 and goes c ← μ·c + (1 − dampening), so it is right from the first step on and under a cycled
    momentum.
    """

    def _gain(self, group: dict[str, Any]) -> Any:
        return 1 - group["dampening"]

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        lr, momentum = _number(group["lr"]), _number(group["momentum"])
        if momentum == 0:
            return lr
        c = self._advanced(optimizer, group, parameter)
        return lr * (1 + momentum * c) if group["nesterov"] else lr * c


class ASGDStep:
    """η, which ASGD renews after each update: it is read before it.

    ASGD's own `lambd` (1e-4 unless changed) is a penalty too: it adds L2(lambd/2) to the problem.
    """

    def before(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Callable[[], Step]:
        eta = self(optimizer, group, parameter)
        eta = eta.clone() if isinstance(eta, Tensor) else eta
        return lambda: eta

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        eta = optimizer.state.get(parameter, {}).get("eta")
        if eta is None:  # before the first update, which rounds lr to its counters' type
            lr, double = group["lr"], torch.get_default_dtype() == torch.float64
            place = lr.device if isinstance(lr, Tensor) else "cpu"  # and not the default device
            eta = torch.as_tensor(lr, dtype=torch.float64 if double else torch.float32, device=place)
        return _number(eta)


# ---------------------------------------------------------------------- a metric of each weight


class Diagonal:
    """lr over a running size of each weight's gradient: a step that is a tensor, with a number for each weight."""


class AdagradStep(Diagonal):
    """lr/(1 + (t − 1)·lr_decay)/(√Σg² + ε), with the initial accumulator in the sum."""

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        state = optimizer.state[parameter]
        before = abs(_number(state["step"]) - 1)  # not −1, which a first step skipped by the GradScaler leaves
        lr = _number(group["lr"]) / (1 + before * group["lr_decay"])
        return _over(lr, _root(state["sum"]), group["eps"])


class AdadeltaStep(Diagonal):
    """lr·√(E[Δ²] + ε)/√(E[g²] + ε), with E[Δ²] as it was before the update and E[g²] as it is after it."""

    def before(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Callable[[], Step]:
        moved = optimizer.state.get(parameter, {}).get("acc_delta")
        moved = torch.zeros_like(parameter) if moved is None else moved.clone()
        return lambda: self._of(optimizer, group, parameter, moved)

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        return self._of(optimizer, group, parameter, optimizer.state[parameter]["acc_delta"])

    def _of(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, moved: Tensor) -> Step:
        square = optimizer.state[parameter]["square_avg"]
        moved, square = (_here(x) + group["eps"] for x in (moved, square))
        return _number(group["lr"]) * (moved / square).sqrt()


class AdafactorStep(Diagonal):
    """α/(√v̂·max(1, RMS(g/√v̂)/d)): v̂ from the row and column means, α = min(lr, 1/√t)·max(ε₂, RMS(w) before)."""

    def before(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Callable[[], Step]:
        size = _root_mean_square(parameter)
        return lambda: self._of(optimizer, group, parameter, size)

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        return self._of(optimizer, group, parameter, _root_mean_square(parameter))

    def _of(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, size: Tensor) -> Step:
        state, floor, (eps1, eps2) = optimizer.state[parameter], torch.finfo(parameter.dtype).eps, group["eps"]
        eps1 = floor if eps1 is None else eps1
        if "variance" in state:
            square = widened(state["variance"])
        else:
            rows, columns = widened(state["row_var"]), widened(state["col_var"])
            square = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp(min=eps1)
        scale = square.clamp(min=eps1 * eps1).rsqrt()
        assert parameter.grad is not None  # it has just taken a step
        clipped = (_root_mean_square(parameter.grad * scale) / group["d"]).clamp(min=1)
        lr = min(_number(group["lr"]), 1 / math.sqrt(_number(state["step"])))
        return scale * (lr * size.clamp(min=eps2) / clipped)


class RMSpropStep(BuildUp, Diagonal):
    """lr·c/(√v + ε); centered: v less the square of the mean gradient.

    c is the build-up of the momentum, as in SGD. The buffer adds up gradients over the √v of their own steps, so with
    momentum the response is exact in the limit, once √v has settled; without, at every step. Under a constant
    gradient the centered v cancels to rounding errors, and so does the response.
    """

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        state, lr = optimizer.state[parameter], _number(group["lr"])
        square = _here(state["square_avg"])
        if group["centered"]:
            mean = _here(state["grad_avg"])
            square = torch.addcmul(square, mean, mean, value=-1).clamp(min=0)
        if _number(group["momentum"]) > 0:
            lr = lr * self._advanced(optimizer, group, parameter)
        return _over(lr, _root(square), group["eps"])


# ---------------------------------------------------------------------- Adam's kin


class AdamKin(Followed, Diagonal):
    """m̂ over a running size, where m̂ is the mean of a constant 1 under the optimizer's own bias correction.

    m̂ is 1 while β₁ stays as it is. Under a cycled one (the default of `OneCycleLR`) the mean is 1 − Πβ₁ and its
    correction 1 − β₁ᵗ: the former stands in the optimizer's state as `unit_momentum`. Where the optimizer counts its
    steps on the device (capturable, or fused on a GPU), m̂ counts as 1: exact once the mean is built up.
    """

    def follow(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
        self._mean(optimizer, group, parameter)

    def _mean(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> tuple[Any, Any, Any]:
        """t, the mean of a constant 1 after t steps, and what corrects its bias: 1 − β₁ᵗ."""
        state, beta1 = optimizer.state[parameter], _number(group["betas"][0])
        count = _number(state["step"])
        bias = _one_less_power(beta1, count)
        if isinstance(bias, Tensor):
            state.pop(self.KEY, None)  # nobody follows it from here on
            return count, bias, bias
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf > 0)  # on the host, as is the count, which skips it too
        # Where nothing stands there, it is the first step, or a checkpoint of the stock optimizer.
        old = state.get(self.KEY, 1 - beta1 ** (count if skipped else count - 1))
        state[self.KEY] = new = old if skipped else beta1 * old + (1 - beta1)
        return count, new, bias


class AdamStep(AdamKin):
    """lr·m̂/(√v̂ + ε), with the optimizer's own bias correction and amsgrad's maximum. In float32 or wider.

    AdamW's decay is decoupled from the gradient, so it is no part of the response.
    """

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        lr, correction = self.numbers(optimizer, group, parameter)
        square = optimizer.state[parameter]["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        return _over(lr, _root(square), group["eps"], correction)

    def pieces(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the parameter, each with its step, one after the other: what a piece needs stays in the cache."""
        lr, correction = self.numbers(optimizer, group, parameter)
        square = optimizer.state[parameter]["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        for w, v in zip(parameter.view(-1).split(PIECE), square.view(-1).split(PIECE), strict=True):
            yield w, _over(lr, _root(v), group["eps"], correction)

    def numbers(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> tuple[Any, Any]:
        """lr·m̂, and the correction of √v: what all weights of a parameter share."""
        count, mean, bias = self._mean(optimizer, group, parameter)
        return _number(group["lr"]) * (mean / bias), _one_less_power(group["betas"][1], count) ** 0.5


class AdamaxStep(AdamKin):
    """lr·m̂/u, u the running maximum of |g| + ε."""

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        _, mean, bias = self._mean(optimizer, group, parameter)
        largest = _here(optimizer.state[parameter]["exp_inf"])
        return _over(_number(group["lr"]) * (mean / bias), largest.clone(), 0.0)


class NAdamStep(AdamKin):
    """lr·[(1 − μ_t)/(1 − Πμ) + μ_{t+1}·m/(1 − Πμ·μ_{t+1})]/(√v̂ + ε), m the mean of a constant 1."""

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        count, mean, _ = self._mean(optimizer, group, parameter)
        state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
        now, then = (beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in (count, count + 1))
        product = _number(state["mu_product"])
        ahead = (1 - now) / (1 - product) + then * mean / (1 - product * then)
        correction = _one_less_power(beta2, count) ** 0.5
        return _over(_number(group["lr"]) * ahead, _root(state["exp_avg_sq"]), group["eps"], correction)


class RAdamStep(AdamKin):
    """lr·m̂ while the variance has no estimate (ρ_t ≤ 5), then lr·m̂·r_t·√(1 − β₂ᵗ)/(√v + ε).

    The first steps are plain SGD: they diverge if lr > 2/L.
    """

    def __call__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
        count, mean, bias = self._mean(optimizer, group, parameter)
        lr, beta2 = _number(group["lr"]) * (mean / bias), group["betas"][1]
        bias2 = _one_less_power(beta2, count)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * count * (1 - bias2) / bias2
        if not isinstance(length, Tensor) and length <= 5:
            return lr
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        scale = (ratio * bias2) ** 0.5
        adaptive = _over(lr * scale, _root(optimizer.state[parameter]["exp_avg_sq"]), group["eps"])
        return torch.where(length > 5, adaptive, lr) if isinstance(length, Tensor) else adaptive


def learning_rate(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
    """The learning rate of the parameter's group as the prox step, for `attach(..., step_size=learning_rate)`.

    It is the unit response of plain SGD. Under momentum or a preconditioner it solves another problem than the one
    written: under Adam with a penalty λ its stationary points are those of λ·(√v̂ + ε), another λ for each weight.
    """
    return _number(group["lr"])


# ---------------------------------------------------------------------- a look from outside


def present_step(step_size: StepSize, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Step:
    """The step that the optimizer's state gives now, for a monitor: nothing of the state moves on.

    Returns:
        A number, or the steps of some 1,000 weights spread evenly over `parameter`, whose sharded state is gathered. β₁
        counts as constant, and of SGD's momentum it is the coming step. It is 0 while the state that the step needs is
        not there, and for a `step_size` of the user's that is told of each update.
    """
    state = optimizer.state.get(parameter) or {}
    begun = _number(state["step"]) if "step" in state else state  # Adagrad has a state from the beginning
    stateless = isinstance(step_size, (SGDStep, ASGDStep)) or step_size is learning_rate
    if not stateless and not isinstance(begun, Tensor) and not begun:
        return 0.0
    if isinstance(step_size, AdafactorStep):  # its step of one weight is made of those of all
        return step_size(optimizer, group, parameter) if parameter.grad is not None else 0.0
    if not isinstance(step_size, _OF_SINGLE_WEIGHTS):
        told = hasattr(step_size, "before") or hasattr(step_size, "follow")
        return 0.0 if told else step_size(optimizer, group, parameter)
    stride = max(1, parameter.numel() // 1000)
    while math.gcd(stride, parameter.numel()) > 1:  # else it would see some columns again and again, and others never
        stride += 1
    seen = {
        key: unsharded(value.detach()).reshape(-1)[::stride]
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }
    if isinstance(step_size, AdamKin):
        seen.pop(AdamKin.KEY, None)
    return step_size(cast(Optimizer, SimpleNamespace(state={parameter: seen})), group, parameter)


# ---------------------------------------------------------------------- which class has which

adam_step = AdamStep()

STOCK: dict[type[Optimizer], StepSize] = {
    SGD: SGDStep(),
    Adam: adam_step,
    AdamW: adam_step,
    Adamax: AdamaxStep(),
    NAdam: NAdamStep(),
    RAdam: RAdamStep(),
    RMSprop: RMSpropStep(),
    Adagrad: AdagradStep(),
    Adadelta: AdadeltaStep(),
    Adafactor: AdafactorStep(),
    ASGD: ASGDStep(),
}
_OF_SINGLE_WEIGHTS = (SGDStep, ASGDStep, AdagradStep, AdadeltaStep, RMSpropStep, AdamKin)
STEP_SIZES = dict(STOCK)
"""By exact class, the swap-ins too: a subclass may step otherwise."""

WHY_NOT = {
    "LBFGS": "it steps along a direction that mixes the gradients of all weights; FISTA is for convex problems",
    "Muon": "it makes the update of a matrix orthogonal, as a whole",
    "Rprop": "it follows the sign of the gradient and not its size",
    "SparseAdam": "it moves only the rows that have a gradient, and not by the same mean; SGD and Adagrad take "
    "sparse gradients too",
}
"""Why an optimizer has no unit response, by the name of its class: not every version of torch has them all."""


def step_size_of(optimizer: Optimizer) -> StepSize:
    """The unit response of a stock optimizer.

    Raises:
        ValueError: this class has none, or none that is known.
    """
    try:
        return STEP_SIZES[type(optimizer)]
    except KeyError:
        kind = type(optimizer).__name__
        raise ValueError(
            f"{kind} has no known unit response ({WHY_NOT.get(kind, 'it is no class of torch.optim')}), so no prox "
            f"step gives the penalty its own solution; use one of {', '.join(known.__name__ for known in STOCK)}, "
            "add reg() to the loss, or pass step_size=fn(optimizer, group, parameter), which testing.check_step_size "
            "certifies"
        ) from None


# ---------------------------------------------------------------------- numbers and roots


def _number(value: Any) -> Any:
    """A tensor setting as a number where reading it costs no synchronization: on the CPU, outside a graph."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and not value.requires_grad:
        return value if torch.compiler.is_compiling() else value.item()
    return value


def _one_less_power(base: Any, count: Any) -> Any:
    """1 − baseᵗ, the correction of a running mean's bias; 1 where no step was taken yet: the first one was skipped."""
    base = _number(base)
    if isinstance(count, Tensor):  # on the device, in float32, where 1 − baseᵗ would cancel
        log = base.log() if isinstance(base, Tensor) else math.log(base) if base > 0 else -math.inf
        return -torch.expm1(count * log)
    return 1 - base**count or 1.0


def _is_zero(x: Tensor | None) -> bool:
    return x is not None and not torch.compiler.is_compiling() and not bool(unsharded(x.abs().sum()))


def _here(x: Tensor) -> Tensor:
    """What this process has of it, float32 or wider."""
    return widened(local_part(x))


def _root(square: Tensor) -> Tensor:
    """√square in a new tensor, float32 or wider.

    A CPU's sqrt is ten times slower on zeros, of which a sparse net has many; 1/rsqrt is not.
    """
    square = _here(square)
    return square.sqrt() if square.requires_grad else square.rsqrt().reciprocal_()


def _over(lr: Any, size: Tensor, eps: float, correction: Any = 1.0) -> Tensor:
    """lr/(size/correction + ε), written into `size`: most of the cost of a step is the page faults of fresh memory."""
    if size.requires_grad:  # a differentiable step
        return lr / (size / correction + eps)
    step = size.div_(correction).add_(eps).reciprocal_().mul_(lr)
    # Without ε a weight that never had a gradient has an infinite step, and 0·∞ would be NaN where λ is 0.
    return step if eps > 0 else step.clamp_(max=torch.finfo(step.dtype).max)


def _root_mean_square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(widened(x.detach())) / math.sqrt(max(x.numel(), 1))
