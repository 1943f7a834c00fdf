"""A training in stages: dense, regularized to 90% zeros, and refitted with the zeros kept, with three ways to refit.

    python examples/stages.py             # some fifteen seconds

1. straight     the weights go on from where they are
2. rewound      the zeros stay, all else goes back to what it was after the dense stage
3. two rounds   half of the zeros, a refit, the other half, a refit

Every run starts from the same weights, and all have the same number of steps. A run that is broken off goes on in the
stage that it was in: its checkpoint is saved as each stage begins.
"""

import argparse
from pathlib import Path

import mnist_data
import torch
from torch import nn

import torchreg as tr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each run (default: %(default)s)")
parser.add_argument("--zeros", type=float, default=0.9, help="share of zeros (default: %(default)s)")
parser.add_argument("--lr", type=float, default=2e-3, help="learning rate as a stage begins (default: %(default)s)")
parser.add_argument("--data", help="folder of MNIST (default: TORCHREG_DATA, else ~/.cache/torchreg)")
parser.add_argument("--out", type=Path, default=Path("runs/stages"), help="checkpoints (default: %(default)s)")
args = parser.parse_args()

torch.set_flush_denormal(True)  # on dead weights' moments a CPU is several times slower
x_train, y_train, x_test, y_test, source = mnist_data.load(args.data)
print(source)
args.out.mkdir(parents=True, exist_ok=True)


def fit(model, reg, stage):
    """A training function as any other; only the `with` line knows of stages."""
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=args.lr, regularizer=reg)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.steps, 0.05 * args.lr)
    with stage.on(reg, optimizer):
        for _ in range(stage.steps):
            batch = torch.randint(len(x_train), (128,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model):
    return (model(x_test).argmax(1) == y_test).float().mean().item()


n = args.steps // 10
runs = {
    "straight": tr.Recipe(tr.Pretrain(2 * n), tr.Sparsify(5 * n, args.zeros), tr.Refit(3 * n)),
    "rewound": tr.Recipe(tr.Pretrain(2 * n), tr.Sparsify(5 * n, args.zeros), tr.Refit(3 * n, rewind=1)),
    "two rounds": tr.Recipe(
        tr.Pretrain(2 * n),
        tr.Sparsify(3 * n, args.zeros / 2),
        tr.Refit(n),
        tr.Sparsify(2 * n, args.zeros),
        tr.Refit(2 * n),
    ),
}
for name, recipe in runs.items():
    print(f"\n{name}\n\n{recipe}\n")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x_train.shape[1], 100), nn.ReLU(), nn.Linear(100, 10))
    reg = tr.Regularizer(model, tr.L1(1e-4))  # a first guess: the target finds its λ
    stages = recipe.stages(reg)
    checkpoint = args.out / f"{name.replace(' ', '_')}.pt"
    if checkpoint.exists():
        stages.load_state_dict(torch.load(checkpoint, weights_only=True))
        print(f"{checkpoint} goes on after stage {stages.done}")
    for stage in stages:
        torch.save(stages.state_dict(), checkpoint)
        fit(model, reg, stage)
        print(f"after {stage!r}: accuracy {accuracy(model):.2%}, zeros {tr.sparsity(reg).fraction:.2%}")
    checkpoint.unlink()
