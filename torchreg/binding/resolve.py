"""Rules resolved against a model: which parameter has which penalty, kept true while the model changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchreg._checks import nonnegative
from torchreg._distributed import fsdp_parameters
from torchreg.binding.bindings import Binding, Term
from torchreg.binding.selection import (
    WRAPPED,
    Inventory,
    ParameterRef,
    Parts,
    Selector,
    named_modules,
)
from torchreg.penalties import Penalty

Rules = Mapping[Selector, Penalty | None] | Sequence[tuple[Selector, Penalty | None]]
Scale = Callable[[str, Tensor], float]
Edge = tuple[dict[str, nn.Module | None], str, nn.Module | None, type]


@dataclasses.dataclass
class Plan:
    """The rules by name: they are carried out at once, and again when lazy modules have got their shapes."""

    rules: list[tuple[str, Parts | None, Penalty | None]]  # no parts: the default selection
    excluded: dict[str, str]  # name: by what
    scale: Scale | None
    toward: dict[str, Tensor] | None


class Resolution:
    """The bindings of a model's parameters, decided once by name and checked against the model at each use.

    Attributes:
        terms: the terms by key, in the order of the rules.
        bindings: one for each selected parameter, in the model's order.
        why_not: by name, why each other parameter is left out.
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: Penalty | Rules,
        include: Selector | None,
        exclude: Selector | None,
        scale: Scale | None,
        toward: Mapping[str, Tensor] | None,
    ) -> None:
        inventory = Inventory(model)
        rules = _as_rules(penalty, include, inventory)
        excluded = [] if exclude is None else inventory.resolve(exclude)
        reason = "" if exclude is None else f"excluded by {inventory.text(exclude)}"
        self.model = model
        self.terms = {key: Term(key, rule) for key, _, rule in rules if rule is not None}
        self.bindings: list[Binding] = []
        self.why_not: dict[str, str] = {}
        self._edges: list[Edge] | None = None
        self._plan: Plan | None = Plan(
            rules,
            {name: reason for names, _ in excluded for name in names},
            scale,
            None if toward is None else canonical(toward),
        )
        self._bind(inventory)

    def current(self) -> list[Binding]:
        """The bindings, after a check that their parameters are still those of the model.

        Raises:
            RuntimeError: a module was replaced, or tensors were tied or came apart.
        """
        if self._plan is not None and not any(is_lazy(p) for p in self.model.parameters()):
            self._bind(Inventory(self.model))
        if self._edges is None:
            self._edges = _edges(self.model, self.bindings)
        if any(map(_has_changed, self._edges)):
            self._follow()
        self._check_ties()
        return self.bindings

    def is_of(self, pairs: Sequence[tuple[Tensor, Binding]]) -> bool:
        """No module was replaced, and the bindings are still of these parameters: a quick check for a training step."""
        return (
            self._plan is None
            and self._edges is not None
            and not any(map(_has_changed, self._edges))
            and all(binding.is_bound_to(w) for w, binding in pairs)
        )

    def check_materialized(self) -> None:
        """Raises where a lazy module has not got its shape yet."""
        for binding in self.bindings if self._plan is not None else []:
            if is_lazy(binding.parameter()):
                raise RuntimeError(
                    f"{binding.name} is not materialized yet; run one forward pass through the model first"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_edges": None}  # a copy looks at its own model

    def _bind(self, inventory: Inventory) -> None:
        """Carries out the plan: decides the term, scale and anchor of every parameter."""
        assert self._plan is not None
        plan, why_not = self._plan, inventory.why_not | self._plan.excluded
        before = {binding.name: binding for binding in self.bindings}
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
                    # What is bound already stays, with its carrier.
                    bindings[entry.name] = before.get(entry.name) or Binding(entry, self.terms[key])
        if not bindings:
            raise ValueError("the rules and exclude leave no parameter to regularize; widen the selection")
        for entry in inventory.entries:
            if entry.name not in taken and not why_not[entry.name]:
                why_not[entry.name] = "no rule matches"
        for name, binding in bindings.items():
            parameter = binding.parameter()
            if not (binding.ready or is_lazy(parameter)):
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
        self.bindings = [bindings[entry.name] for entry in inventory.entries if entry.name in bindings]
        self.why_not = why_not
        self._edges = _edges(self.model, self.bindings)
        if not any(is_lazy(entry.parameter) for entry in inventory.entries):
            self._plan = None
        elif plan.toward is not None:
            plan.toward = {name: w.detach().clone() for name, w in plan.toward.items()}

    def _follow(self) -> None:
        """A module was replaced, or became another type: goes on if it was only wrapped or sharded, else refuses."""
        before = {binding.name: binding.selected.owner for binding in self.bindings}
        modules = dict(named_modules(self.model))
        for name, owner in before.items():
            path = name.rpartition(".")[0]
            if modules.get(path) is not owner:
                raise RuntimeError(
                    f"module {path!r} was replaced after the Regularizer was built, so {name} is no longer part of "
                    "the model; build a new Regularizer (and optimizer) for the model as it is now"
                )
        exchanged = fsdp_parameters(self.model)
        for binding in self.bindings:
            binding.selected._exchange = exchanged.get((id(binding.selected.owner), binding.selected.attribute))
        self._edges = None

    def _check_ties(self) -> None:
        """Raises where tensors were tied, or came apart, since the names were resolved."""
        first: dict[int, str] = {}
        for binding in self.bindings:
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
            f"expected a penalty or rules, got {penalty!r}; pass a penalty such as L1(1e-4), a dict from selector to "
            "penalty, or a list of (selector, penalty)"
        )
    rules: list[tuple[str, Parts | None, Penalty | None]] = []
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and (pair[1] is None or isinstance(pair[1], Penalty))):
            raise TypeError(f"rule {pair!r} is not a pair (selector, penalty or None)")
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


def canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def given_tensors(parameters: Mapping[str, Tensor], bindings: list[Binding]) -> list[Tensor]:
    """The tensor that `parameters` has for each bound parameter."""
    if not isinstance(parameters, Mapping):
        raise TypeError(
            f"parameters is a {type(parameters).__name__}; pass tensors by name: reg(dict(model.named_parameters()))"
        )
    state, given = canonical(parameters), []
    for binding in bindings:
        w = next((state[name] for name in binding.selected.names if name in state), None)
        shape = tuple(binding.parameter().shape)
        if w is None:
            raise ValueError(
                f"parameters has no {binding.name}, which is selected; give all that functional_call gets, or "
                "exclude it"
            )
        if w.shape != shape:
            raise ValueError(
                f"parameters has {binding.name} in shape {tuple(w.shape)}, the model in {shape}; for a stack of models "
                "call the regularizer under torch.vmap"
            )
        given.append(w)
    return given


def _has_changed(edge: Edge) -> bool:
    modules, key, child, kind = edge
    return modules.get(key) is not child or type(child) is not kind


def _edges(model: nn.Module, bindings: list[Binding]) -> list[Edge]:
    """The links from parent to child on the way to the parameters: where none has changed, no module was replaced."""
    owners = {id(owner) for binding in bindings for _, owner in binding.selected.places}
    root: dict[str, nn.Module | None] = {"": model}
    edges: list[Edge] = [(root, "", model, type(model))]
    leads: dict[int, bool] = {}  # by id, whether a module has such a parameter somewhere inside

    def visit(module: nn.Module) -> bool:
        if id(module) not in leads:
            leads[id(module)] = id(module) in owners
            for key, child in module._modules.items():
                if child is not None and visit(child):
                    leads[id(module)] = True
                    edges.append((module._modules, key, child, type(child)))
        return leads[id(module)]

    visit(model)
    return edges
