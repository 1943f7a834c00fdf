"""An MLP on MNIST becomes truly sparse: four trainings of LeNet-300-100, one table, one picture, TensorBoard logs.

    python examples/mnist_mlp.py                 # about four minutes on two cores
    python examples/mnist_mlp.py --epochs 60     # longer
    python -m torchreg dashboard runs            # TensorBoard: accuracy, losses, sparsity, masks, strengths

1. plain        Adam, no penalty
2. L1 in loss   Adam on loss + λΣ|w|: small weights, and no zeros
3. prox L1      ProxAdam on the same objective: exact zeros
4. prox EN      ProxAdam with the elastic net λ₁Σ|w| + λ₂Σw²

In the last third of the training β₁ = 0.99: a longer mean of gradients has less noise, which holds weights off zero
that should be there. Each regularized run is then refitted: its zeros frozen, the penalty disabled. The strengths were
fixed beforehand on a validation split (`--validate`: the last 10,000 training images stand in for the test images).
There λ = 3e-4 and 4e-4 left 95.7 and 96.6% zeros at 97.8 and 97.6% refitted accuracy.
"""

import argparse
import shutil
import time
from pathlib import Path

import mnist_data
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import torchreg as tr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=12, help="epochs of regularized training (default: %(default)s)")
parser.add_argument(
    "--refit-epochs", type=int, default=6, help="epochs of the refit, 0 for none (default: %(default)s)"
)
parser.add_argument("--warmup-epochs", type=float, default=3, help="λ rises over these (default: %(default)s)")
parser.add_argument("--l1", type=float, default=3e-4, help="λ of L1, λ₁ of the elastic net (default: %(default)s)")
parser.add_argument("--l2", type=float, default=1e-5, help="λ₂ of the elastic net (default: %(default)s)")
parser.add_argument(
    "--lr",
    type=float,
    default=2e-3,
    help="learning rate, to a twentieth by a cosine, in the refit to 0 (default: %(default)s)",
)
parser.add_argument(
    "--late-beta", type=float, default=0.99, help="β₁ in the last third of the training (default: %(default)s)"
)
parser.add_argument("--batch-size", type=int, default=128, help="(default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
parser.add_argument("--data", help="folder of MNIST (default: TORCHREG_DATA, else ~/.cache/torchreg)")
parser.add_argument("--out", type=Path, default=Path("runs"), help="logs and picture (default: %(default)s)")
parser.add_argument("--validate", action="store_true", help="measure on 10,000 held-out training images")
args = parser.parse_args()

# A weight that gets no gradient any more leaves moments that decay into denormal numbers, on which a CPU is several
# times slower. Before the first operation, so that every thread of torch has it.
torch.set_flush_denormal(True)

x_train, y_train, x_test, y_test, source = mnist_data.load(args.data)
print(source)
if args.validate:
    held_out = len(x_train) // 6
    x_test, y_test = x_train[-held_out:], y_train[-held_out:]
    x_train, y_train = x_train[:-held_out], y_train[:-held_out]
score = "validation" if args.validate else "test"
# The digits are few: an epoch shows each of them some forty times, so that it is as long as one of MNIST.
repeats = max(1, 50_000 // len(x_train))
x_train, y_train = x_train.repeat(repeats, 1), y_train.repeat(repeats)
batches = -(-len(x_train) // args.batch_size)


class LeNet300(nn.Module):
    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(pixels, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


@torch.no_grad()
def measure(model: nn.Module) -> float:
    return (model(x_test).argmax(1) == y_test).float().mean().item()


runs = {
    "plain": tr.L1(0.0),
    "L1 in loss": tr.L1(args.l1),
    "prox L1": tr.L1(args.l1),
    "prox elastic net": tr.ElasticNet(l1=args.l1, l2=args.l2),
}
results = []
for name, penalty in runs.items():
    torch.manual_seed(args.seed)  # every run starts from the same weights and sees the same batches
    model = LeNet300(x_train.shape[1])
    reg = tr.Regularizer(model, penalty)  # the three weights; biases are left alone
    # λ at full strength at once would kill weights before they have learned.
    warmup = tr.Schedule(reg, tr.schedules.Linear(0, 1, steps=max(1, round(args.warmup_epochs * batches))))
    # Adds the penalty to the loss. Where a proximal optimizer carries it, it adds the value without the gradient,
    # so the loop below is the same for all runs.
    criterion = tr.RegularizedLoss(nn.CrossEntropyLoss(), reg)
    if name.startswith("prox"):
        optimizer = tr.optim.ProxAdam(model.parameters(), lr=args.lr, fused=True, regularizer=reg)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)

    # TensorBoard takes the columns of its table from one of the runs, so each names λ₂ too.
    hparams = {"optimizer": type(optimizer).__name__, "lr": args.lr, "lambda_l2": getattr(penalty, "l2", 0.0)}
    logdir = args.out / name.replace(" ", "_")
    shutil.rmtree(logdir, ignore_errors=True)  # of an earlier run of this script
    monitor = tr.TensorBoardMonitor(logdir, reg, every=10, hparams=hparams)
    accuracy, step, epoch, seconds = {}, 0, 0, 0.0
    for phase, epochs in (("train", args.epochs), ("refit", args.refit_epochs)):
        if phase == "refit":
            reg.disable()
            optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
            tr.freeze_zeros(reg, optimizer)
        # In the training lr ends above 0: steps too small to take the last strays to zero would leave them.
        lowest = 0.05 * args.lr if phase == "train" else 0.0
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * batches), lowest)
        accuracy[phase], zeros = measure(model), tr.sparsity(model)
        bar = tqdm(total=epochs * batches, desc=f"{name}, {phase}", disable=None, dynamic_ncols=True)
        for _ in range(epochs):
            started = time.perf_counter()
            if phase == "train" and epoch >= 2 * args.epochs / 3:
                optimizer.param_groups[0]["betas"] = (args.late_beta, 0.999)
            for batch in torch.randperm(len(x_train)).split(args.batch_size):
                step += 1
                loss = criterion(model(x_train[batch]), y_train[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                warmup.step()
                monitor.log(step, loss=criterion.last, lr=schedule.get_last_lr())
                bar.update()
            seconds += time.perf_counter() - started

            epoch += 1
            accuracy[phase], zeros = measure(model), tr.sparsity(model)
            bar.set_postfix(accuracy=f"{accuracy[phase]:.2%}", zeros=f"{zeros.fraction:.1%}")
            monitor.log(step, accuracy=accuracy[phase])
        bar.close()
    monitor.close()
    results.append((name, accuracy, zeros, model.fc1.weight.detach(), seconds))

columns = ["run", f"{score} %", "refitted %", "zeros %", "fc1 left", "fc2 left", "fc3 left", "live pixels", "seconds"]
rows = []
for name, accuracy, zeros, _, seconds in results:
    left = [f"{layer.weights - layer.zeros:,}" for layer in zeros.layers]
    fc1 = zeros["fc1.weight"]
    pixels = f"{fc1.inputs - fc1.dead_inputs} of {fc1.inputs}"
    percents = [f"{100 * share:.2f}" for share in (accuracy["train"], accuracy["refit"], zeros.fraction)]
    rows.append([name, *percents, *left, pixels, f"{seconds:.0f}"])
widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
print()
for row in [columns, ["-" * width for width in widths], *rows]:
    print(row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]), sep="  ")

figure = Figure(figsize=(11, 2.7), layout="constrained")
*maps, last = figure.subfigures(1, 4, width_ratios=[1, 1, 1, 1.4])
for part, (name, _, _, weight, _) in zip(maps, results[1:], strict=True):
    tr.plots.input_map(weight, figure=part)
    part.suptitle(name, fontsize="medium")
points = {name: (zeros.fraction, 100 * accuracy["refit"]) for name, accuracy, zeros, _, _ in results}
tr.plots.frontier(points, score=f"{score} accuracy, refitted (%)", figure=last)
picture = args.out / "mnist_mlp.png"
figure.savefig(picture, dpi=150)
print(f"\npicture: {picture}     dashboard: python -m torchreg dashboard {args.out}")
