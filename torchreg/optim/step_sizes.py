"""Each optimizer's step for the prox: its unit response. One file, so that all formulas stand side by side.

By how much would this step have moved a weight whose gradient had been the constant 1, in the direction and scale
that the optimizer's state gives it? A prox with that step has the penalty's own stationary points: at a weight that
rests, the optimizer moves by step·gradient and the prox back by step·λ, so gradient + λ·∂|w| = 0 whatever the
learning rate, the momentum or the preconditioner.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import ASGD, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from torchreg._distributed import local_part, unsharded
from torchreg._tensors import Step, widened

Group = dict[str, Any]
"""The settings of a group of parameters, as in `optimizer.param_groups`."""
State = dict[str, Any]
"""The state of a parameter, as in `optimizer.state[parameter]`."""


class StepSize(ABC):
    """The prox step of a parameter, read from the optimizer's state after each update.

    A subclass writes `__call__`. The other methods are optional: they are for a step that follows a momentum, or that
    needs what the state was before the update. All get the parameter's group of settings and its state, as
    `optimizer.param_groups` and `optimizer.state[parameter]` have them; what a method adds to the state goes into
    checkpoints. `torchreg.testing.check_step_size` certifies a step size.

    Attributes:
        elementwise: the step of a weight depends on that weight's entries of the state alone, so that it may be asked
            for a part of a parameter.
        diagonal: the step is a tensor, with a number for each weight.

    >>> class Halved(StepSize):  # of an optimizer that moves each weight by half its learning rate times the gradient
    ...     def __call__(self, group, state, parameter):
    ...         return group["lr"] / 2
    """

    elementwise: ClassVar[bool] = False
    diagonal: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        """The step of the update that has just been made: a number, or a tensor that broadcasts against the parameter.

        It reads the state and changes nothing, and it may be called again.
        """

    def before_update(self, group: Group, state: State, parameter: Tensor) -> Callable[[State], Step] | None:
        """Is called before each update, while the state is the old one.

        Returns:
            A function that gives the step of this update from the state after it, instead of `__call__`; or None.
        """
        return None

    def after_update(self, group: Group, state: State, parameter: Tensor, skipped: Tensor | None = None) -> None:
        """Is called after each update of a parameter with a gradient, before the step is read, also at strength 0.

        Args:
            skipped: not 0 where a fused optimizer left the update out, because a GradScaler has found an infinite
                gradient; None where there is no such tensor.
        """
        return

    def on_detach(self, state: State) -> None:
        """Is called once the prox is taken off: takes back what the other methods have written into the state."""
        return


class FunctionStep(StepSize):
    """A step size that is a plain function of group, state and parameter."""

    def __init__(self, function: Callable[[Group, State, Tensor], Step]) -> None:
        self.function = function

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        return self.function(group, state, parameter)


# ---------------------------------------------------------------------- momentum

UNIT_MOMENTUM = "unit_momentum"
"""The key in a parameter's state under which its momentum, driven by a constant gradient 1, stands."""


class TracksMomentum(StepSize):
    """A step size that tracks the optimizer's momentum in a number of its own, kept in the optimizer's state."""

    elementwise = True

    def on_detach(self, state: State) -> None:
        """Forgets the momentum: nobody tracks it from here on, and attached again it counts as built up."""
        state.pop(UNIT_MOMENTUM, None)


class BuildUp(TracksMomentum):
    """A momentum buffer driven by a constant 1: c ← μ·c + gain.

    Where the state has a momentum buffer and no c, as after loading a checkpoint of the stock optimizer, c starts at
    its limit, gain/(1 − μ). Otherwise its first value is 1, whatever the gain.
    """

    def gain(self, group: Group) -> Any:
        """The factor of the gradient in the buffer."""
        return 1.0

    def before_update(self, group: Group, state: State, parameter: Tensor) -> None:
        momentum = as_number(group["momentum"])
        if 0 < momentum < 1 and UNIT_MOMENTUM not in state and state.get("momentum_buffer") is not None:
            state[UNIT_MOMENTUM] = self.gain(group) / (1 - momentum)

    def after_update(self, group: Group, state: State, parameter: Tensor, skipped: Tensor | None = None) -> None:
        momentum = as_number(group["momentum"])
        if momentum == 0:
            return
        old = as_number(state.get(UNIT_MOMENTUM))  # a compiled step leaves a tensor
        if old is None:
            # Distributed checkpoints build the state by a step of zeros at lr 0, which pushes no momentum.
            idle = not isinstance(group["lr"], Tensor) and group["lr"] == 0 and _is_zero(parameter.grad)
            new: Any = 0.0 if idle else 1.0
        else:
            new = momentum * old + self.gain(group)
        if skipped is not None:
            found_inf, kept = as_number(skipped.reshape(())), 0.0 if old is None else old
            new = torch.where(found_inf > 0, kept, new) if isinstance(found_inf, Tensor) else kept if found_inf else new
        if torch.compiler.is_compiling():  # a graph would be one of that number
            new = torch.as_tensor(new, dtype=widened(parameter).real.dtype, device=parameter.device)
        state[UNIT_MOMENTUM] = new


