"""Gradient noise and the support: what minibatches do to exact zeros, and what helps.

    python benchmarks/minibatch.py             # ten minutes or so on one core
    python benchmarks/minibatch.py --short     # under two

1. The law: how many weights that should be 0 are not, by one number: (σ/λ)·√((1−β)/(1+β)).
2. Lasso, 10,000 × 500, against scikit-learn's solution: every optimizer, three courses of the learning rate.
3. Lasso: remedies, while training and after it.
4. LeNet-300-100 on MNIST: the same remedies where no solution is known.

All runs of a part see the same batches. `wobble` counts the weights that were zero in some steps of the last epoch
and not in others; `loss` is the mean data loss of the batches of the last epoch. MNIST is read from the folder in
TORCHREG_DATA (see examples/mnist_data.py).
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Lasso
from torch import nn, optim

import torchreg as tr
from torchreg._tables import render_table

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import mnist_data

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--short", action="store_true", help="fewer epochs and runs")
parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3, 4], help="(default: all)")
parser.add_argument("--seed", type=int, default=0, help="of the starting weights and the batches (default: 0)")
parser.add_argument("--json", type=Path, help="write the numbers of every row there")
args = parser.parse_args()
torch.set_num_threads(1)  # steps this small are faster on one
torch.set_flush_denormal(True)
started = time.perf_counter()
results = []


def show(title, columns, rows):
    print(f"\n{title}\n\n{render_table(columns, rows, right=range(1, len(columns)))}", flush=True)
    results.extend({"part": title, **dict(zip(columns, row, strict=True))} for row in rows)


# ------------------------------------------------------------------ courses: of u, how much of the training is done


def constant(u):
    return 1.0


def cosine(u):
    return 0.5 * (1 + math.cos(math.pi * u))


def cosine_to_5_percent(u):
    return 0.05 + 0.95 * cosine(min(1.0, u / 0.8))


def late(value, start=2 / 3):
    """`value` from `start` on, and nothing before."""
    return lambda u: value if u >= start else None


def set_momentum(optimizer, beta):
    """Another β₁, at the same learning rate in the long run: SGD's grows like 1/(1 − momentum)."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (beta, *group["betas"][1:])
        else:
            group["momentum"] = group["dampening"] = beta


def one_cycle(optimizer, lr, steps):
    """Torch's own: the momentum goes against lr, from 0.99 down to 0.85 and up again; lr ends at 4%."""
    return optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, max_momentum=0.99, final_div_factor=1)


def train(
    model,
    penalty,
    criterion,
    x,
    y,
    make,  # of parameters: the optimizer
    *,
    epochs,
    batch=100,
    lr=constant,  # of u: a factor
    beta=None,  # of u: another β₁
    grow=None,  # of u: a factor for the batch
    scheduler=None,  # in the place of lr
    warmup=0.0,  # until this u, λ rises
):
    """Trains, and gives what the last epoch was like: a dict."""
    torch.manual_seed(args.seed)
    reg = tr.Regularizer(model, penalty)
    optimizer = make(model.parameters())
    handle = tr.optim.attach(optimizer, reg)
    weights = [w for _, w in reg.named_parameters()]
    base = optimizer.param_groups[0]["lr"]
    schedule = scheduler and scheduler(optimizer, base, epochs * math.ceil(len(x) / batch))
    alive = [torch.zeros(w.shape) for w in weights]
    mean = [torch.zeros(w.shape) for w in model.parameters()]
    loss_sum, steps = 0.0, 0
    for epoch in range(epochs):
        size = batch * ((grow and grow(epoch / epochs)) or 1)
        for k, rows in enumerate(torch.randperm(len(x)).split(size)):
            u = (epoch + k * size / len(x)) / epochs
            if not schedule:
                for group in optimizer.param_groups:
                    group["lr"] = base * lr(u)
            if beta and beta(u):
                set_momentum(optimizer, beta(u))
            if warmup:
                reg[penalty.name].factor = min(1.0, u / warmup)
            loss = criterion(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule:
                schedule.step()
            if epoch == epochs - 1:
                steps, loss_sum = steps + 1, loss_sum + loss.item()
                for count, w in zip(alive, weights, strict=True):
                    count += w.detach() != 0
                for total, w in zip(mean, model.parameters(), strict=True):
                    total += w.detach()
    handle.remove()
    return {
        "reg": reg,
        "loss": loss_sum / steps,
        "wobble": sum(int(((count > 0) & (count < steps)).sum()) for count in alive),
        "nonzero": [count / steps for count in alive],  # in what part of the last epoch's steps
        "mean": [total / steps for total in mean],
    }


def full_step(model, reg, criterion, x, y, lr):
    """One proximal step with the gradient of all data."""
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=lr, regularizer=reg)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    optimizer.attachment.remove()


