"""Selection of parameters: selectors in, named parameters out, each tensor once and always current."""

from __future__ import annotations

import difflib
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from torchreg._distributed import at_rest, fsdp_parameters
from torchreg._tables import printable

Predicate = Callable[[str, nn.Module, nn.Parameter], bool]
Selector: TypeAlias = (
    "str | type[nn.Module] | tuple[type[nn.Module], str] | nn.Module | nn.Parameter | Predicate | Sequence[Selector]"
)
"""What names parameters: a glob over the whole dotted name (`"fc*.weight"`), `"re:..."`, a module type,
`(type, "weight")`, a module, a parameter, a predicate `(name, module, parameter) -> bool`, or a list of these."""

_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # every BatchNorm, InstanceNorm and SyncBatchNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
# Where such a module stands between a layer and a norm layer, a scaled input still gives a scaled output.
_SCALES_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.LeakyReLU, nn.Flatten)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_EMBEDDED = re.compile(r"(^|_)(embed\w*|token)$")  # pos_embedding, cls_token: embeddings without a module of their own
_BIAS = re.compile(r"(^|_)bias(_|\d|$)")
# Attributes under which wrappers keep the model that they wrap: no part of a parameter's name.
WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


@dataclass
class ParameterRef:
    """One parameter of a model: its canonical name, and where it is read from.

    It is read through its module at every use, so it stays true when `load_state_dict(assign=True)`,
    `to_empty` or a parametrization replaces the parameter.

    Attributes:
        name: the dotted name without wrappers (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`).
        owner: the module that holds it.
        attribute: its name in that module.
        ties: the other places of the same tensor, where it is tied: (name, owner).
    """

    name: str
    owner: nn.Module
    attribute: str
    ties: list[tuple[str, nn.Module]] = field(default_factory=list)
    _exchange: Any = None  # what `fully_shard` keeps of it: it is that shard during forward and backward too

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now; the tensor that a parametrization computes, where one was registered since."""
        parameter = self.owner._parameters.get(self.attribute)
        if parameter is not None:
            return parameter if self._exchange is None else at_rest(parameter, self._exchange)
        tensor = getattr(self.owner, self.attribute, None)
        if not isinstance(tensor, Tensor):
            raise RuntimeError(
                f"{self.name} is no longer a tensor of its {type(self.owner).__name__}; "
                "build the Regularizer again, now that the model has changed"
            )
        return tensor

    @property
    def computed(self) -> bool:
        """A parametrization that was registered since computes it, so it is not a parameter any more."""
        return self.owner._parameters.get(self.attribute) is None

    @property
    def places(self) -> list[tuple[str, nn.Module]]:
        """(name, owner) of every place of the tensor."""
        return [(self.name, self.owner), *self.ties]

    @property
    def names(self) -> list[str]:
        """Every name of the tensor."""
        return [name for name, _ in self.places]


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(canonical name, module) of every module, under every name that it has."""
    yield prefix, model
    for key, child in model._modules.items():
        if child is not None:
            wraps = key in WRAPPED or (key == "module" and isinstance(model, _WRAPPERS))
            yield from named_modules(child, prefix if wraps else join(prefix, key))


def named_parameters(model: nn.Module) -> list[ParameterRef]:
    """Every parameter of `model` once, in the model's order, with all the places it has."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected the model, an nn.Module, got {type(model).__name__}; for a tensor call the penalty: L1(1e-4)(w)"
        )
    seen: dict[int, ParameterRef] = {}
    exchanged = fsdp_parameters(model)
    for prefix, module in named_modules(model):
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = join(prefix, attribute)
            if id(parameter) not in seen:
                held = exchanged.get((id(module), attribute))
                seen[id(parameter)] = ParameterRef(name, module, attribute, _exchange=held)
            elif name not in seen[id(parameter)].names:
                seen[id(parameter)].ties.append((name, module))
    return list(seen.values())


def unwrapped(name: str) -> str:
    """A name of a state dict without the attributes under which wrappers keep the model.

    >>> unwrapped("_orig_mod.encoder._fsdp_wrapped_module.weight")
    'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def why_not_by_default(entry: ParameterRef) -> str:
    """The reason why `entry` is left out unless it is named, or "" if it is selected by default."""
    kind = kind_of(entry)
    return "frozen" if kind != "integer type" and not entry.parameter.requires_grad else kind


