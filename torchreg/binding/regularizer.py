"""Regularizer: penalties bound to named parameters. Names meet maths here, nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchreg._checks import nonnegative
from torchreg._distributed import fsdp_parameters
from torchreg._tables import printable, render_table, shape_text
from torchreg._tensors import Step, checked_step, is_differentiated
from torchreg.binding import connectivity, evaluation, selection
from torchreg.binding.bindings import Binding, Term
from torchreg.binding.selection import WRAPPED, Inventory, ParameterRef, Parts, Selector
from torchreg.penalties import Penalty

logger = logging.getLogger("torchreg")

Rules = Mapping[Selector, Penalty | None] | Sequence[tuple[Selector, Penalty | None]]
Scale = Callable[[str, Tensor], float]


@dataclasses.dataclass
class Plan:
    """What was asked for, by name: carried out at once, and again when lazy modules have got their shapes."""

    rules: list[tuple[str, Parts | None, Penalty | None]]  # no parts: the default selection
    excluded: dict[str, str]  # name: by what
    scale: Scale | None
    toward: dict[str, Tensor] | None


class Route(Protocol):
    """What an optimizer that carries a regularizer's prox tells it."""

    active: bool

    @property
    def alive(self) -> bool:
        """The optimizer exists."""

    def held(self) -> Mapping[int, Binding]:
        """By `id`, the parameters that this optimizer regularizes by prox."""

    def describe(self) -> str:
        """The optimizer, in words."""

    def renew(self, regularizer: Regularizer, memo: Mapping[int, Any] | None = None) -> None:
        """Carries `regularizer`, a copy, on the copy of the optimizer that deepcopy's `memo` holds; or on its own."""