def set_to(model, mean):
    with torch.no_grad():
        for w, value in zip(model.parameters(), mean, strict=True):
            w.copy_(value)


# ------------------------------------------------------------------ the lasso

N, P, TRUE, SIGMA = 10_000, 500, 20, 1.0
rng = np.random.default_rng(0)
X = rng.standard_normal((N, P))
for j in range(1, P):  # neighbours are correlated by 0.3
    X[:, j] = 0.3 * X[:, j - 1] + math.sqrt(1 - 0.3**2) * X[:, j]
coefficients = np.zeros(P)
coefficients[rng.choice(P, TRUE, replace=False)] = rng.choice([-1, 1], TRUE) * rng.uniform(0.5, 1.5, TRUE)
Y = X @ coefficients + SIGMA * rng.standard_normal(N)
lambda_max = np.abs(X.T @ Y).max() / N
strength = 0.02 * lambda_max
solution = Lasso(alpha=strength, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(X, Y).coef_
support = solution != 0
x, y = torch.tensor(X, dtype=torch.float32), torch.tensor(Y, dtype=torch.float32)[:, None]
# The standard deviation of one coordinate's gradient in a batch of 1.
noise = np.std(X * (X @ solution - Y)[:, None], axis=0).mean()


def half_mse(output, target):
    return 0.5 * (output - target).square().mean()


def objective(w):
    return 0.5 * np.mean((X @ w - Y) ** 2) + strength * np.abs(w).sum()


def linear():
    model = nn.Linear(P, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def lasso_row(name, w, wobble=None, loss=None):
    w = w.detach().double().numpy().ravel()
    alive = w != 0
    gap = (objective(w) - objective(solution)) / objective(solution)
    counts = [alive.sum(), (alive & ~support).sum(), (~alive & support).sum()]
    return [name, f"{gap:.1e}", *map(str, counts), str(wobble or "-"), "-" if loss is None else f"{loss:.4f}"]


fit = partial(train, penalty=tr.L1(strength), criterion=half_mse, x=x, y=y, epochs=10 if args.short else 30)
LASSO = ["run", "gap", "nonzeros", "false +", "false −", "wobble", "loss"]
print(f"lasso: {N:,} × {P}, λ = {strength:.4f} = 0.02·λ_max; scikit-learn has {support.sum()} nonzeros")
print(f"gradient noise σ = {noise:.3f}/√batch; at batch 100, σ/λ = {noise / 10 / strength:.2f}")

if 1 in args.parts:
    rows = []
    for beta, batch, lr in [
        (0.0, 100, 0.02), (0.0, 100, 0.005), (0.0, 400, 0.05), (0.0, 1600, 0.2), (0.5, 100, 0.02), (0.9, 100, 0.02),
        (0.9, 100, 0.005), (0.9, 400, 0.05), (0.97, 100, 0.02), (0.97, 100, 0.005), (0.99, 100, 0.02),
    ]:  # fmt: skip
        model = linear()
        run = fit(model, make=partial(optim.SGD, lr=lr, momentum=beta, dampening=beta), batch=batch)
        number = noise / math.sqrt(batch) / strength * math.sqrt((1 - beta) / (1 + beta))
        share = run["nonzero"][0].numpy().ravel()[~support].mean()
        expected = math.erfc(1 / number / math.sqrt(2))
        cells = [f"{beta:g}", str(batch), f"{lr:g}", f"{number:.2f}", f"{100 * expected:.1f}", f"{100 * share:.1f}"]
        rows.append(cells)
    columns = ["β", "batch", "lr", "(σ/λ)·√((1−β)/(1+β))", "P(|m| > λ) %", "nonzero %"]
    show("1. Weights that should be 0 and are not: SGD, lr constant, dampening = β", columns, rows)

# ------------------------------------------------------------------ every optimizer

OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.02),
    "SGD, momentum 0.9": partial(optim.SGD, lr=0.005, momentum=0.9),
    "SGD, momentum 0.99": partial(optim.SGD, lr=0.0005, momentum=0.99),
    "Adam": partial(optim.Adam, lr=0.003),
    "Adam, β₁ 0.97": partial(optim.Adam, lr=0.003, betas=(0.97, 0.999)),
    "Adam, β₁ 0.99": partial(optim.Adam, lr=0.003, betas=(0.99, 0.999)),
    "AdamW, no decay": partial(optim.AdamW, lr=0.003, weight_decay=0.0),
    "NAdam": partial(optim.NAdam, lr=0.003),
    "RAdam": partial(optim.RAdam, lr=0.003),
    "Adamax": partial(optim.Adamax, lr=0.003),
    "RMSprop": partial(optim.RMSprop, lr=0.002),
    "RMSprop, momentum 0.9": partial(optim.RMSprop, lr=0.0003, momentum=0.9),
    "Adagrad": partial(optim.Adagrad, lr=0.1),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "ASGD": partial(optim.ASGD, lr=0.02),
}
COURSES = {"constant": constant, "cosine": cosine, "cosine to 5%": cosine_to_5_percent}