class SGDStep(BuildUp):
    """lr·c, where c is SGD's own momentum buffer driven by a constant 1; with Nesterov lr·(1 + μ·c).

    c starts at 1 and goes c ← μ·c + (1 − dampening), so it is right from the first step on and under a cycled
    momentum.
    """

    def gain(self, group: Group) -> Any:
        return 1 - group["dampening"]

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        lr, momentum = as_number(group["lr"]), as_number(group["momentum"])
        if momentum == 0:
            return lr
        c = as_number(state[UNIT_MOMENTUM])
        return lr * (1 + momentum * c) if group["nesterov"] else lr * c


class ASGDStep(StepSize):
    """η, which ASGD renews after each update: it is read before it.

    ASGD's own `lambd` (1e-4 unless changed) is a penalty too: it adds L2(lambd/2) to the problem.
    """

    elementwise = True

    def before_update(self, group: Group, state: State, parameter: Tensor) -> Callable[[State], Step]:
        eta = self(group, state, parameter)
        eta = eta.clone() if isinstance(eta, Tensor) else eta
        return lambda state: eta

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        eta = state.get("eta")
        if eta is None:  # before the first update, which rounds lr to its counters' type
            lr, double = group["lr"], torch.get_default_dtype() == torch.float64
            place = lr.device if isinstance(lr, Tensor) else "cpu"  # and not the default device
            eta = torch.as_tensor(lr, dtype=torch.float64 if double else torch.float32, device=place)
        return as_number(eta)


# ---------------------------------------------------------------------- a metric of each weight


class AdagradStep(StepSize):
    """lr/(1 + (t − 1)·lr_decay)/(√Σg² + ε), with the initial accumulator in the sum."""

    diagonal = True
    elementwise = True

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        state = state
        before = abs(as_number(state["step"]) - 1)  # not −1, which a first step skipped by the GradScaler leaves
        lr = as_number(group["lr"]) / (1 + before * group["lr_decay"])
        return _over(lr, _root(state["sum"]), group["eps"])


class AdadeltaStep(StepSize):
    """lr·√(E[Δ²] + ε)/√(E[g²] + ε), with E[Δ²] as it was before the update and E[g²] as it is after it."""

    diagonal = True
    elementwise = True

    def before_update(self, group: Group, state: State, parameter: Tensor) -> Callable[[State], Step]:
        moved = state.get("acc_delta")
        moved = torch.zeros_like(parameter) if moved is None else moved.clone()
        return lambda state: self._of(group, state, moved)

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        return self._of(group, state, state["acc_delta"])

    def _of(self, group: Group, state: State, moved: Tensor) -> Step:
        moved, square = (_local(x) + group["eps"] for x in (moved, state["square_avg"]))
        return as_number(group["lr"]) * (moved / square).sqrt()


class AdafactorStep(StepSize):
    """α/(√v̂·max(1, RMS(g/√v̂)/d)): v̂ from the row and column means, α = min(lr, 1/√t)·max(ε₂, RMS(w) before)."""

    diagonal = True

    def before_update(self, group: Group, state: State, parameter: Tensor) -> Callable[[State], Step]:
        size = _root_mean_square(parameter)
        return lambda state: self._of(group, state, parameter, size)

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        return self._of(group, state, parameter, _root_mean_square(parameter))

    def _of(self, group: Group, state: State, parameter: Tensor, size: Tensor) -> Step:
        floor, (eps1, eps2) = torch.finfo(parameter.dtype).eps, group["eps"]
        eps1 = floor if eps1 is None else eps1
        if "variance" in state:
            square = widened(state["variance"])
        else:
            rows, columns = widened(state["row_var"]), widened(state["col_var"])
            square = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp(min=eps1)
        scale = square.clamp(min=eps1 * eps1).rsqrt()
        assert parameter.grad is not None  # it has just been updated
        clipped = (_root_mean_square(parameter.grad * scale) / group["d"]).clamp(min=1)
        lr = min(as_number(group["lr"]), 1 / math.sqrt(as_number(state["step"])))
        return scale * (lr * size.clamp(min=eps2) / clipped)


