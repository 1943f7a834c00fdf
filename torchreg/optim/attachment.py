"""Attachment: an optimizer that carries a regularizer's prox."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from torchreg._distributed import is_sharded
from torchreg._tensors import Step
from torchreg.binding.bindings import Binding
from torchreg.binding.regularizer import Regularizer
from torchreg.optim.executors.job import Job
from torchreg.optim.executors.plain import Prox
from torchreg.optim.executors.rounding import NARROW, NearestRounding, Rounding
from torchreg.optim.step_hooks import StepHooks, unwrapped_optimizer
from torchreg.optim.step_sizes import STEP_SIZES, FunctionStep, Group, State, StepSize, sampled_step, step_size_of
from torchreg.optim.watch import Watch
from torchreg.penalties import Penalty

_carriers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""A weak reference to the carrier of each parameter, whatever its regularizer: a newer one takes over from it."""


class Attachment:
    """The carrier of parameters: an optimizer that applies a regularizer's prox to them after each of its steps.

    The newest attachment takes a parameter over from an older one, whose optimizer raises where it is stepped after
    that. A copy or pickle of the optimizer and the regularizer in one call keeps them together.

    Attributes:
        optimizer, regularizer, step_size: what it was made of.
        in_step: the optimizer is in the middle of a step.
        stepped: it has taken a step since somebody set this to False.
    """

    def __init__(
        self, optimizer: Optimizer, regularizer: Regularizer, step_size: StepSize, *, partial: bool = False
    ) -> None:
        if not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"regularizer is a {type(regularizer).__name__}; build one first: Regularizer(model, L1(1e-4))"
            )
        self.optimizer, self.regularizer, self.step_size = optimizer, regularizer, step_size
        self.in_step = self.stepped = False
        self._partial = partial
        self._held: list[Tensor] = []  # all parameters of the optimizer
        self._carried: list[tuple[Tensor, Binding]] = []
        self._lost: list[Tensor] = []  # those that a newer attachment has taken over
        self._hooks: StepHooks | None = None
        self._prox: Prox | None = None
        self._watch: Watch | None = None
        self._find()
        self._take_over()

    # ------------------------------------------------------------------ which parameters

    @property
    def active(self) -> bool:
        """It carries a parameter."""
        return any(binding.carrier is self for _, binding in self._carried)

    def carried(self) -> list[tuple[Tensor, Binding]]:
        """The parameters that it carries, each with its binding, as model and optimizer are now.

        Raises:
            RuntimeError: the optimizer holds a former tensor of a parameter that was replaced.
        """
        self.refresh()
        return [(w, binding) for w, binding in self._carried if binding.carrier is self]

    def refresh(self) -> None:
        """Looks whether the model or the optimizer has changed, and takes over parameters that it was given since."""
        held = [w for group in self.optimizer.param_groups for w in group["params"]]
        if not (
            self.regularizer.resolution.is_of(self._carried)
            and len(held) == len(self._held)
            and all(map(operator.is_, held, self._held))
        ):
            self._find()
            self._take_over()

    def _find(self) -> None:
        """Finds the selected parameters that the optimizer holds; on an error nothing has changed."""
        held = [w for group in self.optimizer.param_groups for w in group["params"]]
        bindings, ids = self.regularizer.resolution.current(), set(map(id, held))
        every = [(binding.parameter(), binding) for binding in bindings]
        carried = [(w, binding) for w, binding in every if id(w) in ids]
        self._check(carried, [binding for w, binding in every if id(w) not in ids])
        self._carried, self._held = carried, held

    def _check(self, carried: list[tuple[Tensor, Binding]], missing: list[Binding]) -> None:
        """Raises where the optimizer cannot carry what is selected."""
        optimizer, kind = self.optimizer, type(self.optimizer).__name__
        names = ", ".join(binding.name for binding in missing)
        if {binding.name for _, binding in self._carried} & {binding.name for binding in missing}:
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
        if not carried:
            raise ValueError(f"{kind} holds none of the selected parameters ({names}); give it some, or select others")
        dense_only = type(optimizer) in STEP_SIZES and not isinstance(optimizer, (SGD, Adagrad))
        for w, binding in carried:
            owner = binding.selected.owner
            if dense_only and isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.sparse:
                raise ValueError(
                    f"{binding.name} has sparse gradients, as its {type(owner).__name__} was asked to give, and {kind} "
                    "takes none; build it with sparse=False, or use SGD or Adagrad"
                )
            if optimizer.defaults.get("differentiable") and is_sharded(w):
                raise ValueError(
                    f"{binding.name} is sharded, and {kind} differentiable: the prox of a sharded weight has no graph; "
                    "leave differentiable=False, or keep the model on one process"
                )
            if w.is_complex() and self.step_size.diagonal:
                raise ValueError(
                    f"{binding.name} is complex: {kind} steps its real and imaginary parts apart, under which the "
                    "penalty of the modulus has no closed-form prox; use ProxSGD, or add reg() to the loss"
                )

    # ------------------------------------------------------------------ who carries them

    def _take_over(self) -> None:
        """Makes this the carrier of its parameters, but for those that a newer one has taken over."""
        for w, binding in self._carried:
            if any(w is lost for lost in self._lost):
                continue
            older = carrier_of(w)
            if older is not None and older is not self:
                older._hand_over(w, self)
            binding.carrier = self
            _carriers[w] = weakref.ref(self)
        self._watch_carried()

    def _hand_over(self, parameter: Tensor, newer: Attachment) -> None:
        """Gives a parameter to a newer attachment."""
        self._lost.append(parameter)
        for w, binding in self._carried:
            if w is parameter and binding.carrier is self:
                binding.carrier = None
        self._watch_carried()
        if newer.optimizer is self.optimizer and not self.active:
            self._let_go()

    def _watch_carried(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        self._watch = Watch(self, [w for w, binding in self._carried if binding.carrier is self])

    def remove(self) -> None:
        """Takes the prox off the optimizer, and gives its parameters back to the loss: `reg()` has their gradient."""
        for w, binding in self._carried:
            if binding.carrier is self:
                self.step_size.on_detach(self.optimizer.state.get(w, {}))
                binding.carrier = None
                _carriers.pop(w, None)
        self._let_go()

    def _let_go(self) -> None:
        """Ends its part in the optimizer."""
        self._lost = []
        if self._watch is not None:
            self._watch.remove()
        if self._hooks is not None:
            self._hooks.remove()
        elif getattr(self.optimizer, "attachment", None) is self:
            self.optimizer.attachment = None  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        # A copied optimizer has no hooks, and the index of carriers no copies.
        return {**self.__dict__, "_hooks": self.is_hooked and self.active, "_watch": None, "_prox": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _hooks=None)
        if state["_hooks"]:
            self.hook()
        self._take_over()

    def describe(self) -> str:
        """The carrier's name in `explain()`."""
        groups, kind = self.optimizer.param_groups, type(self.optimizer).__name__
        # AdamW of torch before 2.7 has no such key, and decays all the same; Adafactor has it nowhere.
        decoupled = isinstance(self.optimizer, (AdamW, Adafactor))
        note = ""
        if any(group.get("weight_decay") and group.get("decoupled_weight_decay", decoupled) for group in groups):
            note = ", beside decoupled decay"
        elif any(group.get("lambd") for group in groups):
            note = ", beside its own lambd"
        elif any(group.get("centered") for group in groups):
            note = "; its centered variance vanishes at a stationary point"
        if self.is_hooked:  # a swap-in rounds once, and stochastically
            dtypes = {w.dtype for w, _ in self._carried}
            note += "".join(f", rounded twice in {str(x).removeprefix('torch.')}" for x in NARROW if x in dtypes)
        return f"prox ({kind}{note})"

    # ------------------------------------------------------------------ its steps

    @property
    def is_hooked(self) -> bool:
        """The prox runs in hooks of a stock optimizer, and not in the optimizer's own step."""
        return self._hooks is not None

    def look(self) -> None:
        """Looks whether the weights train without a step of this optimizer, and warns."""
        if self._watch is not None:
            self._watch.look()

    def check_carries(self) -> None:
        """Raises where another optimizer has taken over a parameter of this one.

        Raises:
            RuntimeError: it says which one carries the parameter now.
        """
        for w in self._lost:
            newer = carrier_of(w)
            if newer is not None and newer.optimizer is not self.optimizer:
                name = next(binding.name for x, binding in newer._carried if x is w)
                own, other = type(self.optimizer).__name__, type(newer.optimizer).__name__
                raise RuntimeError(
                    f"this {own} no longer carries the penalty of {name}: a newer {other} has taken it over. Step the "
                    f"{other}, or let this one take it back: tr.optim.attach(optimizer, regularizer)"
                )

    def job(self, stock: Callable[[Optimizer], Any], rounding: Rounding) -> Job:
        """The step that the optimizer is about to take."""
        return Job(self.optimizer, self.penalties(), self.step_size, stock, rounding)

    def penalties(self) -> Mapping[int, Penalty | None]:
        """By `id`, the penalty of each parameter that it carries; None where no prox acts now."""
        self.refresh()
        enabled = self.regularizer.enabled
        if enabled and torch.compiler.is_compiling():
            return {id(w): b.compiled_penalty(w) for w, b in self._carried if b.carrier is self}
        return {
            id(w): b.penalty if enabled and w.requires_grad else None for w, b in self._carried if b.carrier is self
        }

    def hook(self) -> None:
        """Hooks the prox behind each step of a stock optimizer."""
        # First among the hooks: a mask or an average must see the weights after the prox.
        self._hooks = StepHooks(self.optimizer, self._after_step, self._before_step, first=True)

    def _before_step(self) -> None:
        self.check_carries()
        self.in_step = True
        self._prox = Prox(self.job(_own_step, NearestRounding()))

    def _after_step(self) -> None:
        assert self._prox is not None
        prox, self._prox = self._prox, None
        prox.apply()
        self.stepped, self.in_step = True, False

    def sampled_steps(self) -> dict[int, Step]:
        """By `id` of each parameter that it carries, the step of the last prox: see `step_sizes.sampled_step`."""
        groups = {id(w): group for group in self.optimizer.param_groups for w in group["params"]}
        return {
            id(w): sampled_step(self.step_size, groups[id(w)], self.optimizer.state.get(w, {}), w)
            for w, _ in self.carried()
        }


def _own_step(optimizer: Optimizer) -> None:
    """A hooked optimizer takes the stock step by itself."""


def carrier_of(parameter: Tensor) -> Attachment | None:
    """The attachment that carries a parameter, whatever its regularizer."""
    reference = _carriers.get(parameter)
    return None if reference is None else reference()


def carriers(regularizer: Regularizer) -> list[Attachment]:
    """The attachments that carry parameters of a regularizer."""
    return [carrier for carrier in regularizer.carriers() if isinstance(carrier, Attachment)]


def attach(
    optimizer: Optimizer,
    regularizer: Regularizer,
    *,
    step_size: StepSize | Callable[[Group, State, Tensor], Step] | None = None,
    partial: bool = False,
) -> Attachment:
    """Lets an optimizer that exists apply the prox of `regularizer` after each of its steps: exact zeros.

    w ← prox(w, s) with s the optimizer's unit response (see `torchreg.optim.step_sizes`), so that the solution is that
    of loss + penalty whatever the optimizer. From now on the optimizer carries the penalty of the parameters that it
    holds: `reg()` gives their part of the penalty without a gradient. An optimizer that carried them before hands them
    over, and raises if it is stepped after that.

    bfloat16 and float16 weights are rounded twice, to nearest: by the optimizer's own step, and after the prox, which
    is in float32. What moves them by less than half a spacing is lost in both; ProxSGD, ProxAdam and ProxAdamW keep it.

    Args:
        optimizer: SGD, ASGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta or Adafactor of
            `torch.optim`; any other with a `step_size` of yours.
        regularizer: whose penalties to apply.
        step_size: a `StepSize`, or a function of (group, state, parameter) that returns a number or a tensor, asked for
            after each real step. The default is the unit response of the optimizer's class.
        partial: allow that the optimizer lacks some selected parameters; another may carry those.
    Returns:
        The attachment; its `remove()` gives the parameters back to the loss. A copy or pickle of model, regularizer and
        optimizer in one call keeps the prox; a copy of the optimizer without the regularizer has none.
    Raises:
        TypeError: an argument is of another kind.
        ValueError: the class has no known unit response, or the optimizer lacks a selected parameter. Nothing has
            changed then.

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
    optimizer = unwrapped_optimizer(optimizer)
    if refusal := getattr(optimizer, "not_attachable", ""):
        raise ValueError(f"{type(optimizer).__name__} {refusal}")
    if step_size is None:
        step_size = step_size_of(optimizer)
    elif not isinstance(step_size, StepSize):
        if not callable(step_size):
            raise TypeError(f"step_size={step_size!r} cannot be called; pass fn(group, state, parameter) -> step")
        step_size = FunctionStep(step_size)
    attachment = Attachment(optimizer, regularizer, step_size, partial=partial)
    if hasattr(optimizer, "attachment"):  # a swap-in, whose own step applies the prox
        optimizer.attachment = attachment
    else:
        attachment.hook()
    return attachment
