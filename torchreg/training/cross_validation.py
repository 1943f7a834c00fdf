"""Cross-validation: which λ to choose, from the scores of its path on data that were held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._tables import render_table
from torchreg.binding.regularizer import Regularizer
from torchreg.training.path_points import PathPoint, RegularizationPath, Score
from torchreg.training.paths import checked_grid, path
from torchreg.training.session import Fit, check_regularizer, put_back


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """The paths of all folds over one grid, and the λ to choose by them; `print` shows a table.

    Attributes:
        lambdas: the grid.
        paths: one a fold, without weights.
    """

    lambdas: tuple[float, ...]
    paths: tuple[RegularizationPath, ...]

    @property
    def scores(self) -> Tensor:
        """The score of each fold at each λ: (folds, points)."""
        return torch.tensor([[point.score for point in one] for one in self.paths], dtype=torch.float64, device="cpu")

    @property
    def mean(self) -> Tensor:
        """The mean score over the folds: (points,)."""
        return self.scores.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """The standard error of the mean: the deviation of the folds over √folds, (points,)."""
        return self.scores.std(0) / math.sqrt(len(self.paths))

    @property
    def best(self) -> float:
        """The λ with the highest mean score, of equal ones the largest.

        Raises:
            ValueError: at every λ a score is NaN.
        """
        return self.lambdas[self._best()]

    @property
    def one_standard_error(self) -> float:
        """The largest λ whose mean score is within one standard error of the best one's: about as good, and sparser.

        Raises:
            ValueError: at every λ a score is NaN.

        Source: Breiman, Friedman, Olshen and Stone, 1984, section 3.4.3.
        """
        best = self._best()
        least = self.mean[best] - self.standard_error[best]
        return max(value for value, score in zip(self.lambdas, self.mean.tolist(), strict=True) if score >= least)

    def _best(self) -> int:
        mean = [-math.inf if math.isnan(score) else score for score in self.mean.tolist()]
        if max(mean) == -math.inf:
            raise ValueError(
                "at no λ have all folds a score, so none is the best; look at .scores, and train with a smaller lr"
            )
        return max(range(len(mean)), key=lambda i: (mean[i], self.lambdas[i]))

    def __repr__(self) -> str:
        return f"CrossValidation({len(self.paths)} folds, {len(self.lambdas)} points)"

    def __str__(self) -> str:
        best, sparser = self._best(), self.lambdas.index(self.one_standard_error)
        rows = []
        for i, value in enumerate(self.lambdas):
            left = sum(one[i].left for one in self.paths) / len(self.paths)
            said = [text for text, at in (("best", best), ("one standard error", sparser)) if at == i]
            rows.append(
                [
                    f"{value:.4g}",
                    f"{self.mean[i].item():.4g}",
                    f"{self.standard_error[i].item():.3g}",
                    f"{left:,.1f}",
                    ", ".join(said),
                ]
            )
        return render_table(["λ", "mean score", "± 1 SE", "left", "chosen"], rows, right=range(4))


def cross_validate(
    regularizer: Regularizer, folds: Iterable[tuple[Fit, Score]], lambdas: Iterable[float]
) -> CrossValidation:
    """Walks one path for each fold, all over the same grid and from the same weights.

    Args:
        regularizer: the penalties, and through them the model; both are left as they were.
        folds: (fit, score) of each, as in `path`: `fit` trains on the rows of the fold, `score` is taken on those that
            it holds out. At least two.
        lambdas: the grid, as in `path`; `lambda_grid` of all the data, say.
    Returns:
        The paths, their mean scores and standard errors, and the chosen λ. To refit on all the data, walk to it:
        `path(reg, fit, lambdas=[cv.best])`, or for a network `[s for s in cv.lambdas if s <= cv.best]`, upward.
    Raises:
        TypeError, ValueError: as in `path`, or there are fewer than two folds.

    >>> x, y = torch.eye(4), torch.tensor([[3.0], [2.0], [2.5], [2.2]])
    >>> model = nn.Linear(4, 1, bias=False)
    >>> reg = Regularizer(model, L1(1.0))
    >>> def fold(target):
    ...     def fit(model, reg):  # the mean of the target, shrunk
    ...         with torch.no_grad():
    ...             model.weight.fill_(target)
    ...         reg.prox_(1.0)
    ...     return fit, lambda model: -float((model(x) - y).square().mean())
    >>> print(cross_validate(reg, [fold(2.5), fold(3.0)], lambdas=[1.0, 0.5, 0.25, 0.0]))
       λ  mean score  ± 1 SE  left  chosen
    ----  ----------  ------  ----  ------------------
       1       -0.66   0.338   4.0
     0.5      -0.235  0.0875   4.0  one standard error
    0.25       -0.21  0.0375   4.0  best
       0       -0.31   0.162   4.0
    """
    check_regularizer(regularizer)
    grid = checked_grid(lambdas)
    pairs = list(folds)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair))):
            raise TypeError(f"fold {pair!r} is not a pair of functions; give (fit, score) for each")
    if len(pairs) < 2:
        raise ValueError(
            f"{len(pairs)} folds give no standard error; give at least two, or for a single split "
            "path(reg, fit, lambdas=lambdas, score=score).best()"
        )
    return CrossValidation(grid, tuple(_walked(regularizer, fit, score, grid) for fit, score in pairs))


def _walked(regularizer: Regularizer, fit: Fit, score: Score, grid: Sequence[float]) -> RegularizationPath:
    with put_back(regularizer):
        return path(regularizer, fit, lambdas=grid, score=score, keep=_scores_alone)


def _scores_alone(walked: RegularizationPath) -> Iterable[PathPoint]:
    return ()
