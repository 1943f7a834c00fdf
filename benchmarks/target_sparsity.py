"""Target sparsity: five networks, three optimizers, three targets, and one strength to begin with for all.

    python benchmarks/target_sparsity.py             # ten minutes on one core
    python benchmarks/target_sparsity.py --short     # two

scikit-learn's digits (1,437 images to train on, 360 to test), batches of 64, lr to a twentieth by a cosine, L1 that
begins at λ = 1e-3 whatever the network. Then what else it does: a strength wrong by 100 times, groups, one term alone,
targets along a curve. Pass `--json PATH` for the numbers.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchreg as tr
from torchreg._tables import render_table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--short", action="store_true", help="fewer steps, and one optimizer a network")
parser.add_argument("--steps", type=int, help="of each training (default: 1500, short 600)")
parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
parser.add_argument("--json", type=Path, help="write the numbers there")
args = parser.parse_args()
steps = args.steps or (600 if args.short else 1500)
torch.set_num_threads(1)
torch.set_flush_denormal(True)

digits = load_digits()
order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
x_train, y_train, x_test, y_test = x[:1437], y[:1437], x[1437:], y[1437:]


def mlp(*sizes):
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def conv_net():
    filters = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    filters += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *filters, nn.Flatten(), nn.Linear(128, 10))


class Transformer(nn.Module):
    """The rows of an image are eight tokens."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Linear(8, 32)
        self.position = nn.Parameter(0.1 * torch.randn(8, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.layer(self.tokens(x.unflatten(1, (8, 8))) + self.position).mean(1))


networks = {
    "linear 64-10": lambda: nn.Linear(64, 10),
    "MLP 64-64-10": lambda: mlp(64, 64, 10),
    "LeNet 64-300-100-10": lambda: mlp(64, 300, 100, 10),
    "conv net": conv_net,
    "transformer": Transformer,
}
optimizers = {
    "ProxAdam": lambda params, reg: tr.optim.ProxAdam(params, lr=2e-3, regularizer=reg),
    "ProxAdamW": lambda params, reg: tr.optim.ProxAdamW(params, lr=2e-3, regularizer=reg),
    "ProxSGD 0.9": lambda params, reg: tr.optim.ProxSGD(params, lr=0.05, momentum=0.9, regularizer=reg),
}


def turns(factors, least=1.25):
    """How often λ turns round, not counting swings of less than a fourth."""
    count, direction, extreme = 0, 1, factors[0]
    for factor in factors:
        if direction * math.log(factor / extreme) >= 0:
            extreme = factor
        elif abs(math.log(factor / extreme)) > math.log(least):
            count, direction, extreme = count + 1, -direction, factor
    return count


def train(network, optimizer, penalty, target=None, **settings):
    """(the row of a training, its test accuracy); without a target it is one without a penalty."""
    torch.manual_seed(args.seed)
    model = networks[network]()
    reg = tr.Regularizer(model, penalty)
    optimizer = optimizers[optimizer](model.parameters(), reg)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 0.05 * optimizer.param_groups[0]["lr"])
    control = None if target is None else tr.TargetSparsity(reg, target, total_steps=steps, **settings)
    factors, shares, ends = [], [], steps - round(0.1 * steps)
    for step in range(1, steps + 1):
        batch = torch.randint(len(x_train), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
        optimizer.step()
        schedule.step()
        if control is not None:
            control.step()
            if step <= ends:
                factors.append(control.factor)
                shares.append(control.sparsity - control.target)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    if control is None:
        return accuracy
    strength = sum(reg[next(iter(reg))].strengths.values()) * control.factor
    return {
        "λ found": f"{strength:.1e}",
        "turns": str(turns(factors)),
        "over": f"{100 * max(0.0, *shares[len(shares) // 2 :]):.2f}",
        "before": f"{100 * shares[-1]:+.2f}",
        "at the end %": f"{100 * control.sparsity:.3f}",
        "error": f"{100 * abs(control.sparsity - control.target):.3f}",
        "accuracy %": f"{100 * accuracy:.1f}",
    }


results = {}


def show(title, rows):
    columns = list(rows[0])
    print(f"\n{title}\n\n{render_table(columns, [list(row.values()) for row in rows], right=range(2, len(columns)))}")
    results[title] = rows


rows = []
for i, network in enumerate(networks):
    chosen = [list(optimizers)[i % 3]] if args.short else optimizers
    for optimizer in chosen:
        plain = train(network, optimizer, tr.L1(0.0))
        for target in (0.5, 0.9, 0.99):
            row = train(network, optimizer, tr.L1(1e-3), target)
            rows.append({"network": network, "optimizer": optimizer, "target %": f"{100 * target:g}", **row})
            rows[-1]["plain %"] = f"{100 * plain:.1f}"
show(f"1. Five networks, three targets: {steps} steps", rows)

net = "MLP 64-64-10"
curve = tr.schedules.Cubic(0, 0.9, steps=int(0.7 * steps))
others = {
    ("λ = 1e-5", 0.9): train(net, "ProxAdam", tr.L1(1e-5), 0.9),
    ("λ = 1e-1", 0.9): train(net, "ProxAdam", tr.L1(1e-1), 0.9),
    ("elastic net", 0.9): train(net, "ProxAdam", tr.ElasticNet(1e-3, 1e-4), 0.9),
    ("a cubic of targets", 0.9): train(net, "ProxAdam", tr.L1(1e-3), curve),
    ("its first weight alone", 0.9): train(
        net, "ProxAdam", {"0.weight": tr.L1(1e-3), "2.weight": tr.L1(1e-5)}, 0.9, term="0.weight"
    ),
    ("group lasso, 64 neurons", 0.5): train(net, "ProxAdam", {"0.weight": tr.GroupLasso(1e-3)}, 0.5, groups=tr.Rows()),
    ("group lasso, 64 inputs", 0.5): train(
        net, "ProxSGD 0.9", {"0.weight": tr.GroupLasso(1e-3, tr.Columns())}, 0.5, groups=tr.Columns()
    ),
}
rows = [{"what": what, "target %": f"{100 * target:g}", **row} for (what, target), row in others.items()]
show(f"2. {net}, in other ways", rows)
if args.json:
    args.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