class RMSpropStep(BuildUp):
    """lr·c/(√v + ε); centered: v less the square of the mean gradient.

    c is the build-up of the momentum, as in SGD. The buffer adds up gradients over the √v of their own steps, so with
    momentum the response is exact in the limit, once √v has settled; without, at every step. Under a constant
    gradient the centered v cancels to rounding errors, and so does the response.
    """

    diagonal = True

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        lr = as_number(group["lr"])
        square = _local(state["square_avg"])
        if group["centered"]:
            mean = _local(state["grad_avg"])
            square = torch.addcmul(square, mean, mean, value=-1).clamp(min=0)
        if as_number(group["momentum"]) > 0:
            lr = lr * as_number(state[UNIT_MOMENTUM])
        return _over(lr, _root(square), group["eps"])


# ---------------------------------------------------------------------- Adam's kin


class AdamKin(TracksMomentum):
    """m̂ over a running size, where m̂ is the mean of a constant 1 under the optimizer's own bias correction.

    m̂ is 1 while β₁ stays as it is. Under a cycled one (the default of `OneCycleLR`) the mean is 1 − Πβ₁ and its
    correction 1 − β₁ᵗ: the former stands in the optimizer's state as `unit_momentum`. Where the optimizer counts its
    steps on the device (capturable, or fused on a GPU), m̂ counts as 1: exact once the mean is built up.
    """

    diagonal = True

    def after_update(self, group: Group, state: State, parameter: Tensor, skipped: Tensor | None = None) -> None:
        beta1, count = as_number(group["betas"][0]), as_number(state["step"])
        if isinstance(_one_less_power(beta1, count), Tensor):
            state.pop(UNIT_MOMENTUM, None)  # nobody tracks it from here on
            return
        left_out = skipped is not None and bool(skipped > 0)  # on the host, as is the count, which leaves it out too
        # Where nothing stands there, it is the first update, or a checkpoint of the stock optimizer.
        mean = state.get(UNIT_MOMENTUM, 1 - beta1 ** (count if left_out else count - 1))
        state[UNIT_MOMENTUM] = mean if left_out else beta1 * mean + (1 - beta1)

    def mean(self, group: Group, state: State) -> tuple[Any, Any, Any]:
        """t, the mean of a constant 1 after t updates, and the correction of its bias, 1 − β₁ᵗ."""
        count = as_number(state["step"])
        bias = _one_less_power(as_number(group["betas"][0]), count)
        return count, state.get(UNIT_MOMENTUM, bias), bias


class AdamStep(AdamKin):
    """lr·m̂/(√v̂ + ε), with the optimizer's own bias correction and amsgrad's maximum. In float32 or wider.

    AdamW's decay is decoupled from the gradient, so it is no part of the response.
    """

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        count, mean, bias = self.mean(group, state)
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        correction = _one_less_power(group["betas"][1], count) ** 0.5
        return _over(as_number(group["lr"]) * (mean / bias), _root(square), group["eps"], correction)


class AdamaxStep(AdamKin):
    """lr·m̂/u, u the running maximum of |g| + ε."""

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        _, mean, bias = self.mean(group, state)
        largest = _local(state["exp_inf"])
        return _over(as_number(group["lr"]) * (mean / bias), largest.clone(), 0.0)


class NAdamStep(AdamKin):
    """lr·[(1 − μ_t)/(1 − Πμ) + μ_{t+1}·m/(1 − Πμ·μ_{t+1})]/(√v̂ + ε), m the mean of a constant 1."""

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        count, mean, _ = self.mean(group, state)
        beta1, beta2 = group["betas"]
        now, then = (beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in (count, count + 1))
        product = as_number(state["mu_product"])
        ahead = (1 - now) / (1 - product) + then * mean / (1 - product * then)
        correction = _one_less_power(beta2, count) ** 0.5
        return _over(as_number(group["lr"]) * ahead, _root(state["exp_avg_sq"]), group["eps"], correction)


