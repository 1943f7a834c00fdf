"""Attachment: a regularizer's prox carried by an optimizer."""

from __future__ import annotations

import copy
import functools
import operator
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer

from torchreg._distributed import is_sharded
from torchreg._tensors import Step
from torchreg.binding.bindings import Binding
from torchreg.binding.regularizer import Regularizer
from torchreg.optim.executors.rounding import NARROW
from torchreg.optim.step_sizes import PIECE, STEP_SIZES, Diagonal, StepSize, present_step, step_size_of
from torchreg.penalties import Penalty

_alive: weakref.WeakSet[Attachment] = weakref.WeakSet()
"""Every attachment there is, whatever its regularizer: a parameter has at most one."""
_alive_lock = threading.Lock()
"""Held to read or change it: other threads may be building optimizers of other models."""


class Prox(ABC):
    """One prox after each real step of an optimizer, for each parameter that the step has moved."""

    step_size: StepSize

    @abstractmethod
    def penalties(self, optimizer: Optimizer) -> Mapping[int, Penalty | None]:
        """The penalty of each regularized parameter, by its `id`; None while the regularizer is disabled."""

    def before(self, optimizer: Optimizer) -> None:
        """Just before the optimizer's update, while its state is the old one."""
        look, follow = (getattr(self.step_size, name, None) for name in ("before", "follow"))
        self._asked: dict[int, Callable[[], Step]] = {}
        self._tangents: dict[int, Penalty] = {}
        for group, parameter, penalty in self._carried(optimizer):  # refuses, if it must, before any weight has moved
            if penalty is not None and penalty.linearizes and not penalty.is_zero:
                self._tangents[id(parameter)] = _linearized(penalty, parameter, optimizer)
            if look is not None and (follow is not None or not _idle(penalty)):
                ask = look(optimizer, group, parameter)
                if ask is not None:
                    self._asked[id(parameter)] = ask

    def apply(self, optimizer: Optimizer) -> None:
        """Just after the optimizer's update; a differentiable optimizer's prox has a gradient too."""
        with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
            self._apply(optimizer)

    def _apply(self, optimizer: Optimizer) -> None:
        asked, tangents = self.__dict__.pop("_asked", {}), self.__dict__.pop("_tangents", {})
        follow = getattr(self.step_size, "follow", None)
        for group, parameter, penalty in self._carried(optimizer):
            if parameter.grad is None:
                continue
            if penalty is None or _idle(penalty):
                if follow is not None:
                    follow(optimizer, group, parameter)
                continue
            penalty = tangents.get(id(parameter), penalty)
            large, pieces = _is_large(optimizer, parameter, penalty), getattr(self.step_size, "pieces", None)
            if large and pieces is not None:
                for w, step in pieces(optimizer, group, parameter):
                    penalty.prox_(w, step)
                continue
            ask = asked.get(id(parameter))
            step = self.step_size(optimizer, group, parameter) if ask is None else ask()
            if not isinstance(step, Tensor) and step == 0:
                continue
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is not None:
                # A fused optimizer is called on steps that the GradScaler skips: it skips them on the device.
                skipped = found_inf.to(parameter.device).reshape(()) > 0
                step = torch.where(skipped, 0.0, step)
            for w in parameter.view(-1).split(PIECE) if large and not isinstance(step, Tensor) else [parameter]:
                penalty.prox_(w, step)

    def _carried(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, Penalty | None]]:
        penalties = self.penalties(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in penalties:
                    yield group, parameter, penalties[id(parameter)]


class Frozen(Prox):
    """The prox of an optimizer copied without its regularizer: penalties as they were, on its own parameters."""

    def __init__(self, pairs: list[tuple[Tensor, Penalty | None]], step_size: StepSize) -> None:
        self.pairs = pairs
        self.step_size = step_size
        self._penalties = {id(parameter): penalty for parameter, penalty in pairs}

    def penalties(self, optimizer: Optimizer) -> Mapping[int, Penalty | None]:
        return self._penalties

    def release(self, held: Mapping[int, Binding]) -> None:
        """Gives up the parameters that a regularizer takes over."""
        self.pairs = [pair for pair in self.pairs if id(pair[0]) not in held]
        self._penalties = {id(parameter): penalty for parameter, penalty in self.pairs}


class Attachment(Prox):
    """The prox of a regularizer on an optimizer, as `attach` returns it: `remove()` takes it off.

    The optimizer holds it, the regularizer only weakly: when the optimizer dies, its parameters return to the loss
    route.

    Attributes:
        active: False once removed.
    """

    def __init__(
        self, optimizer: Optimizer, regularizer: Regularizer, step_size: StepSize, *, partial: bool, hooked: bool
    ) -> None:
        if not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"regularizer is a {type(regularizer).__name__}; build one first: Regularizer(model, L1(1e-4))"
            )
        self.step_size = step_size
        self._partial = partial
        self._hooked = hooked
        self._handles: list[Any] = []
        self._pending: Mapping[int, Any] | None = None  # of a copy: the memo of its deepcopy, until its first use
        self._begin(optimizer, regularizer)

    def _begin(self, optimizer: Optimizer, regularizer: Regularizer) -> None:
        self._regularizer = regularizer
        self.active = True
        self._optimizer: Callable[[], Optimizer | None] = weakref.ref(optimizer)
        self._held: dict[int, Binding] = {}
        self._seen: tuple[list[Binding], list[Tensor], list[Tensor]] = ([], [], [])
        self._refresh(optimizer)
        with _alive_lock:
            _alive.add(self)
        regularizer._attach(self)
        if self._hooked:
            frozen = getattr(optimizer, "attachment", None)
            if isinstance(frozen, Frozen):
                frozen.release(self._held)
            self._hook(optimizer)
        else:
            optimizer.attachment = self  # type: ignore[attr-defined]

    def _hook(self, optimizer: Optimizer) -> None:
        if not self._handles:
            before = optimizer.register_step_pre_hook(self._before_hook)
            after = optimizer.register_step_post_hook(self._after_hook)
            # First among the hooks: a mask or an average must see the weights after the prox.
            optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
            self._handles = [before, after]
            # A deepcopy of an optimizer drops its hooks, so this one says how it is copied.
            optimizer.__deepcopy__ = functools.partial(_copied, weakref.ref(optimizer))  # type: ignore[attr-defined]

    @property
    def regularizer(self) -> Regularizer:
        """Whose penalties it applies."""
        self._settle()
        return self._regularizer

    def _settle(self) -> None:
        """A copy takes hold of the regularizer that was copied with it; without one it does nothing."""
        if self._pending is not None:
            memo, self._pending = self._pending, None
            copied = memo.get(id(self._regularizer))
            if copied is not None:
                copied._settle()

    @property
    def alive(self) -> bool:
        """The optimizer exists."""
        return self._optimizer() is not None

    def remove(self) -> None:
        """Takes the prox off the optimizer: `reg()` has the gradient of its parameters again."""
        self._settle()
        self._regularizer._settle()
        optimizer, forget = self._optimizer(), getattr(self.step_size, "forget", None)
        if optimizer is not None and forget is not None:
            for parameter in self._seen[1]:
                forget(optimizer, parameter)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.active = False
        self._regularizer._detach(self)
        if optimizer is not None and self._hooked and not _attached(optimizer):
            optimizer.__dict__.pop("__deepcopy__", None)

    def penalties(self, optimizer: Optimizer) -> Mapping[int, Penalty | None]:
        enabled = self.regularizer.enabled  # settles a copy first
        held = self.held().items()
        if enabled and torch.compiler.is_compiling():
            return {id_: binding.compiled_penalty(binding.parameter()) for id_, binding in held}
        return {id_: binding.penalty if enabled else None for id_, binding in held}

    def held(self) -> Mapping[int, Binding]:
        """By `id`, the parameters that this optimizer regularizes by prox."""
        optimizer = self._optimizer()
        if optimizer is None or not self.active:
            return {}
        self._refresh(optimizer)
        return self._held

    def present_steps(self) -> dict[int, Step]:
        """By `id` of each parameter it carries, the prox step as `step_sizes.present_step` sees it."""
        optimizer, held = self._optimizer(), self.held()
        if optimizer is None:
            return {}
        return {
            id(parameter): present_step(self.step_size, optimizer, group, parameter)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in held
        }

    def describe(self) -> str:
        """The route's name in `explain()`."""
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        # AdamW of torch before 2.7 has no such key, and decays all the same; Adafactor has it nowhere.
        decoupled = isinstance(optimizer, (AdamW, Adafactor))
        beside = ""
        if any(group.get("weight_decay") and group.get("decoupled_weight_decay", decoupled) for group in groups):
            beside = ", beside decoupled decay"
        elif any(group.get("lambd") for group in groups):
            beside = ", beside its own lambd"
        elif any(group.get("centered") for group in groups):
            beside = ", whose centered variance fades at rest"
        if self._hooked:  # a swap-in rounds once, and by chance
            narrow = {binding.parameter().dtype for binding in self._held.values()} & set(NARROW)
            beside += "".join(
                f", rounded twice in {str(dtype).removeprefix('torch.')}" for dtype in NARROW if dtype in narrow
            )
        return f"prox ({type(optimizer).__name__}{beside})"

    def pairs(self) -> list[tuple[Tensor, Penalty | None]]:
        """(parameter, penalty) as they stand: what a copy of the optimizer alone goes on with."""
        enabled = self.regularizer.enabled
        return [(binding.parameter(), binding.penalty if enabled else None) for binding in self.held().values()]

    def renew(self, regularizer: Regularizer, memo: Mapping[int, Any] | None = None) -> None:
        """Carries `regularizer`, a copy, on the copy of the optimizer that deepcopy's `memo` holds; or on its own."""
        optimizer = self._optimizer() if memo is None else memo.get(id(self._optimizer()))
        if optimizer is not None:
            new = self if memo is None else memo.get(id(self)) or copy.deepcopy(self, dict(memo))
            new._pending = None
            new._begin(optimizer, regularizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        self._settle()
        new = object.__new__(Attachment)
        new.__dict__.update(self.__getstate__(), _optimizer=_nothing, _pending=memo)
        memo[id(self)] = new
        return new

    def __getstate__(self) -> dict[str, Any]:
        # An optimizer that was pickled along is held until the regularizer's first use takes hold of it. What a step
        # that an error broke off had asked is left behind: functions, which do not pickle.
        return {
            **self.__dict__,
            "_optimizer": self._optimizer(),
            "_handles": [],
            "_held": {},
            "_seen": ([], [], []),
            "_asked": {},
            "_tangents": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizer = state["_optimizer"]
        self.__dict__.update(state, _optimizer=lambda: optimizer)
        if self._hooked and self.active and optimizer is not None:
            self._hook(optimizer)

    def _before_hook(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.before(optimizer)

    def _after_hook(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.apply(optimizer)

    def _refresh(self, optimizer: Optimizer) -> None:
        """Finds which selected parameters the optimizer holds, if the model or the groups have changed since."""
        bindings = self._regularizer._current(materialized=False)
        live = [binding.parameter() for binding in bindings]
        params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if (
            bindings is self._seen[0]
            and all(map(operator.is_, live, self._seen[1]))
            and len(params) == len(self._seen[2])
            and all(map(operator.is_, params, self._seen[2]))
        ):
            return
        own = set(map(id, params))
        held = {
            id(parameter): binding for parameter, binding in zip(live, bindings, strict=True) if id(parameter) in own
        }
        self._check(optimizer, held, [b for p, b in zip(live, bindings, strict=True) if id(p) not in own])
        self._held, self._seen = held, (bindings, live, params)

    def _check(self, optimizer: Optimizer, held: dict[int, Binding], missing: list[Binding]) -> None:
        """Raises where this optimizer cannot carry the prox of what is selected."""
        kind = type(optimizer).__name__
        names = ", ".join(binding.name for binding in missing)
        before = {binding.name for binding in self._held.values()}
        if any(binding.name in before for binding in missing):
            raise RuntimeError(
                f"{kind} holds a former tensor of {names}: the model's parameter was replaced (as load_state_dict"
                "(assign=True), to_empty and parametrizations do). Build the optimizer again from model.parameters(); "
                "inside torch.func.functional_call call reg(parameters) instead of reg()"
            )
        if missing and not self._partial:
            raise ValueError(
                f"{kind} does not hold the selected {names}; give it these parameters, exclude them from the "
                "regularizer, or pass partial=True if another optimizer has them"
            )
        if not held:
            raise ValueError(f"{kind} holds none of the selected parameters ({names}); give it some, or select others")
        with _alive_lock:
            others = list(_alive)
        for other in [other for other in others if other is not self and other.alive and other.active]:
            for id_ in held.keys() & other._held.keys():
                raise ValueError(
                    f"{held[id_].name} already has its {other.describe()}, and twice is another penalty; take that off "
                    "first, with handle.remove(), optimizer.attachment.remove() or del optimizer"
                )
        dense_only = type(optimizer) in STEP_SIZES and not isinstance(optimizer, (SGD, Adagrad))
        for binding in held.values():
            owner = binding.selected.owner
            if dense_only and isinstance(owner, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and owner.sparse:
                raise ValueError(
                    f"{binding.name} has sparse gradients, as its {type(owner).__name__} was asked to give, and {kind} "
                    "takes none; build it with sparse=False, or use SGD or Adagrad"
                )
            if optimizer.defaults.get("differentiable") and is_sharded(binding.parameter()):
                raise ValueError(
                    f"{binding.name} is sharded, and {kind} differentiable: a sharded weight's prox has no graph; "
                    f"leave "
                    "differentiable=False, or keep the model on one process"
                )
            if binding.parameter().is_complex() and isinstance(self.step_size, Diagonal):
                raise ValueError(
                    f"{binding.name} is complex: {kind} steps its real and imaginary parts apart, under which the "
                    "penalty of the modulus has no closed-form prox; use ProxSGD, or add reg() to the loss"
                )


def attach(
    optimizer: Optimizer, regularizer: Regularizer, *, step_size: StepSize | None = None, partial: bool = False
) -> Attachment:
    """Lets an optimizer that exists apply the prox of `regularizer` after each of its steps: exact zeros.

    w ← prox(w, s) with s the optimizer's unit response (see `torchreg.optim.step_sizes`), so that the solution is that
    of loss + penalty whatever the optimizer. From now on `reg()` gives the value of the penalty without a gradient
    for the parameters that `optimizer` holds.

    bfloat16 and float16 weights are rounded twice, to nearest: by the optimizer's own step, and after the prox, which
    is in float32. What moves them by less than half a spacing is lost in both; ProxSGD, ProxAdam and ProxAdamW keep it.

    Args:
        optimizer: SGD, ASGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta or Adafactor of
            `torch.optim`; any other with a `step_size` of yours.
        regularizer: whose penalties to apply.
        step_size: `fn(optimizer, group, parameter) -> number or tensor`, asked for after each real step; `StepSize`
            tells how one may follow a momentum. The default is the unit response of the optimizer's class.
        partial: allow that the optimizer lacks some selected parameters; another may carry those.
    Returns:
        The attachment; its `remove()` undoes it. A `deepcopy` of a stock optimizer alone has no hooks, and so no prox:
        copy (model, regularizer, optimizer) together, or attach again.
    Raises:
        ValueError: the class has no known unit response, the optimizer lacks a selected parameter, or a parameter
            already has a prox. Nothing has changed then.

    >>> model = torch.nn.Linear(3, 1)
    >>> reg = Regularizer(model, L1(0.1))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> handle = attach(optimizer, reg)
    >>> reg().requires_grad
    False
    >>> handle.remove()
    >>> reg().requires_grad
    True
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the optimizer itself")
    if refusal := getattr(optimizer, "not_attachable", ""):
        raise ValueError(f"{type(optimizer).__name__} {refusal}")
    if step_size is None:
        step_size = step_size_of(optimizer)
    elif not callable(step_size):
        raise TypeError(f"step_size={step_size!r} cannot be called; pass fn(optimizer, group, parameter) -> step")
    return Attachment(optimizer, regularizer, step_size, partial=partial, hooked=True)


def _idle(penalty: Penalty | None) -> bool:
    """Nothing to apply: the regularizer is disabled, or every strength is 0; a compiled graph does not look."""
    return penalty is None or (not torch.compiler.is_compiling() and penalty.is_zero)


def _linearized(penalty: Penalty, parameter: Tensor, optimizer: Optimizer) -> Penalty:
    """The penalty that follows a step from where `parameter` is; a differentiable optimizer's has a gradient too."""
    differentiable = bool(optimizer.defaults.get("differentiable"))
    with torch.set_grad_enabled(differentiable):
        return penalty.linearized(parameter.clone() if differentiable else parameter)  # a graph keeps the old weights


def _is_large(optimizer: Optimizer, parameter: Tensor, penalty: Penalty) -> bool:
    """A CPU's cache does not hold all of the parameter, and its prox is the same in pieces, which fit."""
    soft = None if torch.compiler.is_compiling() else penalty.coefficients()
    return (
        soft is not None
        and soft.anchor is None
        and parameter.is_cpu
        and type(parameter) is torch.nn.Parameter
        and parameter.numel() > PIECE
        and parameter.is_contiguous()
        and not torch.is_grad_enabled()
        and getattr(optimizer, "found_inf", None) is None
    )


def _nothing() -> None:
    """The optimizer of a copied handle before it has one."""


def _attached(optimizer: Optimizer) -> list[Attachment]:
    """The attachments that `optimizer` carries in its hooks."""
    owners = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Attachment)]


def _copied(reference: weakref.ref[Optimizer], memo: dict[int, Any]) -> Optimizer:
    """A deepcopy of an optimizer with the copies of its attachments, which settle at its first step."""
    optimizer: Any = reference()
    how = optimizer.__dict__.pop("__deepcopy__")
    try:
        new: Optimizer = copy.deepcopy(optimizer, memo)
    finally:
        optimizer.__deepcopy__ = how
    for attachment in _attached(optimizer):
        copy.deepcopy(attachment, memo)._hook(new)
    return new
