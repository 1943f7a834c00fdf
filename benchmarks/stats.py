"""What the zeros, norms and maximum of all weights cost, on the CPU, in float32: one pass, one synchronization.

    python benchmarks/stats.py --short
    python benchmarks/stats.py --json stats.json

Every figure is a ratio to three `.item()` a tensor of the same weights in the same run, `(w == 0).sum()`,
`w.abs().sum()` and `w.square().sum()`: the variants take turns, and a row has the median of the ratios of neighbours,
with the quartiles. One thread is timed by its own processor time, several by the clock. The variants: `summarize`,
which `tr.measure`, `tr.sparsity` and the monitor read, with the native kernel, and without (`TORCHREG_BACKEND=torch`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from turns import Quartiles, cell, forced, ratios, take_turns
from weights import NETWORKS, Shapes, Weights

import torchreg as tr
from torchreg.kernels import summarize


def statistics_of(shapes: Shapes, threads: int, seconds: float) -> dict[str, Quartiles]:
    weights = [w.detach() for w in Weights(shapes).parameters()]

    def three_items() -> None:
        for w in weights:
            (w == 0).sum().item(), w.abs().sum().item(), w.square().sum().item()

    native = {"native": forced("native", lambda: summarize(weights))} if tr.backends()["native"].used else {}
    variants = {"items": three_items, **native, "torch": forced("torch", lambda: summarize(weights))}
    return ratios(take_turns(variants, seconds, threads), "items")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="under a minute: LeNet-300-100 and ResNet-50, few turns")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write every ratio here")
    options = parser.parse_args()
    record: list[dict[str, Any]] = []
    print(f"{tr.backends()}\n\n| statistics | threads | native | torch |\n|---|---|---|---|", flush=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for network, shapes in list(NETWORKS.items())[: 2 if options.short else 3]:
            found = statistics_of(shapes(), threads, 2.0 if options.short else 20.0)
            print(f"| {network} | {threads} | {cell(found, 'native')} | {cell(found, 'torch')} |", flush=True)
            record.append({"network": network, "threads": threads, "quartiles": found})
            if options.json:
                options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\ntorch {torch.__version__}")


if __name__ == "__main__":
    main()