class Regularizer:
    """Penalties bound to the parameters of a model: Σ over its terms of Ω_term(their parameters).

    Names are resolved once; parameters are read through their modules at each use. The model is not registered
    anywhere, so its parameters and `state_dict` stay as they are. A deepcopy or pickle that holds the model too
    follows the copy; a deepcopy alone stays with the model it has.

    Each parameter takes one route. Without a proximal optimizer it is the loss: add `reg()` to it. Once an
    optimizer with a prox holds a parameter, `reg()` gives its value without a gradient, so that nothing is
    penalized twice.

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
        inventory = Inventory(model)
        rules = _as_rules(penalty, include, inventory)
        excluded = [] if exclude is None else inventory.resolve(exclude)
        reason = "" if exclude is None else f"excluded by {inventory.text(exclude)}"
        self._model = model
        self._enabled = True
        self._routes: list[tuple[weakref.ref[Route], str]] = []
        self._pending: tuple[Mapping[int, Any] | None, list[Route]] | None = None
        self._terms = {key: Term(key, rule) for key, _, rule in rules if rule is not None}
        self._bindings: list[Binding] = []
        self._plan: Plan | None = Plan(
            rules,
            {name: reason for names, _ in excluded for name in names},
            scale,
            None if toward is None else _canonical(toward),
        )
        self._bind(inventory)
        selection.warn_about([binding.selected for binding in self._bindings])

    # ------------------------------------------------------------------ reading

    @property
    def model(self) -> nn.Module:
        """The model whose parameters are penalized."""
        self._settle()
        return self._model

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
        bindings = self._current()
        given = None if parameters is None else _given(parameters, bindings)
        if given is None and not torch.compiler.is_compiling() and is_differentiated():
            self._warn_of_constants(bindings)
        return _total([value for _, value in evaluation.values(self._items(bindings, False, given))], bindings[0])

    def components(self) -> dict[str, Tensor]:
        """The value of each term, by its key; they sum to `reg()`."""
        bindings = self._current()
        parts: dict[str, list[Tensor]] = {key: [] for key in self._terms}
        for key, value in evaluation.values(self._items(bindings, by_term=True)):
            parts[key].append(value)
        return {key: _total(values, bindings[0]) for key, values in parts.items()}

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
        bindings = self._current()
        return _total(
            [value for _, value in evaluation.add_gradients_(self._items(bindings, by_term=False))], bindings[0]
        )

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
        bindings = self._current()
        if routes := list(self._live_routes()):
            raise RuntimeError(
                f"{routes[0].describe()} already applies the prox; call its step alone, or remove the attachment first"
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
        for binding in self._current():
            yield binding.name, binding.parameter()

    def explain(self) -> str:
        """A table of every parameter of the model: its term, its λ, where it acts, and why the rest is left out.

        It warns, as far as a model's modules and weights tell, where a penalty does not do what it says: of decoupled
        decay beside the prox, of a norm layer that undoes the scale of a weight, and of neurons that no weight and
        no positive bias feeds any more, which under a ReLU never come back; and it counts what is NaN or infinite. See
        `docs/where-it-ends.md`.
        """
        bindings = {binding.name: binding for binding in self._current(materialized=False)}
        routes = {id_: route for route in self._live_routes() for id_ in route.held()}
        rows = []
        entries = selection.named_parameters(self._model)
        norms = selection.norms_behind(self._model)
        known = {name for entry in entries for name in entry.names}
        for entry in [*entries, *(binding.selected for name, binding in bindings.items() if name not in known)]:
            parameter = entry.parameter
            lazy = is_lazy(parameter)
            shape = "lazy" if lazy else shape_text(parameter.shape)
            count = "" if lazy else str(parameter.numel())
            binding = next((bindings[name] for name in entry.names if name in bindings), None)
            if binding is None:
                why = self._why_not.get(entry.name, "not selected")
                if why == "frozen" and parameter.requires_grad:
                    why = "was frozen when the Regularizer was built"
                rows.append([printable(entry.name), shape, count, "", "", "", why])
                continue
            penalty = binding.term.penalty.scaled(binding.scale)
            strengths = ", ".join(f"{name}={getattr(penalty, name):g}" for name in penalty.strengths)
            route = routes[id(parameter)].describe() if id(parameter) in routes else "loss"
            tied = f"tied to {', '.join(printable(name) for name, _ in entry.ties)}" if entry.ties else ""
            computed = "computed by a parametrization" if entry.computed else ""
            notes = [
                binding.note,
                tied,
                computed,
                *_caveats(binding, norms, by_prox=route != "loss"),
                "" if binding.anchor is None else "toward",
                "" if self._enabled else "disabled",
            ]
            name, term = printable(binding.name), printable(binding.term.key)
            rows.append([name, shape, count, term, strengths, route, "; ".join(note for note in notes if note)])
        return render_table(["parameter", "shape", "weights", "term", "λ", "acts in", "note"], rows, right=[2])

    # ------------------------------------------------------------------ strengths

    def __setattr__(self, name: str, value: Any) -> None:
        terms = self.__dict__.get("_terms", {})
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
        self._settle()
        if term not in self._terms:
            raise KeyError(f"no term {term!r}; the terms are {list(self._terms)}")
        return self._terms[term]

    @property
    def terms(self) -> dict[str, Term]:
        """The terms by key, in the order of the rules."""
        self._settle()
        return dict(self._terms)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The strengths and the factor of each term: plain numbers, for `torch.load(weights_only=True)`."""
        return {key: {**term.strengths, "factor": term.factor} for key, term in self.terms.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Sets the strengths of every term; on an error nothing has changed.

        Raises:
            TypeError: it is no state of a regularizer.
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
                setattr(self._terms[key], name, value)

    # ------------------------------------------------------------------ switching off

    @property
    def enabled(self) -> bool:
        """False while every route is switched off."""
        self._settle()
        return self._enabled

    def disable(self) -> None:
        """Switches every route off: `reg()` is 0, and no prox acts, until `enable()`."""
        self._settle()
        self._enabled = False

    def enable(self) -> None:
        """Switches every route on again."""
        self._settle()
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

    # ------------------------------------------------------------------ copies

    def __copy__(self) -> Regularizer:
        new = object.__new__(type(self))
        new.__dict__.update(self._own_state(), _edges=self._edges, _routes=list(self._routes), _pending=None)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Regularizer:
        self._settle()
        new = self.__copy__()
        # The model may be copied after its regularizer: which one to follow is settled at the first use.
        new._pending = (memo, list(self._live_routes()))
        memo[id(self)] = new
        return new

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**self._own_state(), "_pending": (None, list(self._live_routes()))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _routes=[], _edges=[])

    def _own_state(self) -> dict[str, Any]:
        """What a copy has for itself: strengths of its own, on the same model."""
        self._settle()
        terms = {key: Term(key, term.base, term.factor) for key, term in self._terms.items()}
        return {
            "_model": self._model,
            "_terms": terms,
            "_bindings": [
                dataclasses.replace(binding, term=terms[binding.term.key], _cached=None) for binding in self._bindings
            ],
            "_why_not": self._why_not,
            "_plan": self._plan,
            "_enabled": self._enabled,
        }

    def _settle(self) -> None:
        """Completes a copy: follows the model and the optimizers that were copied together with this."""
        if self._pending is None:
            return
        (memo, routes), self._pending = self._pending, None
        if memo is not None:
            if id(self._model) not in memo:
                return
            self._model, self._routes = memo[id(self._model)], []
        self._resolve()
        for route in routes:
            route.renew(self, memo)

    # ------------------------------------------------------------------ binding

    def _bind(self, inventory: Inventory) -> None:
        """Carries out the plan: decides the term, scale and anchor of every parameter."""
        assert self._plan is not None
        plan, why_not = self._plan, inventory.why_not | self._plan.excluded
        bindings: dict[str, Binding] = {}
        taken: dict[str, str] = {}
        for key, parts, penalty in plan.rules:
            matched = inventory.default() if parts is None else inventory.choose(parts)
            fresh = [entry for entry in matched if entry.name not in taken]
            if not fresh:
                earlier = " and ".join(f'"{other}"' for other in dict.fromkeys(taken[entry.name] for entry in matched))
                raise ValueError(
                    f'rule "{key}" is wholly shadowed by the earlier {earlier}: '
                    "the first match wins, so put the narrower rule first, or remove this one"
                )
            for entry in matched:
                if entry.name in taken and entry.name in bindings:
                    bindings[entry.name].note = f'also matched by "{key}"'
            taken.update({entry.name: key for entry in fresh})
            for entry in fresh:
                if penalty is None:
                    why_not[entry.name] = plan.excluded.get(entry.name, f'left out by rule "{key}"')
                elif entry.name not in plan.excluded:
                    bindings[entry.name] = Binding(entry, self._terms[key])
        if not bindings:
            raise ValueError("the rules and exclude leave no parameter to regularize; widen the selection")
        for entry in inventory.entries:
            if entry.name not in taken and not why_not[entry.name]:
                why_not[entry.name] = "no rule matches"
        done = {binding.name: binding for binding in self._bindings if binding.ready}
        for name, binding in bindings.items():
            parameter = binding.parameter()
            if name in done:
                binding.scale, binding.anchor, binding.ready = done[name].scale, done[name].anchor, True
            elif not is_lazy(parameter):
                if plan.scale is not None:
                    factor = plan.scale(name, parameter)
                    binding.scale = nonnegative(f"scale for {name}", factor, "return a factor such as 1.0")
                if plan.toward is not None:
                    binding.anchor = _anchor(plan.toward, binding.selected, parameter)
                try:
                    binding.term.base.check(parameter)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                binding.ready = True
        self._bindings = [bindings[entry.name] for entry in inventory.entries if entry.name in bindings]
        self._why_not = why_not
        self._edges = _edges(self._model)
        if not any(is_lazy(entry.parameter) for entry in inventory.entries):
            self._plan = None
        elif plan.toward is not None:
            plan.toward = {name: w.detach().clone() for name, w in plan.toward.items()}

    def _resolve(self) -> None:
        """Finds the owner of every bound parameter in the model by its name; on an error nothing has changed."""
        places = {
            name: (entry, owner) for entry in selection.named_parameters(self._model) for name, owner in entry.places
        }
        modules = dict(selection.named_modules(self._model))
        found = []
        for binding in self._bindings:
            path, _, attribute = binding.name.rpartition(".")
            if binding.name in places:
                entry, owner = places[binding.name]
                ties = [place for place in entry.places if place[0] != binding.name]
                found.append(ParameterRef(binding.name, owner, attribute, ties, entry._exchange))
            elif path in modules and hasattr(modules[path], attribute):
                found.append(ParameterRef(binding.name, modules[path], attribute))
            else:
                raise RuntimeError(f"the model has no {binding.name} any more; build a new Regularizer for it")
        for binding, selected in zip(self._bindings, found, strict=True):
            binding.selected = selected
        self._edges = _edges(self._model)

    def _current(self, materialized: bool = True) -> list[Binding]:
        """The bound parameters, after every check that they are still those of the model."""
        self._settle()
        if self._plan is not None and not any(is_lazy(p) for p in self._model.parameters()):
            self._bind(Inventory(self._model))
        if any(modules.get(key) is not child or type(child) is not kind for modules, key, child, kind in self._edges):
            self._follow()
        self._check_ties()
        if materialized and self._plan is not None:
            for binding in self._bindings:
                if is_lazy(binding.parameter()):
                    raise RuntimeError(
                        f"{binding.name} is not materialized yet; run one forward pass through the model first"
                    )
        return self._bindings

    def _follow(self) -> None:
        """A module was replaced, or became another type: goes on if it was only wrapped or sharded, else refuses."""
        before = {binding.name: binding.selected.owner for binding in self._bindings}
        modules = dict(selection.named_modules(self._model))
        for name, owner in before.items():
            path = name.rpartition(".")[0]
            if modules.get(path) is not owner:
                raise RuntimeError(
                    f"module {path!r} was replaced after the Regularizer was built, so {name} is no longer part of "
                    "the model; build a new Regularizer (and optimizer) for the model as it is now"
                )
        exchanged = fsdp_parameters(self._model)
        for binding in self._bindings:
            binding.selected._exchange = exchanged.get((id(binding.selected.owner), binding.selected.attribute))
        self._edges = _edges(self._model)

    def _check_ties(self) -> None:
        """Raises where tensors were tied, or came apart, since the names were resolved."""
        first: dict[int, str] = {}
        for binding in self._bindings:
            entry = binding.selected
            parameter = entry.owner._parameters.get(entry.attribute)
            if parameter is None:  # computed by a parametrization
                continue
            if first.setdefault(id(parameter), entry.name) != entry.name:
                raise RuntimeError(
                    f"{entry.name} was tied to {first[id(parameter)]} after the Regularizer was built, and would count "
                    "twice; build the Regularizer after tying"
                )
            for name, owner in entry.ties:
                if owner._parameters.get(name.rpartition(".")[2]) is not parameter:
                    raise RuntimeError(
                        f"{entry.name} is no longer tied to {name} (load_state_dict(assign=True) and to_empty untie); "
                        "tie them again, or build a new Regularizer"
                    )

    # ------------------------------------------------------------------ routes

    def _items(
        self, bindings: list[Binding], by_term: bool, given: Sequence[Tensor] | None = None
    ) -> Iterator[evaluation.Item]:
        """What counts now: the key of the term, or one for all, the parameter or what is given, and its penalty."""
        if not self._enabled:
            return
        held = {id_ for route in self._live_routes() for id_ in route.held()}
        compiling = torch.compiler.is_compiling()
        for i, binding in enumerate(bindings):
            parameter = binding.parameter()
            w = parameter if given is None else given[i]
            if id(parameter) in held:
                w = w.detach()
            if compiling:
                yield binding.term.key, w, binding.compiled_penalty(w)
            elif not binding.penalty.is_zero:
                yield binding.term.key if by_term else "", w, binding.penalty

    def _warn_of_constants(self, bindings: list[Binding]) -> None:
        """Warns where `torch.func` differentiates by other tensors than the model's: a constant penalty."""
        held = {id_ for route in self._live_routes() for id_ in route.held()}
        live = [parameter for binding in bindings if id(parameter := binding.parameter()) not in held]
        if self._enabled and live and all(torch._C._functorch.maybe_get_level(w) == -1 for w in live):
            warnings.warn(
                "reg() reads the model's own parameters, by which torch.func does not differentiate here: the penalty "
                "has no gradient. Pass those of functional_call: reg(parameters)",
                stacklevel=3,
            )

    def _live_routes(self) -> Iterator[Route]:
        """The attached optimizers. One that has died leaves its parameters to the loss route, said once."""
        for item in list(self._routes):
            route = item[0]()
            if route is not None and route.alive and route.active:
                yield route
                continue
            if not self._enabled:  # a refit with an optimizer of its own: nothing has changed for it
                continue
            self._routes.remove(item)
            if route is None or route.active:
                logger.warning("the %s is gone: reg() has the gradient of its parameters again", item[1])

    def _forget_dead(self) -> None:
        """Leaves the parameters of optimizers that have died to the loss route, unsaid: their end was expected."""
        routes = [(item, item[0]()) for item in self._routes]
        self._routes = [item for item, route in routes if route is not None and route.alive and route.active]

    def _attach(self, route: Route) -> None:
        self._routes.append((weakref.ref(route), route.describe()))

    def _detach(self, route: Route) -> None:
        self._routes = [item for item in self._routes if item[0]() is not route]


