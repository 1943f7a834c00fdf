"""Choosing λ: the lasso path of the diabetes data, cross-validated, beside scikit-learn's.

    python examples/path.py

1. A path from λ_max down, each λ from the weights of the last, and the coefficients of scikit-learn's `lasso_path`.
2. λ by cross-validation, at the best mean score and by the one-standard-error rule, beside `LassoCV`.
3. Both refitted on all the training rows, with the error on rows that nothing has seen; and a plot of the path.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LassoCV, lasso_path
from sklearn.model_selection import KFold
from torch import nn

import torchreg as tr

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--points", type=int, default=15, help="λ in the grid")
parser.add_argument("--ratio", type=float, default=0.01, help="the smallest λ over the largest")
parser.add_argument("--folds", type=int, default=5)
parser.add_argument("--tol", type=float, default=1e-7, help="relative distance from stationarity at which a fit stops")
parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the folds")
parser.add_argument("--plot", default="path.png", help="file of the plot")
args = parser.parse_args()
torch.set_num_threads(1)

# ------------------------------------------------------------------ data: few rows, so that λ matters

data = load_diabetes()
order = np.random.default_rng(args.seed).permutation(len(data.target))
train, test = order[:150], order[150:]
X = (data.data - data.data[train].mean(0)) / data.data[train].std(0)
inputs, targets = torch.from_numpy(X), torch.from_numpy(data.target)[:, None]

torch.manual_seed(args.seed)
model = nn.Linear(10, 1, dtype=torch.float64)
reg = tr.Regularizer(model, tr.L1(1.0))  # 1.0 is any number: the path moves it


def loss(rows):
    return 0.5 * nn.functional.mse_loss(model(inputs[rows]), targets[rows])  # scikit-learn's ½ too: λ is its alpha


def fit_on(rows):
    """Any training function does; this one solves the convex problem, on these rows."""

    def fit(model, reg):
        optimizer = tr.optim.FISTA(model.parameters(), regularizer=reg, tol=args.tol)

        def closure():
            value = loss(rows)
            value.backward()
            return value

        for _ in range(5000):
            optimizer.step(closure)
            if optimizer.converged:
                return
        raise RuntimeError("not converged; give it a larger --tol")

    return fit


def score_on(rows):
    return lambda model: -nn.functional.mse_loss(model(inputs[rows]), targets[rows]).item()  # higher is better


# ------------------------------------------------------------------ 1. the path

grid = tr.lambda_grid(reg, fit_on(train), lambda: loss(train), n=args.points, ratio=args.ratio)
path = tr.path(reg, fit_on(train), lambda: loss(train), lambdas=grid, score=score_on(test))
print(f"1. The lasso path on {len(train)} rows; the score is −MSE on the other {len(test)}\n")
print(path)
y = data.target[train]
_, reference, _ = lasso_path(X[train], y - y.mean(), alphas=grid, tol=1e-12, max_iter=100_000)
print(f"\nlargest difference to scikit-learn's lasso_path: {np.abs(path.weights().numpy() - reference.T).max():.1e}")

# ------------------------------------------------------------------ 2. cross-validation

splits = KFold(args.folds, shuffle=True, random_state=args.seed).split(train)
folds = [(train[rows], train[held_out]) for rows, held_out in splits]
cv = tr.cross_validate(reg, [(fit_on(rows), score_on(held_out)) for rows, held_out in folds], grid)
print(f"\n2. {args.folds} folds of the {len(train)} rows; no other row is looked at\n")
print(cv)
splits = KFold(args.folds, shuffle=True, random_state=args.seed)
judge = LassoCV(alphas=list(grid), cv=splits, tol=1e-12, max_iter=100_000).fit(X[train], y)
print(f"\nλ of scikit-learn's LassoCV: {judge.alpha_:.4g}, here: {cv.best:.4g}")
assert np.isclose(judge.alpha_, cv.best)

# ------------------------------------------------------------------ 3. refit and test

print(f"\n3. Refitted on all {len(train)} rows\n")
print("             " + "".join(f"{name:>8}" for name in data.feature_names) + f"{'test MSE':>10}")
for name, strength in {"best": cv.best, "1 SE": cv.one_standard_error}.items():
    (point,) = tr.path(reg, fit_on(train), lambdas=[strength], score=score_on(test))
    weights = "".join(f"{w:8.2f}" if w else f"{'0':>8}" for w in point.state["weight"][0].tolist())  # 0: exactly 0.0
    print(f"{name}, λ={strength:<5.3g}{weights}{-point.score:10.1f}")

figure = tr.plots.regularization_path(path, names=data.feature_names, chosen=cv.one_standard_error)
figure.savefig(args.plot, dpi=150)
print(f"\nplot: {args.plot}")
