"""ProxSGD, ProxAdam, ProxAdamW: the stock optimizers with the prox in their own step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch._compile import _disable_dynamo
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torchreg.binding.regularizer import Regularizer
from torchreg.optim.attachment import Attachment
from torchreg.optim.executors.job import Executor
from torchreg.optim.executors.low_precision import LowPrecision, has_narrow_weights
from torchreg.optim.executors.native import NativeExecutor
from torchreg.optim.executors.plain import Plain, Prox
from torchreg.optim.executors.rounding import Rounding, StochasticRounding
from torchreg.optim.executors.specs import SPECS
from torchreg.optim.executors.triton import TritonExecutor
from torchreg.optim.step_sizes import STEP_SIZES, StepSize

OWN_ARGUMENTS = ("regularizer", "partial", "rounding")
"""The arguments of a swap-in that its stock class lacks."""

STOCHASTIC = StochasticRounding()


class Proximal(Optimizer):
    """The base of the swap-ins: the stock step, then the prox.

    Attributes:
        attachment: the handle of the prox; `attachment.remove()` leaves a stock optimizer.
        rounding: how weights narrower than float32 are rounded after the step.
    """

    _stock: ClassVar[type[Optimizer]]
    _step_size: ClassVar[StepSize]
    __signature__: ClassVar[inspect.Signature]
    attachment: Attachment | None = None
    rounding: Rounding = STOCHASTIC

    def __init_subclass__(cls, stock: type[Optimizer] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if stock is None:  # a subclass of a swap-in
            return
        cls._stock = stock
        cls._step_size = STEP_SIZES[cls] = STEP_SIZES[stock]
        # help() and IDEs show the arguments of the stock class, whatever its version has.
        signature = inspect.signature(stock)
        own = [inspect.signature(Proximal.__init__).parameters[name] for name in OWN_ARGUMENTS]
        cls.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])

    def __init__(
        self,
        params: Any,
        *args: Any,
        regularizer: Regularizer,
        partial: bool = False,
        rounding: Rounding = STOCHASTIC,
        **kwargs: Any,
    ) -> None:
        if not isinstance(rounding, Rounding):
            raise TypeError(
                f"rounding={rounding!r} is a {type(rounding).__name__}; pass tr.optim.StochasticRounding(seed=0) or "
                "tr.optim.NearestRounding()"
            )
        super().__init__(params, *args, **kwargs)
        self.rounding = rounding
        self._check(regularizer)
        self.attachment = Attachment(self, regularizer, self._step_size, partial=partial)

    @property
    def regularizer(self) -> Regularizer | None:
        """The regularizer whose prox this applies; None once the attachment was removed."""
        return None if self.attachment is None else self.attachment.regularizer

    def _check(self, regularizer: Regularizer) -> None:
        """Raises where this class cannot carry a penalty of the regularizer, before it takes anything over."""

    @functools.cached_property
    def _executors(self) -> list[Executor]:
        """The ways to take a step, in the order in which they are asked."""
        spec = SPECS[self._stock](self._stock)
        return [NativeExecutor(spec), TritonExecutor(spec), LowPrecision(), Plain()]

    def _unwatched_step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.attachment is None:
            return _unhooked(self._stock)(self, closure)
        self.attachment.check_carries()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._eager_step()
        elif has_narrow_weights(self):
            self._uncompiled_step()
        else:
            prox = Prox(self.attachment.job(self._stock.step, self.rounding))
            with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
                inspect.unwrap(self._stock.step)(self)
            prox.apply()
        self.attachment.stepped = True
        return loss

    def _eager_step(self) -> None:
        assert self.attachment is not None
        job = self.attachment.job(_unhooked(self._stock), self.rounding)
        next(executor for executor in self._executors if executor.step(job))

    # A break in the graph of torch.compile; not torch.compiler.disable, which would load the compiler with the library.
    _uncompiled_step = _disable_dynamo(_eager_step)

    _watched_step = Optimizer.profile_hook_step(_unwatched_step)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The stock step, then w ← prox(w, unit response) for every selected parameter that has a gradient.

        Both are one pass over memory where a kernel serves (`torchreg.backends()`) and takes the penalty, any sum of
        |w| and w²: the native one for float32, float64 and bfloat16 weights on a CPU, Triton's on a GPU. Weights
        narrower than float32 step in float32, with their prox, and are rounded once, as `rounding` says; at strength 0
        they take the stock step.

        Args:
            closure: reevaluates the model and returns the loss.
        Returns:
            What `closure` returned, or None.
        """
        # torch wraps every optimizer's step in a record for profilers and in loops over hooks: a third of the step of a
        # small network. Here they come in where there are any.
        hooks = (
            self._optimizer_step_pre_hooks,
            self._optimizer_step_post_hooks,
            _global_optimizer_pre_hooks,
            _global_optimizer_post_hooks,
        )
        if not torch.compiler.is_compiling() and (any(hooks) or torch._C._autograd._profiler_enabled()):
            return self._watched_step(closure)
        return self._unwatched_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # by which torch knows a step that it has wrapped

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as the stock class does; its selected parameters get the prox from now on."""
        for name in OWN_ARGUMENTS:  # a wrapper keeps the arguments that it hands on in its groups, and in checkpoints
            param_group.pop(name, None)
        super().add_param_group(param_group)
        if self.attachment is not None:
            try:
                self.attachment.carried()
            except Exception:
                self.param_groups.pop()
                raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rounding": self.rounding, "attachment": self.attachment}


class ProxSGD(Proximal, SGD, stock=SGD):
    """`torch.optim.SGD` with a prox: w ← prox(w − lr·b, lr·c), b the momentum buffer and c its unit response.

    c is the momentum buffer of a constant gradient 1, so that weights rest exactly where gradient + ∂Ω = 0, with any
    momentum, dampening and nesterov. At strength 0 every step is the stock step, bit for bit.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused: as in
            `torch.optim.SGD`. Its `weight_decay=wd` is L2(wd/2) in the gradient.
        regularizer: whose penalties to apply; `params` must hold all that it selects.
        partial: allow that `params` lacks some of them; another optimizer may carry those.
        rounding: how bfloat16 and float16 weights and their state come back from a step, which is in float32.
    Raises:
        TypeError: `regularizer` is not a Regularizer, or `rounding` not a Rounding.
        ValueError: `params` lacks a selected parameter.
    Source: Beck and Teboulle, 2009, for the proximal gradient step.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> reg = Regularizer(model, L1(10.0))
    >>> optimizer = ProxSGD(model.parameters(), lr=0.1, momentum=0.9, regularizer=reg)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> model.weight.detach()
    tensor([[0., 0.]])
    """


class ProxAdam(Proximal, Adam, stock=Adam):
    """`torch.optim.Adam` with a prox: w ← prox(w − s·m̂, s) with s = lr/(√v̂ + ε) for each weight.

    s is the step that Adam takes for a gradient of 1, so that weights rest exactly where gradient + ∂Ω = 0. At
    strength 0 every step is the stock step, bit for bit.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused: as in
            `torch.optim.Adam`. Its `weight_decay=wd` is L2(wd/2) in the gradient.
        regularizer: whose penalties to apply; `params` must hold all that it selects.
        partial: allow that `params` lacks some of them; another optimizer may carry those.
        rounding: how bfloat16 and float16 weights and their state come back from a step, which is in float32.
    Raises:
        TypeError: `regularizer` is not a Regularizer, or `rounding` not a Rounding.
        ValueError: `params` lacks a selected parameter, or one is complex.
    Source: Yun, Lozano and Yang, 2021 (ProxGen), for the prox in Adam's metric.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> reg = Regularizer(model, L1(1e3))
    >>> optimizer = ProxAdam(model.parameters(), lr=0.1, regularizer=reg)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> model.weight.detach()
    tensor([[0., 0.]])
    """


class ProxAdamW(Proximal, AdamW, stock=AdamW):
    """`torch.optim.AdamW` with a prox: decay, then w ← prox(w − s·m̂, s) with s = lr/(√v̂ + ε) for each weight.

    Decoupled decay is not a gradient: weights rest where gradient + ∂Ω + wd·(√v̂ + ε)·w = 0. The penalty's own solution
    is that of weight_decay=0 (the stock default is 1e-2); for true ridge put L2 or ElasticNet in the regularizer.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as in
            `torch.optim.AdamW`.
        regularizer: whose penalties to apply; `params` must hold all that it selects.
        partial: allow that `params` lacks some of them; another optimizer may carry those.
        rounding: how bfloat16 and float16 weights and their state come back from a step, which is in float32.
    Raises:
        TypeError: `regularizer` is not a Regularizer, or `rounding` not a Rounding.
        ValueError: `params` lacks a selected parameter, or one is complex.
    Source: Loshchilov and Hutter, 2019; Yun, Lozano and Yang, 2021 (ProxGen).

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> reg = Regularizer(model, L1(1e3))
    >>> optimizer = ProxAdamW(model.parameters(), lr=0.1, regularizer=reg)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> model.weight.detach()
    tensor([[0., 0.]])
    """


def _unhooked(stock: type[Optimizer]) -> Callable[..., Any]:
    """The stock step without its hooks: torch wraps `step` once an instance exists, and hooks would fire twice."""
    step: Any = stock.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]