def _as_rules(
    penalty: Any, include: Selector | None, inventory: Inventory
) -> list[tuple[str, Parts | None, Penalty | None]]:
    """(key, resolved selector, penalty) of each rule; no selector means the default selection."""
    if isinstance(penalty, Penalty):
        return [(penalty.name, None if include is None else inventory.resolve(include), penalty)]
    if include is not None:
        raise ValueError("include goes with a single penalty; in rules each selector says what it includes")
    if isinstance(penalty, Mapping):
        pairs = list(penalty.items())
    elif isinstance(penalty, Sequence) and not isinstance(penalty, str):
        pairs = list(penalty)
    else:
        raise TypeError(
            f"{penalty!r} is no penalty and no rules; pass a penalty such as L1(1e-4), a dict from selector to "
            "penalty, or a list of (selector, penalty)"
        )
    rules: list[tuple[str, Parts | None, Penalty | None]] = []
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and (pair[1] is None or isinstance(pair[1], Penalty))):
            raise TypeError(f"rule {pair!r} is no pair (selector, penalty or None)")
        parts = inventory.resolve(pair[0])
        key = base = inventory.text(pair[0])
        repeats = 1
        while key in {rule[0] for rule in rules}:
            repeats += 1
            key = f"{base}#{repeats}"
        rules.append((key, parts, pair[1]))
    if all(rule[2] is None for rule in rules):
        raise ValueError("the rules hold no penalty; give at least one selector a penalty such as L1(1e-4)")
    return rules


