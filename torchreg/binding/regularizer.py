"""Regularizer: penalties bound to named parameters."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchreg._checks import nonnegative
from torchreg._tensors import Step, checked_step, is_differentiated
from torchreg.binding import evaluation
from torchreg.binding.bindings import Binding, Carrier, Term
from torchreg.binding.explain import explained
from torchreg.binding.resolve import Resolution, Rules, Scale, given_tensors
from torchreg.binding.selection import Selector, warn_about
from torchreg.penalties import Penalty


class Regularizer:
    """Penalties bound to the parameters of a model: Σ over its terms of Ω_term(their parameters).

    Names are resolved once; parameters are read through their modules at each use. The model is not registered
    anywhere, so its parameters and `state_dict` stay as they are. A copy or pickle brings its model along, and what is
    copied together in one call stays together.

    Each parameter has at most one carrier. Without one its penalty acts through the loss: add `reg()` to it. A proximal
    optimizer, or `attach`, becomes the carrier of the parameters that it holds: it applies the prox, and `reg()` gives
    their part of the penalty without a gradient, so that nothing is penalized twice. The newest carrier takes over.

    Args:
        model: the model whose parameters are penalized.
        penalty: one penalty for the default selection (or for `include`), or rules: a dict from selector to
            penalty, or a list of (selector, penalty). The first rule that matches a parameter wins, and `None`
            leaves it out.
        include: which parameters a lone penalty takes; see `torchreg.select`. Rules name theirs themselves.
        exclude: which parameters are left out, whatever selects them.
        scale: `scale(name, parameter)` gives a factor ≥ 0 for the strengths of that parameter; called once, here.
        toward: a state dict w₀ with an entry for every selected parameter: penalizes w − w₀. It is copied.
    Raises:
        TypeError: something of a kind that cannot serve: a tensor for the model, a selector of no known kind, a
            parameter of an integer type.
        ValueError: a selector matches nothing, a rule is wholly shadowed by earlier ones, `scale` gives no
            factor, `toward` lacks a parameter or has it in another shape, or a penalty cannot take a parameter's
            shape.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> reg = Regularizer(net, {"0.weight": L1(1e-3), "*.weight": L2(1e-4)})
    >>> print(reg.explain())
    parameter  shape  weights  term      λ                acts in  note
    ---------  -----  -------  --------  ---------------  -------  --------------------------
    0.weight   3×4         12  0.weight  strength=0.001   loss     also matched by "*.weight"
    0.bias     3            3                                      bias
    2.weight   2×3          6  *.weight  strength=0.0001  loss
    2.bias     2            2                                      bias
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: Penalty | Rules,
        *,
        include: Selector | None = None,
        exclude: Selector | None = None,
        scale: Scale | None = None,
        toward: Mapping[str, Tensor] | None = None,
    ) -> None:
        if scale is not None and not callable(scale):
            raise TypeError(
                f"scale={scale!r} cannot be called; pass scale=lambda name, w: factor, or change the strength"
            )
        self._enabled = True
        self.resolution = Resolution(model, penalty, include, exclude, scale, toward)
        warn_about([binding.selected for binding in self.resolution.bindings])

    # ------------------------------------------------------------------ reading

    @property
    def model(self) -> nn.Module:
        """The model whose parameters are penalized."""
        return self.resolution.model

    def bindings(self) -> list[Binding]:
        """Each selected parameter with its term, its penalty now, and its carrier.

        Raises:
            RuntimeError: the model is no longer what the names were resolved in: a module was replaced, tensors were
                tied or came apart, or a lazy module has not got its shape yet; or the carrier's optimizer holds a
                former tensor of a parameter.

        >>> reg = Regularizer(nn.Linear(3, 2), L1(1e-4))
        >>> [(binding.name, binding.penalty.strength, binding.carrier) for binding in reg.bindings()]
        [('weight', 0.0001, None)]
        """
        bindings = self._refreshed()
        self.resolution.check_materialized()
        return bindings

    def carriers(self) -> list[Carrier]:
        """The attachments that carry parameters, each once; a changed model is not noticed here."""
        return list({id(b.carrier): b.carrier for b in self.resolution.bindings if b.carrier is not None}.values())

    def __call__(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Σ of all terms: a 0-d tensor, float32 or wider, with a gradient for the parameters on the loss route.

        With sharded weights every process has to call it, and has the total of the whole (`docs/many-processes.md`).

        Args:
            parameters: other weights by name, instead of the model's: those given to `torch.func.functional_call`. The
                gradient is theirs. Names that are not selected are passed over.
        Raises:
            ValueError: `parameters` lacks a selected one, or has it in another shape.
            RuntimeError: the model is no longer what the names were resolved in: a module was replaced, tensors were
                tied or came apart, or a lazy module has not got its shape yet.

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> reg = Regularizer(layer, L1(0.5))
        >>> torch.func.grad(reg)({"weight": torch.tensor([[2.0, -3.0]])})
        {'weight': tensor([[ 0.5000, -0.5000]])}
        """
        bindings = self._evaluated()
        given = None if parameters is None else given_tensors(parameters, bindings)
        if given is None and not torch.compiler.is_compiling() and is_differentiated():
            self._warn_of_constants(bindings)
        values = [value for _, value in evaluation.values(self._items(bindings, False, given))]
        return evaluation.total(values, bindings[0].parameter())

    def components(self) -> dict[str, Tensor]:
        """The value of each term, by its key; they sum to `reg()`."""
        bindings = self._evaluated()
        parts: dict[str, list[Tensor]] = {key: [] for key in self.terms}
        for key, value in evaluation.values(self._items(bindings, by_term=True)):
            parts[key].append(value)
        return {key: evaluation.total(values, bindings[0].parameter()) for key, values in parts.items()}

    def add_gradient_(self) -> Tensor:
        """Adds the gradient of `reg()` to `.grad` of every parameter on the loss route, as `loss + reg()` would have.

        For a loop that leaves `reg()` out of its loss: on a CPU it takes one pass over the weights, without a graph.
        Call it once a step, after the last `backward()` and before clipping and `step()`; under a `GradScaler` after
        `unscale_`. Frozen parameters and those that a proximal optimizer holds are left alone.

        Returns:
            The value of `reg()`, without a graph, to log.
        Raises:
            RuntimeError: the model has changed as in `reg()`.

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, -1.0)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> Regularizer(layer, L1(0.25)).add_gradient_()
        tensor(0.5000)
        >>> layer.weight.grad
        tensor([[0.7500, 0.7500]])
        """
        bindings = self._evaluated()
        values = [value for _, value in evaluation.add_gradients_(self._items(bindings, by_term=False))]
        return evaluation.total(values, bindings[0].parameter())

    def prox_(self, step: Step | Mapping[str, Step], start: Mapping[str, Tensor] | None = None) -> None:
        """Applies the prox to every selected parameter in place: for an optimizer of one's own.

        Call it after the optimizer's step, and add only `reg().detach()` to the loss, or nothing.

        Args:
            step: the step by which a constant gradient of 1 would have moved a weight (plain SGD: the learning
                rate); a number, a tensor that broadcasts against every parameter, or a dict from name to these.
            start: from name to a copy of the weights that the optimizer's step started from. `Reweighted` needs it.
        Raises:
            ValueError: a step is negative, infinite or NaN, does not broadcast, or is missing, or a start is; nothing
                has changed.
            RuntimeError: a parameter is already regularized by an attached optimizer, or computed by a
                parametrization, or the model has changed as in `reg()`.
        """
        bindings = self._evaluated()
        if carriers := self.carriers():
            raise RuntimeError(
                f"{carriers[0].describe()} already applies the prox; call its step alone, or reg.detach() first"
            )
        steps = []
        for binding in bindings:
            if isinstance(step, Mapping) and binding.name not in step:
                raise ValueError(f"no step for {binding.name}; give one for each of {[b.name for b in bindings]}")
            own = step[binding.name] if isinstance(step, Mapping) else step
            if binding.selected.computed:
                raise RuntimeError(
                    f"{binding.name} is computed by a parametrization, so a prox cannot write to it; add reg() to the "
                    "loss, or remove the parametrization"
                )
            if binding.penalty.linearizes and (start is None or binding.name not in start):
                raise ValueError(
                    f"{binding.name} has the penalty {binding.penalty!r}, a tangent where the step started, and no "
                    f"start; "
                    "clone the weights before the optimizer moves them: start={name: w.detach().clone() for name, w in "
                    "reg.named_parameters()}, and prox_(step, start)"
                )
            steps.append(checked_step(own, binding.parameter().shape))
        if self._enabled:
            with torch.no_grad():
                for binding, own in zip(bindings, steps, strict=True):
                    penalty = binding.penalty
                    if start is not None and penalty.linearizes:
                        penalty = penalty.linearized(start[binding.name])
                    penalty.prox_(binding.parameter(), own)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of every selected parameter, as it is now."""
        for binding in self.bindings():
            yield binding.name, binding.parameter()

    def explain(self) -> str:
        """A table of every parameter of the model: its term, its λ, where it acts, and why the rest is left out.

        It warns, as far as a model's modules and weights tell, where a penalty does not do what it says: of decoupled
        decay beside the prox, of a norm layer that undoes the scale of a weight, and of neurons that no weight and
        no positive bias feeds any more, which under a ReLU never come back; and it counts what is NaN or infinite. See
        `docs/where-it-ends.md`.
        """
        return explained(self.model, self._refreshed(), self.resolution.why_not, self._enabled)

    def detach(self) -> None:
        """Takes the prox off every optimizer that carries it: the penalty acts through the loss again.

        >>> model = nn.Linear(3, 2)
        >>> reg = Regularizer(model, L1(1e-4))
        >>> optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
        >>> reg().requires_grad
        False
        >>> reg.detach()
        >>> reg().requires_grad
        True
        """
        for carrier in self.carriers():
            carrier.remove()

    # ------------------------------------------------------------------ strengths

    def __setattr__(self, name: str, value: Any) -> None:
        terms = self.terms if "resolution" in self.__dict__ else {}
        if name == "factor" or any(name in term.base.strengths for term in terms.values()):
            raise AttributeError(
                f"{name} belongs to a term: reg[{next(iter(terms))!r}].{name} = ...; the terms are {list(terms)}"
            )
        super().__setattr__(name, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __repr__(self) -> str:
        return f"Regularizer({type(self.model).__name__}, {[term.penalty for term in self.terms.values()]})"

    def __getitem__(self, term: str) -> Term:
        """The term of that key: `reg["l1"].strength = 1e-3`."""
        if term not in self.terms:
            raise KeyError(f"no term {term!r}; the terms are {list(self.terms)}")
        return self.terms[term]

    @property
    def terms(self) -> dict[str, Term]:
        """The terms by key, in the order of the rules."""
        return dict(self.resolution.terms)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The strengths and the factor of each term: plain numbers, for `torch.load(weights_only=True)`."""
        return {key: {**term.strengths, "factor": term.factor} for key, term in self.terms.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Sets the strengths of every term; on an error nothing has changed.

        Raises:
            TypeError: it is not a state of a regularizer.
            ValueError: the state is of other terms, or a number in it is not finite and ≥ 0.
        """
        own = self.state_dict()
        if not (isinstance(state, Mapping) and all(isinstance(values, Mapping) for values in state.values())):
            what = f"a dict with {list(state)[:3]} ..." if isinstance(state, Mapping) else type(state).__name__
            raise TypeError(f"expected the state of a regularizer, got {what}; load what reg.state_dict() gave")
        if {key: set(values) for key, values in state.items()} != {key: set(values) for key, values in own.items()}:
            raise ValueError(f"the state is of other terms: it has {_outline(state)}, this regularizer {_outline(own)}")
        for key, values in state.items():
            for name, value in values.items():
                nonnegative(f"{key}.{name}", value, "load a state that state_dict() wrote")
        for key, values in state.items():
            for name, value in values.items():
                setattr(self.terms[key], name, value)

    # ------------------------------------------------------------------ switching off

    @property
    def enabled(self) -> bool:
        """False while every route is switched off."""
        return self._enabled

    def disable(self) -> None:
        """Switches every route off: `reg()` is 0, and no prox acts, until `enable()`."""
        self._enabled = False

    def enable(self) -> None:
        """Switches every route on again."""
        self._enabled = True

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Switches every route off inside a `with` block; what was before comes back after it."""
        before = self.enabled
        self.disable()
        try:
            yield
        finally:
            self._enabled = before

    # ------------------------------------------------------------------ evaluation

    def _items(
        self, bindings: list[Binding], by_term: bool, given: Sequence[Tensor] | None = None
    ) -> Iterator[evaluation.Item]:
        """The items to sum: the term's key, or one for all; the parameter, or the tensor given for it; its penalty."""
        if not self._enabled:
            return
        compiling = torch.compiler.is_compiling()
        for i, binding in enumerate(bindings):
            w = binding.parameter() if given is None else given[i]
            if binding.carrier is not None:
                w = w.detach()
            if compiling:
                yield binding.term.key, w, binding.compiled_penalty(w)
            elif not binding.penalty.is_zero:
                yield binding.term.key if by_term else "", w, binding.penalty

    def _refreshed(self) -> list[Binding]:
        """The bindings, with the carriers of now."""
        bindings = self.resolution.current()
        if not torch.compiler.is_compiling():
            for carrier in self.carriers():
                carrier.refresh()
        return bindings

    def _evaluated(self) -> list[Binding]:
        """The bindings, for an evaluation: carriers warn where the weights train without them."""
        bindings = self.bindings()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for carrier in self.carriers():
                carrier.look()
        return bindings

    def _warn_of_constants(self, bindings: list[Binding]) -> None:
        """Warns where `torch.func` differentiates by other tensors than the model's: a constant penalty."""
        live = [binding.parameter() for binding in bindings if binding.carrier is None]
        if self._enabled and live and all(torch._C._functorch.maybe_get_level(w) == -1 for w in live):
            warnings.warn(
                "reg() reads the model's own parameters, by which torch.func does not differentiate here: the penalty "
                "has no gradient. Pass those of functional_call: reg(parameters)",
                stacklevel=3,
            )


def _outline(state: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{key}({', '.join(values)})" for key, values in state.items()) or "none"
