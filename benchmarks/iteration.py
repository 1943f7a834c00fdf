"""What regularization costs a whole training iteration: LeNet-300-100 on MNIST, batch 128, on the CPU, in float32.

    python benchmarks/iteration.py --short
    python benchmarks/iteration.py --json iteration.json

Batch, forward, loss, backward, step. Every figure is a ratio to the iteration of plain training with torch's fused
AdamW: each way has a network of its own, the ways take turns of 20 iterations, and a row has the median of the ratios
of neighbours with the quartiles. One thread is timed by its own processor time, which other programs on the machine
disturb least; several by the clock. MNIST is read from the folder in TORCHREG_DATA (see examples/mnist_data.py).

- ProxAdamW: the swap-in with L1; `torch` without the native kernel (`TORCHREG_BACKEND=torch`); target 1.00.
- attach: torch's fused AdamW with `tr.optim.attach`.
- loss + reg(), add_gradient_(): the penalty in the loss, by autograd and in closed form, with torch's fused AdamW.
- naive: `loss + lam * sum(w.abs().sum())`. user's prox: sign(w)·relu(|w| − s·λ) after the step, in Adam's metric.
- torchao: its PruneOptimizer with L1 (its threshold is lr·λ, which solves another problem).
- default: plain training with AdamW as it comes, which is not fused on a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import forced, ratios, take_turns
from weights import users_loop

import torchreg as tr

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import mnist_data

LAMBDA, LR, BATCH, BLOCK = 1e-4, 1e-3, 128, 20


def lenet(inputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


class Training:
    """Iterations of one network: the gradient of `loss`, what `between` adds to it, and a step."""

    def __init__(self, images: Tensor, labels: Tensor, build: Callable[[nn.Module], Any]) -> None:
        self.images, self.labels = images, labels
        self.model = lenet(images.shape[1])
        self.penalty: Callable[[], Any] | None = None
        self.between: Callable[[], object] | None = None
        self.step: Callable[[], object] = build(self.model).step

    def __call__(self) -> None:
        for _ in range(BLOCK):
            batch = torch.randint(len(self.images), (BATCH,))
            loss = F.cross_entropy(self.model(self.images[batch]), self.labels[batch])
            if self.penalty is not None:
                loss = loss + self.penalty()
            self.model.zero_grad()
            loss.backward()
            if self.between is not None:
                self.between()
            self.step()


def fused(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0, fused=True)


def default(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)


def swap_in(model: nn.Module) -> Any:
    reg = tr.Regularizer(model, tr.L1(LAMBDA))
    return tr.optim.ProxAdamW(model.parameters(), lr=LR, weight_decay=0, regularizer=reg)


def attached(model: nn.Module) -> Any:
    optimizer = fused(model)
    tr.optim.attach(optimizer, tr.Regularizer(model, tr.L1(LAMBDA)))
    return optimizer


def torchao(model: nn.Module) -> Any:
    logging.disable(logging.WARNING)  # at import
    from torchao.prototype.pat.optim import PruneOptimizer

    matrices = [w for w in model.parameters() if w.dim() > 1]
    vectors = [w for w in model.parameters() if w.dim() < 2]
    group = {"params": matrices, "group_type": "ElemGrouper", "prox_type": "ProxLasso", "reg_lambda": LAMBDA}
    return PruneOptimizer(torch.optim.AdamW([group, {"params": vectors}], lr=LR, weight_decay=0, fused=True))


def ways(images: Tensor, labels: Tensor) -> dict[str, Callable[[], None]]:
    def training(build: Callable[[nn.Module], Any]) -> Training:
        return Training(images, labels, build)

    in_loss, closed, naive, loop = (training(fused) for _ in range(4))
    in_loss.penalty = tr.Regularizer(in_loss.model, tr.L1(LAMBDA))
    closed.between = tr.Regularizer(closed.model, tr.L1(LAMBDA)).add_gradient_
    matrices = [w for w in naive.model.parameters() if w.dim() > 1]
    naive.penalty = lambda: LAMBDA * sum(w.abs().sum() for w in matrices)
    optimizer = fused(loop.model)
    loop.step = lambda: users_loop(optimizer)
    found: dict[str, Callable[[], None]] = {"plain": training(fused)}
    if tr.backends()["native"].used:
        found["ProxAdamW"] = forced("native", training(swap_in))
    found |= {
        "ProxAdamW, torch": forced("torch", training(swap_in)),
        "attach": training(attached),
        "loss + reg()": in_loss,
        "add_gradient_()": closed,
        "naive": naive,
        "user's prox": loop,
        "default": training(default),
    }
    try:
        found["torchao"] = training(torchao)
    except ImportError:
        print("torchao is not installed; pip install '.[bench]'")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="under a minute")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write every ratio here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torchao")
    images, labels, _, _, source = mnist_data.load()
    print(
        f"{source}\n{tr.backends()}\n\n| an iteration | threads | ratio to plain (quartiles) |\n|---|---|---|",
        flush=True,
    )
    record: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        times = take_turns(ways(images, labels), 15.0 if options.short else 120.0, threads)
        for name, (low, middle, high) in ratios(times, "plain").items():
            print(f"| {name} | {threads} | {middle:.3f} ({low:.3f}, {high:.3f}) |", flush=True)
            record.append({"way": name, "threads": threads, "quartiles": [low, middle, high]})
    if options.json:
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\ntorch {torch.__version__}")


if __name__ == "__main__":
    main()