def _canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict by their names, and by those less the wrappers' prefixes where these are free."""
    if not isinstance(state, Mapping):
        raise TypeError(f"toward is a {type(state).__name__}; pass a state dict: toward=model.state_dict()")
    exact, stripped = {}, {}
    for name, w in state.items():
        if isinstance(w, Tensor):
            parts = [part for part in name.split(".") if part not in WRAPPED]
            exact[".".join(parts)] = w
            while parts[:1] == ["module"]:
                parts = parts[1:]
            stripped[".".join(parts)] = w
    return stripped | exact


def _anchor(toward: Mapping[str, Tensor], selected: ParameterRef, parameter: Tensor) -> Tensor:
    """A copy of what `toward` has for a parameter: `state_dict()` aliases the live weights."""
    for name in selected.names:
        if name in toward:
            anchor = toward[name].detach().clone()
            if anchor.shape != parameter.shape:
                raise ValueError(
                    f"toward has {name} in shape {tuple(anchor.shape)}, the model in {tuple(parameter.shape)}; "
                    "exclude the parameter, or give the state dict of the same architecture"
                )
            return anchor
    raise ValueError(f"toward has no {selected.name}; exclude the parameter, or add it to the state dict")


def _given(parameters: Mapping[str, Tensor], bindings: list[Binding]) -> list[Tensor]:
    """The tensor that `parameters` has for each bound parameter."""
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"parameters is a {type(parameters).__name__}; pass tensors by name: reg(dict(model.named_parameters()))"
        )
    state, found = _canonical(parameters), []
    for binding in bindings:
        w = next((state[name] for name in binding.selected.names if name in state), None)
        shape = tuple(binding.parameter().shape)
        if w is None:
            raise ValueError(
                f"parameters has no {binding.name}, which is selected; give all that functional_call gets, or exclude "
                f"it"
            )
        if w.shape != shape:
            raise ValueError(
                f"parameters has {binding.name} in shape {tuple(w.shape)}, the model in {shape}; for a stack of models "
                "call the regularizer under torch.vmap"
            )
        found.append(w)
    return found


