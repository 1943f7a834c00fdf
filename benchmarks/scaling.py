"""How the cost of a proximal step grows with the number of weights and of tensors, on the CPU, in float32, with L1.

    python benchmarks/scaling.py --short
    python benchmarks/scaling.py --json scaling.json

Every row is one size. *native* and *torch* (`TORCHREG_BACKEND=torch`) are ratios of ProxAdamW's step to torch's fused
AdamW on the same weights, in turns, with the quartiles. *of the copy* is the memory that the native step moves in a
second, seven words a weight (it reads w, g, m and v and writes w, m and v), over what `Tensor.copy_` moves in the same
run, two words a weight: the roofline of a step in one pass. Small weights stay in the cache, where both are faster. One
thread is timed by its own processor time, several by the clock. Sizes that do not fit in half of the memory that is
free are left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from turns import cell, forced, ratios, take_turns
from weights import LAMBDA, Shapes, Weights

import torchreg as tr

WORDS = 9  # that a weight needs in memory: two networks' w, m and v with a gradient each, and the copy's


def sizes(short: bool) -> list[tuple[int, int]]:
    """(weights, tensors)."""
    by_weights = [(10**power, 10) for power in range(4, 8 if short else 10)]
    by_tensors = [(10**6, tensors) for tensors in ((1, 100, 1000) if short else (1, 100, 1000, 10_000))]
    return by_weights + by_tensors


def shapes(weights: int, tensors: int) -> Shapes:
    return [(weights // tensors // 10, 10)] * tensors


def free_bytes() -> int:
    """What the system says, or 4 GB where it does not."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return 4 << 30


def measured(weights: int, tensors: int, threads: int, seconds: float) -> dict[str, Any]:
    plain, regularized = (Weights(shapes(weights, tensors)) for _ in range(2))
    for own, other in zip(regularized.all, plain.all, strict=True):
        own.grad = other.grad
    fused = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
    reg = tr.Regularizer(regularized, tr.L1(LAMBDA))
    prox = tr.optim.ProxAdamW(regularized.parameters(), lr=1e-3, regularizer=reg)
    sources = [w.detach() for w in plain.all]
    targets = [torch.empty_like(w) for w in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    native = {"native": forced("native", prox.step)} if tr.backends()["native"].used else {}
    variants: dict[str, Callable[[], Any]] = {"fused": fused.step, **native, "torch": forced("torch", prox.step)}
    times = take_turns({**variants, "copy": copy}, seconds, threads)
    found: dict[str, Any] = dict(ratios(times, "fused"))
    if native:
        per_copy = [a / b for a, b in zip(times["native"], times["copy"], strict=True)]
        found["of the copy"] = 7 / 2 / statistics.median(per_copy)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="under a minute: up to 10 million weights")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path, help="write every ratio here")
    options = parser.parse_args()
    record: list[dict[str, Any]] = []
    print(f"{tr.backends()}\n\n| weights | tensors | threads | native | torch | of the copy |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for weights, tensors in sizes(options.short):
            if 4 * WORDS * weights > free_bytes() / 2:
                print(f"| {weights:,} | {tensors:,} | {threads} | more than half of the free memory | | |", flush=True)
                continue
            found = measured(weights, tensors, threads, 2.0 if options.short else 15.0)
            cells = [cell(found, c) for c in ("native", "torch")]
            share = f"{found['of the copy']:.0%}" if "of the copy" in found else "not built"
            print(f"| {weights:,} | {tensors:,} | {threads} | {' | '.join(cells)} | {share} |", flush=True)
            record.append({"weights": weights, "tensors": tensors, "threads": threads, **found})
            if options.json:
                options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\ntorch {torch.__version__}")


if __name__ == "__main__":
    main()
