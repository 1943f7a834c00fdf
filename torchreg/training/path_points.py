"""The table that a path gives: a point for each λ, with the weights and what they are worth; and when to stop."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from torchreg._checks import whole_number
from torchreg._tables import render_table
from torchreg.binding.regularizer import Regularizer
from torchreg.binding.selection import unwrapped

Score = Callable[[nn.Module], float]
"""What the model is worth, on data that it was not trained on: higher is better."""
Strengths = dict[str, dict[str, float]]
"""By term and name, as `Regularizer.state_dict()` has them."""


@dataclass(frozen=True, eq=False)
class PathPoint:
    """One λ of a path, and the model that was fitted there.

    Attributes:
        strength: λ.
        score: what `score(model)` gave; None without one.
        sparsity: the share of the selected weights that are exactly 0.
        left: how many of them are not.
        features: the inputs of the first selected weight that are alive; 0 of a vector, which has none.
        penalty: the value of all terms.
        loss: the data loss; None without a closure.
        strengths: what `reg.state_dict()` was.
        state: what `model.state_dict()` was, copied to the CPU; None where `keep` let it go.
    """

    strength: float
    score: float | None
    sparsity: float
    left: int
    features: int
    penalty: float
    loss: float | None
    strengths: Strengths
    state: dict[str, Any] | None

    @property
    def objective(self) -> float | None:
        """loss + penalty; None without a closure."""
        return None if self.loss is None else self.loss + self.penalty

    def load_into(self, regularizer: Regularizer) -> None:
        """Puts the model of `regularizer` and its strengths where they were at this point.

        Raises:
            ValueError: the weights were not kept, or `regularizer` has other terms. Nothing has changed then.
            RuntimeError: the model of `regularizer` is another one.
        """
        state = self._kept()
        regularizer.load_state_dict(self.strengths)
        regularizer.model.load_state_dict(state)

    def _kept(self) -> dict[str, Any]:
        if self.state is None:
            raise ValueError(
                f"the weights at λ={self.strength:g} were not kept; let keep= return this point, or fit there again: "
                f"path(reg, fit, lambdas=[{self.strength!r}])"
            )
        return self.state

    def __repr__(self) -> str:
        score = "" if self.score is None else f"score={self.score:.4g}, "
        return f"PathPoint(strength={self.strength:.4g}, {score}left={self.left}, features={self.features})"


class RegularizationPath(Sequence[PathPoint]):
    """The points of a path in the order in which they were walked; `print` shows a table.

    An empty one is filled by `path(..., into=it)` point by point. It pickles; for a checkpoint that
    `torch.load(weights_only=True)` reads there is `state_dict()`.

    Attributes:
        lambdas: the whole grid, walked or not.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> reg = Regularizer(model, L1(1.0))
    >>> walked = tr.path(reg, lambda model, reg: reg.prox_(1.0), lambdas=[0.1, 9.0])
    >>> torch.save(walked.state_dict(), "path.pt")
    >>> again = RegularizationPath()
    >>> again.load_state_dict(torch.load("path.pt", weights_only=True))
    >>> again[-1]
    PathPoint(strength=9, left=0, features=0)
    """

    def __init__(self) -> None:
        self.lambdas: tuple[float, ...] = ()
        self._points: list[PathPoint] = []
        self._names: list[str] = []  # of the selected weights
        self._proportions: Strengths = {}  # every strength over λ
        self._rng: dict[str, Tensor] = {}  # torch's generators after the last point

    @overload
    def __getitem__(self, index: int) -> PathPoint: ...
    @overload
    def __getitem__(self, index: slice) -> list[PathPoint]: ...
    def __getitem__(self, index: int | slice) -> PathPoint | list[PathPoint]:
        return self._points[index]

    def __len__(self) -> int:
        return len(self._points)

    def __repr__(self) -> str:
        return f"RegularizationPath({len(self)} of {len(self.lambdas)} points)"

    def __str__(self) -> str:
        columns: list[tuple[str, list[str]]] = [
            ("λ", [f"{point.strength:.4g}" for point in self]),
            ("score", ["" if point.score is None else f"{point.score:.4g}" for point in self]),
            ("zeros", [f"{point.sparsity:.2%}" for point in self]),
            ("left", [f"{point.left:,}" for point in self]),
            ("features", [f"{point.features:,}" for point in self]),
            ("penalty", [f"{point.penalty:.4g}" for point in self]),
            ("objective", ["" if point.objective is None else f"{point.objective:.4g}" for point in self]),
        ]
        shown = [(name, cells) for name, cells in columns if any(cells) or not cells]
        rows = [list(row) for row in zip(*(cells for _, cells in shown), strict=True)]
        return render_table([name for name, _ in shown], rows, right=range(len(shown)))

    def best(self) -> PathPoint:
        """The point with the highest score, of equal ones that with the largest λ.

        Raises:
            ValueError: no point has a score.
        """
        scored = [(point.score, point.strength, point) for point in self if point.score is not None]
        scored = [row for row in scored if not math.isnan(row[0])]
        if not scored:
            raise ValueError(f"no point of {self!r} has a score; give path() one: score=lambda model: accuracy(model)")
        return max(scored, key=lambda row: row[:2])[2]

    def weights(self, name: str | None = None) -> Tensor:
        """The weights of one parameter at every point.

        Args:
            name: which selected parameter; the first by default.
        Shape:
            (points, entries), on the CPU.
        Raises:
            ValueError: there is no such parameter, or weights were not kept.
        """
        chosen = next(iter(self._names), "") if name is None else name
        rows = []
        for point in self:
            state = {unwrapped(key): value for key, value in point._kept().items()}
            if chosen not in state:
                raise ValueError(f"{chosen!r} is not in the states of this path; they have {list(state)}")
            rows.append(state[chosen].flatten())
        if not rows:
            raise ValueError("the path has no points yet; walk it with path(reg, fit, closure, into=it)")
        return torch.stack(rows)

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain numbers and tensors, for `torch.load(weights_only=True)`."""
        return {
            "lambdas": list(self.lambdas),
            "points": [{field.name: getattr(p, field.name) for field in dataclasses.fields(p)} for p in self],
            "names": list(self._names),
            "proportions": copy.deepcopy(self._proportions),
            "rng": dict(self._rng),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict()` gave.

        Raises:
            ValueError: it is not a state of a path; nothing has changed.
        """
        try:
            points = [PathPoint(**point) for point in state["points"]]
            lambdas, names, proportions, rng = (state[key] for key in ("lambdas", "names", "proportions", "rng"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a state of a path ({error}); load what path.state_dict() gave") from error
        self.lambdas, self._points, self._names = tuple(lambdas), points, list(names)
        self._proportions, self._rng = proportions, rng


Stop = Callable[[RegularizationPath], object]
Keep = Callable[[RegularizationPath], Iterable[PathPoint]]


@dataclass(frozen=True)
class Patience:
    """Ends a path once `points` points in a row have not improved on the best score before them.

    Args:
        points: how many, at least 1.
    Raises:
        TypeError, ValueError: `points` is no integer ≥ 1; when called, ValueError if the path has no scores.

    >>> scores = iter([0.1, 0.4, 0.3, 0.4, 0.2])
    >>> reg = Regularizer(nn.Linear(2, 1), L1(1.0))
    >>> len(tr.path(reg, lambda *_: None, lambdas=range(5), score=lambda _: next(scores), stop=tr.Patience(2)))
    4
    """

    points: int

    def __post_init__(self) -> None:
        whole_number("points", self.points)

    def __call__(self, walked: RegularizationPath) -> bool:
        """Whether the score has stood still for so long."""
        if walked[-1].score is None:
            raise ValueError("patience needs a score; give path() one: score=lambda model: accuracy(model)")
        scores = [-math.inf if p.score is None or math.isnan(p.score) else p.score for p in walked]
        return len(scores) - 1 - scores.index(max(scores)) >= self.points
