"""How few weights LeNet-300-100 needs on MNIST: the error over the weights left, for five ways of making zeros.

    python benchmarks/frontier.py --short         # one seed of L0 under ProxAdam: some six minutes
    python benchmarks/frontier.py --json frontier.json --plot frontier.png        # all of it: hours
    python benchmarks/frontier.py --validation    # trains on 50,000 images and judges by the other 10,000
    python benchmarks/frontier.py --network LeNet-5     # a convolutional net: 10, 20 and 40 times fewer weights

Each way walks down in weights from the same dense network. What it has left at a count is trained on with its zeros
frozen, for 30 epochs; the error is that of the final epoch, on the 10,000 test images. Weights are counted over all
layers, biases are not. All trainings add the same Gaussian noise to the pixels, in batches of 256. MNIST is read
from the folder in TORCHREG_DATA (see examples/mnist_data.py). Choices were made with --validation, and
benchmarks/FRONTIER.md has the results, and what was tried.

- L0: `tr.L0` under `tr.optim.ProxAdam`, λ rising geometrically. In Adam's metric a weight goes where w²·√v ≤ 2·lr·λ.
- L1, then L0: `tr.recipes.l1_then_l0`. L1 in the loss takes neurons first.
- magnitude: `torch.nn.utils.prune`, the smallest |w| of all layers, their number falling fast, then slowly.
- L1 in the loss: `loss + λ * sum(w.abs().sum())`, and in the end a cut of the smallest |w|.
- torchao: PruneOptimizer with ProxLasso, whose threshold is lr·λ, λ rising likewise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import torchreg as tr

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import mnist_data

BATCH, NOISE, LR = 256, 0.15, 2e-3

Data = tuple[Tensor, Tensor]
Networks = Iterator[tuple[int, nn.Sequential]]


def lenet_300_100() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def lenet_5() -> nn.Sequential:
    first, second = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
    features = [nn.Unflatten(1, (1, 28, 28)), first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2)]
    linears = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*features, nn.Flatten(), *linears)


class Course(NamedTuple):
    """A network, the counts that each way comes down to, and the epochs of each part."""

    network: Callable[[], nn.Sequential]
    counts: tuple[int, ...]
    dense: int
    down: int
    refit: int


COURSES = {
    "LeNet-300-100": Course(lenet_300_100, counts=(13_310, 6_338, 3_060, 2_662), dense=4, down=80, refit=30),
    "LeNet-5": Course(lenet_5, counts=(6_147, 3_073, 1_536), dense=2, down=12, refit=4),
}


def layers_of(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def size(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in layers_of(model))


def left(model: nn.Module) -> int:
    return sum(int(layer.weight.count_nonzero()) for layer in layers_of(model))


@torch.no_grad()
def error(model: nn.Module, data: Data) -> float:
    images, labels = data
    return 100 * (model(images).argmax(1) != labels).float().mean().item()


def batches(data: Data, epochs: int) -> Iterator[Data]:
    images, labels = data
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            x = images[batch]
            yield x + NOISE * torch.randn_like(x), labels[batch]


def steps_of(data: Data, epochs: int) -> int:
    return epochs * (len(data[0]) // BATCH)


def train(model: nn.Module, optimizer: Any, data: Data, epochs: int, penalty: Any = None) -> Iterator[int]:
    """Yields how many steps have been made, after each."""
    for step, (x, y) in enumerate(batches(data, epochs), start=1):
        loss = F.cross_entropy(model(x), y)
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


@torch.no_grad()
def copied(model: nn.Sequential, network: Callable[[], nn.Sequential]) -> nn.Sequential:
    twin = network()
    for copy, layer in zip(layers_of(twin), layers_of(model), strict=True):
        copy.weight.copy_(layer.weight)
        copy.bias.copy_(layer.bias)
    return twin


# ---------------------------------------------------------------------- ways down: each count, with a network of it


def reached(model: nn.Sequential, counts: list[int], course: Course) -> Networks:
    """The counts that the model has come down to, each once."""
    now = left(model)
    while counts and now <= counts[0]:
        yield counts.pop(0), copied(model, course.network)


def l0(model: nn.Sequential, data: Data, course: Course) -> Networks:
    """λ rises geometrically: fast to 6e-3, where LeNet-300-100 has some 15,000 weights, and slowly from there on."""
    reg = tr.Regularizer(model, tr.L0(1e-4))
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=LR, regularizer=reg)
    steps = steps_of(data, course.down)
    fast = round(0.15 * steps)
    curve = tr.schedules.Chain(
        tr.schedules.Geometric(1, 60, steps=fast), tr.schedules.Geometric(60, 1800, steps=steps - fast)
    )
    schedule, counts = tr.Schedule(reg, curve), list(course.counts)
    for step in train(model, optimizer, data, course.down):
        schedule.step()
        if step % 25 == 0:
            yield from reached(model, counts, course)
        if not counts:
            return


def l1_then_l0(model: nn.Sequential, data: Data, course: Course) -> Networks:
    """`tr.recipes.l1_then_l0`: L1 takes the neurons, L0 then takes the weights of those that are left."""
    epoch, counts = steps_of(data, 1) * course.down // 80, list(course.counts)
    (dense, regularize, _), curve = tr.recipes.l1_then_l0(epoch)  # all ways share the refit
    l1, l0 = tr.Regularizer(model, tr.L1(1e-4)), tr.Regularizer(model, tr.L0(1e-5))
    schedule = tr.Schedule(l1, curve)
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=LR, regularizer=l0)
    for stage in (dense, regularize):
        training = train(model, optimizer, data, stage.steps // steps_of(data, 1) + 1, l1)
        with stage.on(l0, optimizer):
            for step, _ in zip(range(stage.steps), training, strict=False):
                schedule.step()
                if stage is regularize and step % 25 == 0:
                    yield from reached(model, counts, course)


def by_magnitude(model: nn.Sequential, data: Data, course: Course) -> Networks:
    layers = [(layer, "weight") for layer in layers_of(model)]
    for layer, name in layers:
        prune.identity(layer, name)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    weights = now = size(model)
    steps, counts = steps_of(data, course.down), list(course.counts)
    for step in train(model, optimizer, data, course.down):
        if step % 50 == 0 or step == steps:
            wanted = round(weights * (course.counts[-1] / weights) ** (1 - (1 - step / steps) ** 1.5))
            prune.global_unstructured(layers, prune.L1Unstructured, amount=now - wanted)
            now = wanted
            if counts and now <= counts[0]:
                yield counts.pop(0), copied(model, course.network)


def l1_in_the_loss(model: nn.Sequential, data: Data, course: Course) -> Networks:
    weights = [layer.weight for layer in layers_of(model)]
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    for _ in train(model, optimizer, data, course.down, lambda: 1e-4 * sum(w.abs().sum() for w in weights)):
        pass
    for count in course.counts:
        network = copied(model, course.network)
        with torch.no_grad():
            cut = torch.cat([layer.weight.abs().flatten() for layer in layers_of(network)]).topk(count).values[-1]
            for layer in layers_of(network):
                layer.weight[layer.weight.abs() < cut] = 0
        yield count, network


def by_torchao(model: nn.Sequential, data: Data, course: Course) -> Networks:
    logging.disable(logging.WARNING)  # at import
    warnings.filterwarnings("ignore", module="torchao")
    from torchao.prototype.pat.optim import PruneOptimizer

    weights = [layer.weight for layer in layers_of(model)]
    group = {"params": weights, "group_type": "ElemGrouper", "prox_type": "ProxLasso", "reg_lambda": 1e-2}
    biases = {"params": [layer.bias for layer in layers_of(model)]}
    optimizer = PruneOptimizer(torch.optim.Adam([group, biases], lr=LR, fused=True))
    steps, counts = steps_of(data, course.down), list(course.counts)
    for step in train(model, optimizer, data, course.down):
        optimizer.param_groups[0]["reg_lambda"] = 1e-2 * 200 ** (step / steps)
        if step % 25 == 0:
            yield from reached(model, counts, course)
        if not counts:
            return


def dense(model: nn.Sequential, data: Data, course: Course) -> Networks:
    """As long a training, of all weights."""
    for _ in train(model, torch.optim.Adam(model.parameters(), lr=LR, fused=True), data, course.down):
        pass
    yield size(model), model


WAYS: dict[str, Callable[[nn.Sequential, Data, Course], Networks]] = {
    "dense": dense,
    "L0, ProxAdam": l0,
    "L1, then L0": l1_then_l0,
    "magnitude": by_magnitude,
    "L1 in the loss, cut": l1_in_the_loss,
    "torchao": by_torchao,
}

# ---------------------------------------------------------------------- what is left


@torch.no_grad()
def compacted(model: nn.Sequential) -> tuple[nn.Sequential, Tensor]:
    """The same function of the pixels that are read, without the units that none reads or feeds; and those pixels."""
    model = copied(model, lenet_300_100)
    layers = layers_of(model)
    for _ in layers:  # a unit that goes takes others along, a layer further each time
        for layer, after in itertools.pairwise(layers):
            layer.weight[~(after.weight != 0).any(0)] = 0
            constant = ~(layer.weight != 0).any(1)
            after.bias += after.weight[:, constant] @ layer.bias[constant].relu()
            after.weight[:, constant] = 0
    inputs = [(layer.weight != 0).any(0) for layer in layers]
    outputs = [*inputs[1:], torch.ones(10, dtype=torch.bool)]
    small = lenet_300_100()
    for place, layer, read, fed in zip((0, 2, 4), layers, inputs, outputs, strict=True):
        kept = nn.Linear(int(read.sum()), int(fed.sum()))
        kept.weight.copy_(layer.weight[fed][:, read])
        kept.bias.copy_(layer.bias[fed])
        small[place] = kept
    return small, inputs[0]


def refitted(model: nn.Sequential, data: Data, test: Data, course: Course) -> dict[str, Any]:
    """The error of what is left after a refit with its zeros frozen, at the final epoch."""
    start = error(model, test)
    every = torch.ones(784, dtype=torch.bool)
    network, pixels = compacted(model) if course.network is lenet_300_100 else (model, every)
    seen, unseen = ((images[:, pixels], labels) for images, labels in (data, test))
    optimizer = torch.optim.Adam(network.parameters(), lr=1.5 * LR, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps_of(data, course.refit))
    with tr.freeze_zeros(tr.Regularizer(network, tr.L0(0.0)), optimizer):
        for _ in train(network, optimizer, seen, course.refit):
            schedule.step()
    shape = "-".join(str(int(layer.weight.transpose(0, 1).flatten(1).any(1).sum())) for layer in layers_of(network))
    return {
        "left": left(network),
        "error": error(network, unseen),
        "before": start,
        "on training images": error(network, seen),
        "shape": shape,
    }


def table(record: list[dict[str, Any]], weights: int) -> str:
    """Mean ± standard deviation over the seeds, by way and count."""
    rows = ["| way | weights left (at most) | × | error %, mean ± sd | lowest, highest | shape, seed 0 | seeds |"]
    rows.append("|---|---|---|---|---|---|---|")
    for way in dict.fromkeys(row["way"] for row in record):
        for count in sorted({row["count"] for row in record if row["way"] == way}, reverse=True):
            found = [row for row in record if (row["way"], row["count"]) == (way, count)]
            errors = [row["error"] for row in found]
            spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
            most = max(row["left"] for row in found)
            cells = [way, f"{most:,}", f"{weights / most:.0f}", f"{statistics.mean(errors):.2f}{spread}"]
            cells += [f"{min(errors):.2f}, {max(errors):.2f}", found[0]["shape"], f"{len(errors)}"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plotted(record: list[dict[str, Any]], weights: int, file: Path) -> None:
    """Accuracy over weights left, with the range of the seeds."""
    curves, dense = {}, [100 - row["error"] for row in record if row["way"] == "dense"]
    for way in dict.fromkeys(row["way"] for row in record if row["way"] != "dense"):
        rows = [row for row in record if row["way"] == way]
        by_count = [[row for row in rows if row["count"] == count] for count in sorted({row["count"] for row in rows})]
        least = min(map(len, by_count))  # of an interrupted run
        zeros = [[1 - row["left"] / weights for row in found[:least]] for found in by_count]
        curves[way] = (zeros, [[100 - row["error"] for row in found[:least]] for found in by_count])
    figure = tr.plots.frontier(curves, reference={"dense": dense} if dense else None, score="test accuracy %")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one seed of L0 under ProxAdam")
    parser.add_argument("--network", choices=list(COURSES), default="LeNet-300-100")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="which (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--validation", action="store_true", help="judge by 10,000 of the training images")
    parser.add_argument("--json", type=Path, help="write every result here, and go on from what is there")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    options = parser.parse_args()
    course = COURSES[options.network]
    ways = options.ways or (["L0, ProxAdam"] if options.short else list(WAYS))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    x, y, x_test, y_test, source = mnist_data.load()
    if x.shape[1] != 784:
        raise SystemExit(f"{source}, which are not 28×28; set TORCHREG_DATA to a folder with MNIST")
    data, test = (x, y), (x_test, y_test)
    if options.validation:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        data, test = (x[order[10_000:]], y[order[10_000:]]), (x[order[:10_000]], y[order[:10_000]])
    record = json.loads(options.json.read_text("utf-8")) if options.json and options.json.exists() else []
    for seed in [0] if options.short else options.seeds:
        for way in ways:
            if any((row["way"], row["seed"]) == (way, seed) for row in record):
                continue
            rows = []
            torch.manual_seed(seed)
            model, began = course.network(), time.perf_counter()
            optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
            for _ in train(model, optimizer, data, course.dense):
                pass
            networks = WAYS[way](model, data, course)
            for count, network in networks:
                row = {"way": way, "seed": seed, "count": count, **refitted(network, data, test, course)}
                print(f"{row}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
                rows.append(row)
            record += rows
            if options.json:
                options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"{source}\n\n{table(record, size(course.network()))}\n\ntorch {torch.__version__}")
    if options.plot:
        plotted(record, size(course.network()), options.plot)


if __name__ == "__main__":
    main()
