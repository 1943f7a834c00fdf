"""A small convex problem with a known answer: the diabetes data, on which scikit-learn is the judge."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor


@functools.cache
def diabetes() -> tuple[Tensor, Tensor]:
    """442 rows of 10 standardized features, and a centred target: float64, and no intercept is needed."""
    x, y = load_diabetes(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    return torch.from_numpy(x), torch.from_numpy(y - y.mean())