def kind_of(entry: ParameterRef) -> str:
    """The kind of a parameter that is not a weight: "embedding", "norm layer", "bias" and so on; "" for a weight."""
    kind = kind_by_name(entry.attribute, entry.parameter)
    owners = [owner for _, owner in entry.places]
    if kind == "integer type":
        return kind
    if any(isinstance(owner, _EMBEDDINGS) for owner in owners):
        return "embedding"
    if any(isinstance(owner, _NORMS) for owner in owners):
        return "norm layer"
    return kind


def kind_by_name(attribute: str, tensor: Tensor) -> str:
    """`kind_of` as far as a tensor and the name of its attribute tell, without the module that holds it.

    >>> kind_by_name("pos_embedding", torch.zeros(1, 9, 4)), kind_by_name("weight", torch.zeros(3, 4))
    ('embedding', '')
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return "integer type"
    if _EMBEDDED.search(attribute):
        return "embedding"
    if _BIAS.search(attribute):
        return "bias"
    if not is_lazy(tensor) and tensor.dim() < 2:
        return "fewer than two dimensions"
    return ""


def norms_behind(model: nn.Module) -> dict[int, str]:
    """By `id`, the linear layers and convolutions whose output goes straight into a norm layer, and its name.

    In an `nn.Sequential` it is the next module, past dropout, ReLU and the like. Other modules do not tell in what
    order they call their children, so there it is only a batch or instance norm of the same width, registered right
    behind: `conv1, bn1`.
    """
    found = {}
    for path, parent in named_modules(model):
        children = [(key, child) for key, child in parent._modules.items() if child is not None]
        in_order = isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward
        if in_order:
            children = [(key, child) for key, child in children if not isinstance(child, _SCALES_THROUGH)]
        before: nn.Module | None = None
        for (_, layer), (key, norm) in itertools.pairwise(children):
            if isinstance(layer, LAYERS) and isinstance(norm, _NORMS):
                width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
                # After fc1, fc2, bn1 it is anyone's guess whose output bn1 reads.
                alone = getattr(norm, "num_features", None) == width and not isinstance(before, LAYERS)
                if in_order or alone:
                    found[id(layer)] = join(path, key)
            before = layer
    return found


Parts = list[tuple[frozenset[str], bool]]
"""A selector resolved to names, one part for each of a list: the names that match, and whether it is exact."""


class Inventory:
    """A model's parameters, each with the reason why it is left out by default: what selectors are matched against."""

    def __init__(self, model: nn.Module) -> None:
        self.entries = named_parameters(model)
        self.why_not = {entry.name: why_not_by_default(entry) for entry in self.entries}
        self.kind = type(model).__name__
        self._paths: dict[int, str] = {}
        for path, module in named_modules(model):
            self._paths.setdefault(id(module), path)

    def default(self) -> list[ParameterRef]:
        """Every parameter that nothing speaks against."""
        chosen = [entry for entry in self.entries if not self.why_not[entry.name]]
        if not chosen:
            reasons = ", ".join(sorted(set(self.why_not.values()))) or "it has no parameters"
            raise ValueError(
                f"{self.kind} has no parameter that is selected by default ({reasons}); name one: include=..."
            )
        return chosen

    def resolve(self, selector: Any) -> Parts:
        """The names that `selector` matches: they hold for a lazy module that changes its type too."""
        if _is_list(selector):
            parts = [part for inner in selector for part in self.resolve(inner)]
            if not parts:
                raise ValueError(
                    "an empty list selects nothing; name at least one parameter, or leave the argument out"
                )
            return parts
        exact, test = self._test(selector)
        names = frozenset(entry.name for entry in self.entries if test(entry))
        if not names:
            raise ValueError(self._no_match(selector))
        return [(names, exact)]

    def choose(self, parts: Parts) -> list[ParameterRef]:
        """The parameters that resolved selectors mean, in the model's order.

        A part that is not exact and matches both default-selected parameters and others takes only the former; one
        that matches only others takes them. An exact one takes all it matches.
        """
        chosen: set[str] = set()
        for names, exact in parts:
            integers = sorted(name for name in names if self.why_not[name] == "integer type")
            if integers and (exact or len(integers) == len(names)):
                dtype = next(entry.parameter.dtype for entry in self.entries if entry.name == integers[0])
                raise TypeError(
                    f"{integers[0]} has the integer type {dtype}, which has no gradient; leave it out of the selection"
                )
            default = {name for name in names if not self.why_not[name]}
            chosen |= names if exact or not default else default
            chosen -= set(integers)
        return [entry for entry in self.entries if entry.name in chosen]

    def text(self, selector: Any) -> str:
        """The text of a selector in a term's key and in messages: modules and parameters have their names."""
        if _is_list(selector):
            return "|".join(map(self.text, selector))
        if isinstance(selector, nn.Module):
            return self._paths.get(id(selector)) or type(selector).__name__
        if isinstance(selector, Tensor):
            return next((entry.name for entry in self.entries if entry.parameter is selector), "a tensor")
        return selector_text(selector)

    def _test(self, selector: Any) -> tuple[bool, Callable[[ParameterRef], bool]]:
        """Whether a selector (no list) is exact, and the test that it puts to each parameter."""
        if isinstance(selector, str):
            if selector.startswith("re:"):
                try:
                    pattern = re.compile(selector[3:])
                except re.error as error:
                    raise ValueError(f'"{selector}" is not a regular expression: {error}') from error
                return False, lambda entry: any(pattern.fullmatch(name) for name in entry.names)
            if any(selector in entry.names for entry in self.entries):
                return True, lambda entry: selector in entry.names
            return False, lambda entry: any(fnmatchcase(name, selector) for name in entry.names)
        if isinstance(selector, nn.Parameter):
            if all(entry.parameter is not selector for entry in self.entries):
                raise ValueError(
                    f"the parameter of shape {tuple(selector.shape)} is not a parameter of {self.kind}; pass one that "
                    "is, or its name"
                )
            return True, lambda entry: entry.parameter is selector
        if isinstance(selector, nn.Module):
            if id(selector) not in self._paths:
                raise ValueError(
                    f"the {type(selector).__name__} is not a module of {self.kind}; pass one that is, or a glob"
                )
            inside = {id(parameter) for parameter in selector.parameters()}
            return False, lambda entry: id(entry.parameter) in inside
        if isinstance(selector, type) and issubclass(selector, nn.Module):
            return False, lambda entry: any(isinstance(owner, selector) for _, owner in entry.places)
        if _is_typed(selector):
            kind, attribute = selector
            return True, lambda entry: any(
                isinstance(owner, kind) and name.rpartition(".")[2] == attribute for name, owner in entry.places
            )
        if callable(selector) and not isinstance(selector, type):
            return True, lambda entry: bool(selector(entry.name, entry.owner, entry.parameter))
        raise TypeError(
            f"{selector!r} selects nothing: a selector is a name or glob, 're:...', a module type, (type, 'weight'), "
            "a module, a parameter, a predicate (name, module, parameter) -> bool, or a list of these"
        )

    def _no_match(self, selector: Any) -> str:
        text = self.text(selector)
        if not isinstance(selector, str):
            return f"{text} matches no parameter of {self.kind}; print(model) shows its modules"
        names = [name for entry in self.entries for name in entry.names]
        near = difflib.get_close_matches(selector.removeprefix("re:"), names, n=3, cutoff=0.5) or names[:3]
        hint = (
            "; did you mean " + " or ".join(f'"{printable(name)}"' for name in near) + "?"
            if near
            else ", which has none"
        )
        return f'pattern "{printable(text)}" matches no parameter of {self.kind}{hint}'


