"""A term is a penalty with strengths that move; a binding is a parameter that it applies to."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from torchreg._checks import nonnegative
from torchreg._distributed import is_laid_out_as, laid_out_as
from torchreg._tensors import widened
from torchreg.binding.selection import ParameterRef
from torchreg.penalties import Penalty
from torchreg.penalties.toward import Toward


class Term:
    """One rule of a regularizer: its penalty, with the strengths as numbers that may be changed at any time.

    A change takes effect at the next call or step. `strength` (or `l1` and `l2`, whatever the penalty calls
    them) is the base λ; `factor` multiplies it, and is what a schedule moves.

    >>> reg = Regularizer(nn.Linear(3, 2), L1(1e-4))
    >>> reg["l1"].strength = 5e-4
    >>> reg["l1"].factor = 0.5
    >>> reg["l1"].penalty
    L1(strength=0.00025)
    """

    key: str
    factor: float
    mirror: Tensor

    def __init__(self, key: str, penalty: Penalty, factor: float = 1.0) -> None:
        self.__dict__.update(key=key, factor=factor, version=0, base=penalty)
        self._mirror()

    @property
    def penalty(self) -> Penalty:
        """The penalty in force: every strength times the factor."""
        return self.base.scaled(self.factor)

    @property
    def strengths(self) -> dict[str, float]:
        """The base strengths, by name."""
        return {name: getattr(self.base, name) for name in self.base.strengths}

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.base.strengths]

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base")
        if base is not None and name in base.strengths:
            return getattr(base, name)
        raise AttributeError(f"term {self.__dict__.get('key')!r} has no {name!r}{self._choices()}")

    def __setattr__(self, name: str, value: float) -> None:
        if name != "factor" and name not in self.base.strengths:
            raise AttributeError(f"term {self.key!r} has no {name!r} to set{self._choices()}")
        number = nonnegative(name, value, f"set reg[{self.key!r}].{name} to a number such as 1e-4")
        if name == "factor":
            self.__dict__["factor"] = number
        else:
            self.__dict__["base"] = self.base.with_strengths(**{name: number})
        self.__dict__["version"] += 1
        self._mirror()

    def _mirror(self) -> None:
        """Keeps the strengths in force as a tensor too: an input of compiled graphs, which need not recompile."""
        numbers = [strength * self.factor for strength in self.strengths.values()]
        with torch.inference_mode(False):
            self.__dict__["mirror"] = torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def __reduce__(self) -> tuple[Any, ...]:
        return Term, (self.key, self.base, self.factor)  # without the mirror, which shared memory would move

    def __repr__(self) -> str:
        return f"Term({self.key!r}, {self.base!r}, factor={self.factor!r})"

    def _choices(self) -> str:
        base = self.__dict__.get("base")
        return f"; it has {', '.join((*base.strengths, 'factor'))}" if base is not None else ""


class Carrier(Protocol):
    """Applies the prox of a parameter, in place of the loss: an optimizer's `torchreg.optim.Attachment`."""

    @property
    def is_hooked(self) -> bool:
        """Its optimizer does not copy it along: a copy of the regularizer has to."""

    def describe(self) -> str:
        """Its name in `explain()`."""

    def refresh(self) -> None:
        """Looks for parameters that its optimizer was given since."""

    def look(self) -> None:
        """Warns where the parameters train without a step of its optimizer."""

    def remove(self) -> None:
        """Gives the parameters back to the loss."""


@dataclasses.dataclass(eq=False)
class Binding:
    """One selected parameter with the penalty that applies to it, and with what carries that penalty.

    Attributes:
        selected: the parameter's name and place in the model.
        term: the rule that selects it.
        scale: its own factor of the strengths.
        anchor: w₀ where the penalty is of w − w₀; None for 0.
        carrier: the attachment whose optimizer applies the prox; None where the penalty acts through the loss.
        note: what `explain()` adds.
        ready: scale and anchor are decided, as the parameter's shape is known.
    """

    selected: ParameterRef
    term: Term
    scale: float = 1.0
    anchor: Tensor | None = None
    carrier: Carrier | None = None
    note: str = ""
    ready: bool = False
    _cached: tuple[int, Penalty] | None = dataclasses.field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        # A swap-in brings its attachment along where it is copied too; hooks of a stock optimizer are not copied.
        carrier = self.carrier if self.carrier is not None and self.carrier.is_hooked else None
        return {**self.__dict__, "carrier": carrier, "_cached": None}

    @property
    def name(self) -> str:
        """The parameter's name, without the prefixes of wrappers."""
        return self.selected.name

    @property
    def penalty(self) -> Penalty:
        """The pure penalty of this parameter, with factor, scale and anchor in it."""
        if self._cached is None or self._cached[0] != self.term.version:
            penalty = self.term.penalty.scaled(self.scale)
            self._cached = (
                self.term.version,
                penalty if self.anchor is None else Toward(penalty, self.anchor),
            )
        return self._cached[1]

    def compiled_penalty(self, w: Tensor) -> Penalty:
        """`penalty` for a graph of `w` that stays the same when strengths change."""
        numbers = (self.term.mirror * self.scale).to(widened(w).real.dtype)
        penalty = self.term.base.with_strengths(**dict(zip(self.term.base.strengths, numbers.unbind(), strict=True)))
        return penalty if self.anchor is None else Toward(penalty, self.anchor)

    def is_bound_to(self, parameter: Tensor) -> bool:
        """Its parameter is this one, at every place where it is tied: a quick check for each training step."""
        selected = self.selected
        known = selected.owner._parameters.get(selected.attribute)
        return (known is parameter or self.parameter() is parameter) and not (
            selected.ties
            and any(owner._parameters.get(name.rpartition(".")[2]) is not known for name, owner in selected.ties)
        )

    def parameter(self) -> Tensor:
        """The parameter as it is now, with the anchor on its device, and divided among processes as it is."""
        parameter = self.selected.parameter
        if self.anchor is not None and not parameter.is_meta and not is_laid_out_as(self.anchor, parameter):
            self.anchor, self._cached = laid_out_as(self.anchor, parameter), None
        return parameter
