"""The proximal step as it is defined, for every optimizer, penalty and device: read this one first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from torchreg._tensors import PIECE, Step, is_dense, is_laid_out_like
from torchreg.optim.executors.job import Executor, Job, is_idle
from torchreg.optim.step_sizes import Group, State, StatePart, StepSize
from torchreg.penalties import Penalty


class Plain(Executor):
    """The stock step, then w ← prox(w, s) for every parameter that it has updated, s the optimizer's unit response.

    In full, for an optimizer without a momentum to track:

        stock(optimizer)
        for group, w, penalty in job.carried():
            if w.grad is not None:
                w.copy_(penalty.prox(w, step_size(group, optimizer.state[w], w)))
    """

    def step(self, job: Job) -> bool:
        prox = Prox(job)
        (job.stock if job.is_stock else fused(job.stock))(job.optimizer)
        prox.apply()
        return True


class Prox:
    """The prox of one step: made just before the update, while the optimizer's state is the old one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.steps: dict[int, Callable[[State], Step]] = {}  # by id, where the step is known in mid-update alone
        self.tangents: dict[int, Penalty] = {}
        looks = type(job.step_size).before_update is not StepSize.before_update
        for group, w, penalty in job.carried():
            if penalty is not None and penalty.linearizes and not penalty.is_zero:
                self.tangents[id(w)] = _tangent(penalty, w, job.optimizer)
            if looks and (deferred := job.step_size.before_update(group, job.state_of(w), w)) is not None:
                self.steps[id(w)] = deferred

    def apply(self) -> None:
        """Applies it, just after the update; a differentiable optimizer's prox has a gradient too."""
        optimizer, step_size = self.job.optimizer, self.job.step_size
        skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer is called on steps that a GradScaler skips
        with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
            for group, w, penalty in self.job.carried():
                if w.grad is None:
                    continue
                state = self.job.updated_state_of(w, skipped, group)
                if penalty is None or is_idle(penalty):
                    continue
                penalty, deferred = self.tangents.get(id(w), penalty), self.steps.get(id(w))
                if deferred is None and step_size.elementwise and _goes_in_pieces(w, penalty) and skipped is None:
                    self._in_pieces(group, state, w, penalty)
                    continue
                step = step_size(group, state, w) if deferred is None else deferred(state)
                if not isinstance(step, Tensor) and step == 0:
                    continue
                if skipped is not None:
                    step = torch.where(skipped.to(w.device).reshape(()) > 0, 0.0, step)
                penalty.prox_(w, step)

    def _in_pieces(self, group: Group, state: State, w: Tensor, penalty: Penalty) -> None:
        """Steps and proxes a large weight in pieces, so that what belongs to one stays in the processor's cache."""
        step_size = self.job.step_size
        step = 0.0 if step_size.diagonal else step_size(group, state, w)
        state_of_piece = StatePart(state, w, slice(0))
        for first in range(0, w.numel(), PIECE):
            state_of_piece.part = slice(first, first + PIECE)
            piece = w.view(-1)[state_of_piece.part]
            if step_size.diagonal:
                step = step_size(group, state_of_piece, piece)
            penalty.prox_(piece, step)


def _tangent(penalty: Penalty, w: Tensor, optimizer: Optimizer) -> Penalty:
    """The penalty that follows a step from where `w` is; a differentiable optimizer's has a gradient too."""
    differentiable = bool(optimizer.defaults.get("differentiable"))
    with torch.set_grad_enabled(differentiable):
        return penalty.linearized(w.clone() if differentiable else w)  # a graph keeps the old weights


def _goes_in_pieces(w: Tensor, penalty: Penalty) -> bool:
    """A CPU's cache does not hold all of the weight, and its prox is the same in pieces, which fit."""
    coefficients = None if torch.compiler.is_compiling() else penalty.coefficients()
    return (
        coefficients is not None
        and coefficients.anchor is None
        and w.is_cpu
        and type(w) is Parameter
        and w.numel() > PIECE
        and w.is_contiguous()
        and not torch.is_grad_enabled()
    )


# ---------------------------------------------------------------------- the stock step


def fused(stock: Callable[[Optimizer], object]) -> Callable[[Optimizer], None]:
    """`stock`, by Adam's fused CPU kernel where torch may choose: the default loop is four times slower.

    Torch's fused SGD fails where some parameters have a momentum buffer and others not yet, and gains little.
    """

    def step(optimizer: Optimizer) -> None:
        groups = [] if isinstance(optimizer, SGD) else [x for x in optimizer.param_groups if _may_fuse(x, optimizer)]
        for group in groups:
            group["fused"] = True
        try:
            stock(optimizer)
        finally:
            for group in groups:
                group["fused"] = None

    return step


def _may_fuse(group: Group, optimizer: Optimizer) -> bool:
    return (
        group["foreach"] is None
        and group["fused"] is None
        and not group["differentiable"]
        and not group.get("capturable")
        and not isinstance(group["lr"], Tensor)
        and all(
            type(w) in (Tensor, Parameter)
            and w.is_cpu
            and w.is_floating_point()
            and (w.grad is None or _in_one_order(w, optimizer.state.get(w, {})))
            for w in group["params"]
        )
    )


def _in_one_order(w: Tensor, state: State) -> bool:
    """Weight, gradient and moments lie alike in memory, in which torch's fused CPU step reads them from end to end.

    It does not look at their strides: of a gradient, or a moment out of a checkpoint, in another layout than its weight
    it would take the entries of others.
    """
    others = [w.grad, *(x for key, x in state.items() if key != "step")]
    return is_dense(w, None) and all(is_laid_out_like(x, w) for x in others if isinstance(x, Tensor))