if 2 in args.parts:
    names = ["SGD", "SGD, momentum 0.9", "Adam", "Adam, β₁ 0.99"] if args.short else OPTIMIZERS
    for course, lr in COURSES.items():
        rows = []
        for name in names:
            model = linear()
            run = fit(model, make=OPTIMIZERS[name], lr=lr)
            rows.append(lasso_row(name, model.weight, run["wobble"], run["loss"]))
        show(f"2. Lasso, batch 100, lr {course}", LASSO, rows)

# ------------------------------------------------------------------ remedies


def dual_averaging(gamma, epochs):
    """RDA (Xiao, 2010): w = −(√t/γ)·soft(mean of all gradients, λ)."""
    torch.manual_seed(args.seed)
    w, total, t = torch.zeros(P, 1), torch.zeros(P, 1), 0
    for _ in range(epochs):
        for rows in torch.randperm(N).split(100):
            t += 1
            total += x[rows].T @ (x[rows] @ w - y[rows]) / 100
            w = -math.sqrt(t) / gamma * tr.functional.soft_threshold(total / t, strength)
    return w


BASES = {
    "SGD 0.9": partial(optim.SGD, lr=0.05, momentum=0.9, dampening=0.9),
    "Adam": partial(optim.Adam, lr=0.003),
}
REMEDIES = {
    "as it is": {},
    "lr cosine": {"lr": cosine},
    "lr cosine to 5%": {"lr": cosine_to_5_percent},
    "β₁ 0.99 in the last third": {"beta": late(0.99)},
    "β₁ 0.99 in the last third, lr cosine to 5%": {"beta": late(0.99), "lr": cosine_to_5_percent},
    "β₁ 0.99 throughout": {"beta": late(0.99, start=0)},
    "OneCycleLR, max_momentum 0.99": {"scheduler": one_cycle},
    "batch ×8 in the last third": {"grow": late(8)},
}