def select(model: nn.Module, include: Selector | None = None, exclude: Selector | None = None) -> list[ParameterRef]:
    """The parameters of `model` that `include` names, less those that `exclude` names.

    By default every parameter that requires a gradient, is floating or complex, has two or more dimensions and
    belongs to no norm layer and no embedding. A tied tensor counts once and matches by any of its names.

    Args:
        model: any module; wrappers (DDP, FSDP, `torch.compile`, averaged models) leave no trace in the names.
        include: a glob over the whole dotted name, `"re:..."` (which must match the whole name), a module type,
            `(type, "weight")`, a module, a parameter, a predicate `(name, module, parameter) -> bool`, or a list of
            these. A glob, expression, type or module that matches both kinds takes only what is selected by
            default; exact names, types with a name, parameters and predicates always count.
        exclude: the same, for what to leave out; here everything that matches counts.
    Returns:
        One `ParameterRef` a parameter, in the model's order.
    Raises:
        TypeError: `model` is not a module, a selector is of no known kind, or it names a parameter of an integer type.
        ValueError: a selector matches nothing (with the nearest names), or nothing is left.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    >>> [entry.name for entry in select(net)]
    ['0.weight', '2.weight']
    >>> [entry.name for entry in select(net, "*.bias")]
    ['0.bias', '1.bias', '2.bias']
    >>> select(net, "first.*")
    Traceback (most recent call last):
    ...
    ValueError: pattern "first.*" matches no parameter of Sequential; did you mean "0.weight" or "0.bias" or "1.weight"?
    """
    inventory = Inventory(model)
    chosen = inventory.default() if include is None else inventory.choose(inventory.resolve(include))
    if exclude is not None:
        left_out = {name for names, _ in inventory.resolve(exclude) for name in names}
        chosen = [entry for entry in chosen if entry.name not in left_out]
        if not chosen:
            raise ValueError(f"exclude={inventory.text(exclude)} leaves nothing of the selection; narrow it")
    warn_about(chosen)
    return chosen