def _edges(model: nn.Module) -> list[tuple[dict[str, nn.Module | None], str, nn.Module | None, type]]:
    """Every parent-to-child link of the model: if none has changed, no module was replaced, nor sharded, its type."""
    root: dict[str, nn.Module | None] = {"": model}
    links = [(m._modules, key, child) for m in model.modules() for key, child in m._modules.items()]
    return [(modules, key, child, type(child)) for modules, key, child in [(root, "", model), *links]]


def _caveats(binding: Binding, norms: Mapping[int, str], by_prox: bool) -> Iterator[str]:
    """Where the penalty of a layer's weight does not do what it says."""
    penalty = binding.term.base
    if by_prox and not penalty.convex and not penalty.linearizes:
        yield "not convex: where weights rest depends on the step, with tr.Reweighted it does not"
    owner, parameter = binding.selected.owner, binding.parameter()
    # A sharded tensor would need every process to count, one without data has none.
    here = type(parameter) is nn.Parameter and not parameter.is_meta
    if here and (broken := parameter.numel() - int(parameter.isfinite().sum())):
        yield f"{broken} NaN or infinite"
    if (
        binding.anchor is not None or binding.selected.attribute != "weight"
    ):  # toward w₀ ≠ 0 a scale counts, and zeros move
        return
    if id(owner) in norms:
        yield f"norm layer {norms[id(owner)]} undoes its scale"
    elif by_prox and isinstance(owner, selection.LAYERS) and here:
        dead, neurons = connectivity.dead_under_relu(binding.selected)
        if dead:
            yield f"{dead} of {neurons} outputs dead under ReLU"


def _total(values: list[Tensor], first: Binding) -> Tensor:
    if not values:
        return torch.zeros((), device=first.parameter().device)
    if len(values) == 1:
        return values[0]
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    return torch.stack([value.to(values[0].device, dtype) for value in values]).sum()


def _outline(state: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{key}({', '.join(values)})" for key, values in state.items()) or "none"