class RAdamStep(AdamKin):
    """lr·m̂ while the variance has no estimate (ρ_t ≤ 5), then lr·m̂·r_t·√(1 − β₂ᵗ)/(√v + ε).

    The first steps are plain SGD: they diverge if lr > 2/L.
    """

    def __call__(self, group: Group, state: State, parameter: Tensor) -> Step:
        count, mean, bias = self.mean(group, state)
        lr, beta2 = as_number(group["lr"]) * (mean / bias), group["betas"][1]
        bias2 = _one_less_power(beta2, count)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * count * (1 - bias2) / bias2
        if not isinstance(length, Tensor) and length <= 5:
            return lr
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        scale = (ratio * bias2) ** 0.5
        adaptive = _over(lr * scale, _root(state["exp_avg_sq"]), group["eps"])
        return torch.where(length > 5, adaptive, lr) if isinstance(length, Tensor) else adaptive


def learning_rate(group: Group, state: State, parameter: Tensor) -> Step:
    """The learning rate of the parameter's group as the prox step, for `attach(..., step_size=learning_rate)`.

    It is the unit response of plain SGD. Under momentum or a preconditioner it solves another problem than the one
    written: under Adam with a penalty λ its stationary points are those of λ·(√v̂ + ε), another λ for each weight.
    """
    return as_number(group["lr"])


# ---------------------------------------------------------------------- parts of a parameter


class StatePart(dict[str, Any]):
    """The state of some entries of a parameter, in their flat order, which an elementwise step size reads for them.

    Attributes:
        part: which entries; it may be set anew.

    >>> StatePart({"step": 3, "exp_avg_sq": torch.eye(2)}, torch.zeros(2, 2), slice(0, 3))["exp_avg_sq"]
    tensor([1., 0., 0.])
    """

    def __init__(self, state: State, parameter: Tensor, part: slice) -> None:
        super().__init__()
        self.part, self._flat = part, set()
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value = unsharded(value.detach()).reshape(-1)
                self._flat.add(key)
            self[key] = as_number(value) if isinstance(value, Tensor) and not value.dim() else value

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value[self.part] if key in self._flat else value

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401  dict.get would not cut


def sampled_step(step_size: StepSize, group: Group, state: State, parameter: Tensor) -> Step:
    """The prox step of the last update, for a monitor; the state stays as it is.

    Returns:
        A number, or the steps of some 1,000 weights spread evenly over `parameter`, whose sharded state is gathered. It
        is 0 before the first update, and for a step size that is known during the update alone.
    """
    count = as_number(state.get("step", 1))
    if not isinstance(count, Tensor) and not count:  # no update yet, or a GradScaler has skipped the first
        return 0.0
    if isinstance(step_size, AdafactorStep) and parameter.grad is None:
        return 0.0
    if step_size.elementwise:
        stride = max(1, parameter.numel() // 1000)
        while math.gcd(stride, parameter.numel()) > 1:  # else it would sample some columns again and again
            stride += 1
        state = StatePart(state, parameter, slice(None, None, stride))
    try:
        return step_size(group, state, parameter)
    except KeyError:  # the state is not there yet
        return 0.0


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
            "add reg() to the loss, or pass step_size=fn(group, state, parameter), which testing.check_step_size "
            "certifies"
        ) from None


# ---------------------------------------------------------------------- numbers and roots


def as_number(value: Any) -> Any:
    """A tensor setting as a number where reading it costs no synchronization: on the CPU, outside a graph."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and not value.requires_grad:
        return value if torch.compiler.is_compiling() else value.item()
    return value


def _one_less_power(base: Any, count: Any) -> Any:
    """1 − baseᵗ, the correction of a running mean's bias; 1 where no step was taken yet: the first one was skipped."""
    base = as_number(base)
    if isinstance(count, Tensor):  # on the device, in float32, where 1 − baseᵗ would cancel
        log = base.log() if isinstance(base, Tensor) else math.log(base) if base > 0 else -math.inf
        return -torch.expm1(count * log)
    return 1 - base**count or 1.0


def _is_zero(x: Tensor | None) -> bool:
    return x is not None and not torch.compiler.is_compiling() and not bool(unsharded(x.abs().sum()))


def _local(x: Tensor) -> Tensor:
    """The part of `x` that this process has, in float32 or wider."""
    return widened(local_part(x))


def _root(square: Tensor) -> Tensor:
    """√square in a new tensor, float32 or wider.

    A CPU's sqrt is ten times slower on zeros, of which a sparse net has many; 1/rsqrt is not.
    """
    square = _local(square)
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