def warn_about(chosen: list[ParameterRef]) -> None:
    """Warns of selections that are allowed and seldom meant."""
    if not any(entry.parameter.requires_grad for entry in chosen):
        warnings.warn(
            f"every selected parameter is frozen ({chosen[0].name}, ...): the penalty has no gradient to act by",
            stacklevel=3,
        )
    inputs = [entry.name for entry in chosen if isinstance(entry.owner, ParametrizationList) or _weight_normed(entry)]
    if inputs:
        warnings.warn(
            f"{inputs[0]} is the input of a parametrization: penalizing it is not penalizing the weight that it makes. "
            "Remove the parametrization, or exclude the parameter",
            stacklevel=3,
        )


def selector_text(selector: Any) -> str:
    """The text of a selector that needs no model to be named.

    >>> selector_text("fc*.weight"), selector_text((nn.Linear, "weight")), selector_text(nn.Linear)
    ('fc*.weight', 'Linear.weight', 'Linear')
    """
    if isinstance(selector, str):
        return selector
    if _is_typed(selector):
        return f"{selector[0].__name__}.{selector[1]}"
    return str(getattr(selector, "__name__", repr(selector)))


def _is_list(selector: object) -> TypeGuard[Collection[Any]]:
    return isinstance(selector, (list, set, frozenset)) or (isinstance(selector, tuple) and not _is_typed(selector))


def _is_typed(selector: object) -> TypeGuard[tuple[type[nn.Module], str]]:
    """(type, "weight"): a pair of a module type and an attribute, and no list of two selectors."""
    return (
        isinstance(selector, tuple)
        and len(selector) == 2
        and isinstance(selector[0], type)
        and isinstance(selector[1], str)
    )


def _weight_normed(entry: ParameterRef) -> bool:
    return entry.attribute.endswith(("_g", "_v")) and hasattr(entry.owner, entry.attribute[:-2])