if 3 in args.parts:
    for base, make in BASES.items():
        rows = []
        for remedy, settings in REMEDIES.items():
            model = linear()
            run = fit(model, make=make, **settings)
            rows.append(lasso_row(remedy, model.weight, run["wobble"], run["loss"]))
            if remedy in ("as it is", "lr cosine"):
                last = model.weight.detach().clone()
                full_step(model, run["reg"], half_mse, x, y, lr=0.3)
                rows.append(lasso_row("  then one step with all data, lr 0.3", model.weight))
                rows.append(lasso_row("  mean of the last epoch", run["mean"][0]))
                rows.append(lasso_row("  the same where mostly nonzero", run["mean"][0] * (run["nonzero"][0] > 0.5)))
                set_to(model, run["mean"])
                full_step(model, run["reg"], half_mse, x, y, lr=0.3)
                rows.append(lasso_row("  mean, then one step with all data", model.weight))
        show(f"3. Lasso, batch 100, {base}", LASSO, rows)
    show(
        "3. Lasso, dual averaging",
        LASSO,
        [lasso_row(f"γ = {gamma:g}", dual_averaging(gamma, fit.keywords["epochs"])) for gamma in (3.0, 10.0, 30.0)],
    )

# ------------------------------------------------------------------ MNIST

if 4 in args.parts:
    images, labels, test_images, test_labels, source = mnist_data.load()
    images, labels = images[:20_000], labels[:20_000]
    criterion = nn.CrossEntropyLoss()
    print(f"\n{source.partition(' from ')[0]}: the first {len(images):,} training images, λ = 3e-4 rising over a fifth")

    def mnist_row(name, model, reg, wobble=None, loss=None):
        with torch.no_grad():
            total = criterion(model(images), labels) + reg()
            accuracy = (model(test_images).argmax(1) == test_labels).float().mean()
        zeros = tr.sparsity(model)
        left = f"{zeros.weights - zeros.zeros:,}"
        cells = [f"{total:.4f}", left, f"{100 * zeros.fraction:.2f}", f"{100 * accuracy:.2f}"]
        return [name, *cells, f"{wobble:,}" if wobble else "-", "-" if loss is None else f"{loss:.4f}"]

    columns = ["run", "objective", "left", "zeros %", "test accuracy %", "wobble", "loss"]
    makers = {
        "SGD 0.9": partial(optim.SGD, lr=0.5, momentum=0.9, dampening=0.9),
        "Adam": partial(optim.Adam, lr=0.002),
    }
    settings = REMEDIES | {"batch 1024 throughout": {"batch": 1024}, "λ in full from the start": {"warmup": 0.0}}
    if args.short:
        settings = {name: settings[name] for name in ("lr cosine", "β₁ 0.99 in the last third")}
    for base, make in makers.items():
        rows = []
        for name, setting in settings.items():
            torch.manual_seed(args.seed)
            model = nn.Sequential(
                nn.Linear(images.shape[1], 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
            )
            setting = {"batch": 128, "epochs": 5 if args.short else 15, "warmup": 0.2, **setting}
            run = train(model, tr.L1(3e-4), criterion, images, labels, make, **setting)
            run["reg"]["l1"].factor = 1.0
            rows.append(mnist_row(name, model, run["reg"], run["wobble"], run["loss"]))
            if name.startswith("lr cosine") or name == "as it is":
                full_step(model, run["reg"], criterion, images, labels, lr=0.2)
                rows.append(mnist_row("  then one step with all data, lr 0.2", model, run["reg"]))
            if name == "as it is":
                set_to(model, run["mean"])
                rows.append(mnist_row("  mean of the last epoch", model, run["reg"]))
        show(f"4. LeNet-300-100, batch 128, {base}", columns, rows)

print(f"\n{time.perf_counter() - started:.0f} s")
if args.json:
    args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
