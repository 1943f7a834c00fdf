"""Linear regression, from scratch and back: λ by hand, in torchreg and in scikit-learn is the same λ.

    python examples/linear_regression.py

1. L2 regression on 100 points, its gradient written out in numpy, then as `loss + reg()`: the same numbers.
2. Lasso, ridge and elastic net on the diabetes data: λ chosen on a validation part, then the coefficients of
   scikit-learn beside those of a proximal optimizer, exact zeros included, and the error on a test part.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from torch import nn

import torchreg as tr

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument("--epochs", type=int, default=1000, help="part 1: steps of gradient descent")
parser.add_argument("--lr", type=float, default=0.1, help="part 1: learning rate")
parser.add_argument("--weight-decay", type=float, default=0.1, help="part 1: λ of the term ½λΣw²")
parser.add_argument("--strengths", type=float, nargs="+", default=[0.03, 0.1, 0.3, 1, 3, 10], help="part 2: λ to try")
parser.add_argument("--l1-ratio", type=float, default=0.5, help="part 2: the share of L1 in the elastic net")
parser.add_argument("--steps", type=int, default=500, help="part 2: steps of the proximal optimizer for each fit")
parser.add_argument("--seed", type=int, default=0, help="part 2: seed of the split")
args = parser.parse_args()

# ------------------------------------------------------------------ 1. by hand

np.random.seed(42)
X = np.random.rand(100, 1)
y = 3 * X + 2 + np.random.randn(100, 1)

X1 = np.hstack([np.ones((100, 1)), X])  # the column of ones first: θ = (bias, slope)
np.random.seed(42)
start = np.random.randn(2, 1)

theta = start.copy()
for _ in range(args.epochs):
    gradient = 2 / len(y) * X1.T @ (X1 @ theta - y)
    gradient[1] += args.weight_decay * theta[1]  # the slope alone: a penalized bias would pull predictions toward 0
    theta -= args.lr * gradient

# ------------------------------------------------------------------ 1. and back, with torchreg

model = nn.Linear(1, 1, dtype=torch.float64)
with torch.no_grad():
    model.bias.fill_(start[0, 0])
    model.weight.fill_(start[1, 0])

# L2 is λΣw² with gradient 2λw; by hand it was ½λΣw² with gradient λw, which torch calls a weight decay of λ.
reg = tr.Regularizer(model, {"weight": tr.L2.from_weight_decay(args.weight_decay)})
criterion = nn.MSELoss()
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
inputs, targets = torch.from_numpy(X), torch.from_numpy(y)
for _ in range(args.epochs):
    optimizer.zero_grad()
    loss = criterion(model(inputs), targets) + reg()
    loss.backward()
    optimizer.step()

bias, slope = model.bias.item(), model.weight.item()
difference = max(abs(bias - theta[0, 0]), abs(slope - theta[1, 0]))
print(f"1. MSE + ½λΣw² on 100 points, λ = {args.weight_decay:g}, {args.epochs} epochs of gradient descent\n")
print("                 bias       slope")
print(f"numpy     {theta[0, 0]:11.8f} {theta[1, 0]:11.8f}")
print(f"torchreg  {bias:11.8f} {slope:11.8f}")
print(f"largest difference: {difference:.1e}\n")
assert difference <= 1e-6
print(reg.explain())

# ------------------------------------------------------------------ 2. the diabetes data

data = load_diabetes(scaled=False)
order = np.random.default_rng(args.seed).permutation(len(data.target))
train, validation, test = np.split(order, [len(order) * 6 // 10, len(order) * 8 // 10])
# One λ weighs all features alike only if they share a unit. Mean and deviation are the training part's: what is held
# out must not leak into the fit.
X = (data.data - data.data[train].mean(0)) / data.data[train].std(0)
y = data.target

# Three conventions, one loss. To `nn.MSELoss`, which is Σ(error²)/n, torchreg adds the penalty as it stands.
# Scikit-learn adds that of lasso and elastic net to ½ of it, so λ doubles here; and that of ridge to n times it, so
# λ is multiplied by n there. Its tolerance is tight because two solvers agree only where both have arrived.
penalties = {
    "lasso": lambda s: tr.L1(2 * s),
    "ridge": lambda s: tr.L2(s),
    "elastic net": lambda s: tr.ElasticNet.from_sklearn(2 * s, args.l1_ratio),
}
tight = {"tol": 1e-12, "max_iter": 100_000}
references = {
    "lasso": lambda s, n: Lasso(alpha=s, **tight),
    "ridge": lambda s, n: Ridge(alpha=s * n),
    "elastic net": lambda s, n: ElasticNet(alpha=s, l1_ratio=args.l1_ratio, **tight),
}


def fit(penalty, rows):
    """The coefficients that minimize MSE + penalty on these rows, the intercept last."""
    model = nn.Linear(X.shape[1], 1, dtype=torch.float64)
    reg = tr.Regularizer(model, penalty)  # takes the weight alone, as scikit-learn leaves the intercept unpenalized
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.2, momentum=0.9, regularizer=reg)
    inputs, targets = torch.from_numpy(X[rows]), torch.from_numpy(y[rows, None])
    for _ in range(args.steps):
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()  # without reg(): the optimizer's prox is the penalty
        optimizer.step()
    return np.append(model.weight.detach().numpy(), model.bias.item())


def mse(coefficients, rows):
    return np.mean((X[rows] @ coefficients[:-1] + coefficients[-1] - y[rows]) ** 2)


# ------------------------------------------------------------------ 2. choose λ on the validation part

torch.manual_seed(args.seed)  # for the starting weights; the problems are convex, so that every start ends alike
print(f"\n2. Diabetes: {len(train)} rows to train, {len(validation)} to choose λ, {len(test)} to test\n")
print("validation MSE" + "".join(f"{f'λ={s:g}':>10}" for s in args.strengths))
chosen = {}
for name, penalty in penalties.items():
    errors = [mse(fit(penalty(s), train), validation) for s in args.strengths]
    chosen[name] = args.strengths[int(np.argmin(errors))]
    print(f"{name:<14}" + "".join(f"{error:10.1f}" for error in errors) + f"   take λ={chosen[name]:g}")

# ------------------------------------------------------------------ 2. refit on both, report on the test part

both = np.concatenate([train, validation])
columns = []
for name, s in chosen.items():
    reference = references[name](s, len(both)).fit(X[both], y[both])
    columns += [np.append(reference.coef_, reference.intercept_), fit(penalties[name](s), both)]

table = dict(zip([*data.feature_names, "intercept"], np.transpose(columns), strict=True))
table["test MSE"] = [mse(column, test) for column in columns]
table["test R²"] = [1 - error / y[test].var() for error in table["test MSE"]]

print("\n" + " " * 9 + "".join(f"{f'{name}, λ={s:g}':>24}" for name, s in chosen.items()))
print("feature  " + "     sklearn    torchreg" * len(chosen))
for name, row in table.items():
    print(f"{name:<9}" + "".join(f"{value:12.4f}" if value else f"{'0':>12}" for value in row))  # 0: exactly 0.0
differences = {name: np.abs(columns[2 * i] - columns[2 * i + 1]).max() for i, name in enumerate(chosen)}
print("largest difference: " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
assert max(differences.values()) <= 1e-6, "not converged: give it more --steps"
