"""What a penalty costs in the loss, on the CPU, in float32, with L1: added time over a step without one.

    python benchmarks/penalty.py --short
    python benchmarks/penalty.py --json penalty.json

Every figure is a ratio: the time that a way of adding the penalty takes, over that of the naive way in the same run,
`loss + lam * sum(p.abs().sum() for p in weights)` and its `backward()`. The ways take turns in one process with a plain
step, whose median is taken off all of them; a row has the median over the turns with the quartiles. A step is the loss,
`backward()` and gradients set to None again; the data's part of it is a loss that hands every weight a gradient, at the
cost of one copy. One thread is timed by its own processor time, which other programs on the machine disturb least;
several by the clock. The ways:

- reg(): `loss + reg()` and its `backward()`, with the native kernel; target 0.50.
- add_gradient_(): `reg.add_gradient_()` after the `backward()` of the bare loss, likewise; target 0.25.
- torch: `loss + reg()` without the native kernel (`TORCHREG_BACKEND=torch`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import cell, forced, take_turns
from weights import LAMBDA, NETWORKS, Shapes, Weights

import torchreg as tr


class Data(torch.autograd.Function):
    """A layer of a loss that hands its weight a gradient in fresh memory, layer after layer, as a network does."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        return slope, ctx.gradient.clone(), None


def added(shapes: Shapes, threads: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a plain step and of the naive addition, and the ratios to the latter."""
    model = Weights(shapes)
    every = list(model.parameters())
    gradients = [torch.full_like(w, 1e-3) for w in every]
    penalized = [w for w in every if w.dim() > 1]
    reg = tr.Regularizer(model, tr.L1(LAMBDA))

    def step(penalty: Callable[[], Tensor] | None, after: Callable[[], object] | None = None) -> Callable[[], None]:
        def run() -> None:
            loss = torch.zeros(())
            for w, gradient in zip(every, gradients, strict=True):
                loss = Data.apply(loss, w, gradient)
            (loss if penalty is None else loss + penalty()).backward()
            if after is not None:
                after()
            for w in every:
                w.grad = None

        return run

    variants = {
        "plain": step(None),
        "naive": step(lambda: LAMBDA * sum(w.abs().sum() for w in penalized)),
        "torch": forced("torch", step(reg)),
    }
    if tr.backends()["native"].used:
        variants["reg()"] = forced("native", step(reg))
        variants["add_gradient_()"] = forced("native", step(None, after=reg.add_gradient_))
    times = take_turns(variants, seconds, threads)

    plain = statistics.median(times["plain"])
    naive = statistics.median(times["naive"]) - plain
    found: dict[str, Any] = {"plain_ms": 1e3 * plain, "naive_ms": 1e3 * naive, "turns": len(times["plain"])}
    for name in variants:
        if name not in ("plain", "naive"):
            found[name] = [(q - plain) / naive for q in statistics.quantiles(times[name], n=4)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="under a minute: LeNet-300-100 and ResNet-50, few turns")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write every ratio here")
    options = parser.parse_args()
    columns = ["reg()", "add_gradient_()", "torch"]
    record: list[dict[str, Any]] = []
    print(tr.backends(), flush=True)
    print(f"\n| L1 in the loss | threads | naive adds, ms | {' | '.join(columns)} |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for network, shapes in list(NETWORKS.items())[: 2 if options.short else 3]:
            found = added(shapes(), threads, 4.0 if options.short else 30.0)
            texts = [cell(found, c) for c in columns]
            print(f"| {network} | {threads} | {found['naive_ms']:.2f} | {' | '.join(texts)} |", flush=True)
            record.append({"network": network, "threads": threads, **found})
            if options.json:
                options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\ntorch {torch.__version__}")


if __name__ == "__main__":
    main()
