"""What a proximal step costs beside the stock fused step of torch, in float32, with L1 in the exact metric.

    python benchmarks/step.py --short
    python benchmarks/step.py --json step.json
    python benchmarks/step.py --device cuda

Every figure is a ratio to the stock fused step of the same weights in the same run: the variants take turns, and a row
has the median of the ratios of neighbours, with the quartiles. One thread is timed by its own processor time, which
other programs on the machine disturb least; several by the clock. The variants: the swap-in with the native kernel; the
same without it (`TORCHREG_BACKEND=torch`); and what a user would write, the stock optimizer as it comes and a loop that
shrinks every weight.

On a GPU the variants are timed by events on its stream, with Triton's kernels in place of the native one; "in a graph"
is the step with them over the stock fused step, each captured in a CUDA graph of its own, and the last column what the
former moves in memory as a share of what a copy moves in the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from turns import Quartiles, cell, forced, ratios, take_turns
from weights import LAMBDA, NETWORKS, Shapes, Weights, users_loop

import torchreg as tr

OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, tr.optim.ProxAdamW, {"lr": 1e-3}),
    "SGD, momentum": (torch.optim.SGD, tr.optim.ProxSGD, {"lr": 1e-3, "momentum": 0.9}),
}


def steps(shapes: Shapes, optimizer: str, threads: int, seconds: float) -> dict[str, Quartiles]:
    stock, swap_in, settings = OPTIMIZERS[optimizer]
    plain, regularized = Weights(shapes), Weights(shapes)
    fused = stock(plain.parameters(), fused=True, **settings)
    loop = stock(plain.parameters(), **settings)
    prox = swap_in(regularized.parameters(), regularizer=tr.Regularizer(regularized, tr.L1(LAMBDA)), **settings)
    native = {"native": forced("native", prox.step)} if tr.backends()["native"].used else {}
    variants = {"fused": fused.step, **native, "torch": forced("torch", prox.step), "loop": lambda: users_loop(loop)}
    times = take_turns(variants, seconds, threads)
    return ratios(times, "fused")


class Turn:
    """Times variants on a GPU's stream: events are read once all of the turn is done."""

    def __init__(self, variants: dict[str, Callable[[], Any]]) -> None:
        self.variants = variants
        self.times: dict[str, list[float]] = {name: [] for name in variants}

    def take(self, seconds: float) -> dict[str, list[float]]:
        end, turn = time.perf_counter() + seconds, 0
        while turn < 12 or time.perf_counter() < end:
            marks = {}
            for name, run in self.variants.items():
                marks[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                marks[name][0].record()
                run()
                marks[name][1].record()
            torch.cuda.synchronize()
            if turn > 4:  # states, kernels and caches are there
                for name, (start, stop) in marks.items():
                    self.times[name].append(start.elapsed_time(stop))
            turn += 1
        os.environ.pop("TORCHREG_BACKEND", None)
        return self.times


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """The step in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay  # type: ignore[no-any-return]


def on_gpu(shapes: Shapes, optimizer: str, seconds: float) -> tuple[dict[str, Quartiles], float]:
    """Ratios to the stock fused step, and the GB/s that the step with Triton's kernels moves."""
    stock, swap_in, settings = OPTIMIZERS[optimizer]
    words = 7 if optimizer == "AdamW" else 5  # read and written for each weight
    plain, regularized = Weights(shapes).cuda(), Weights(shapes).cuda()
    reg = tr.Regularizer(regularized, tr.L1(LAMBDA))
    fused = stock(plain.parameters(), fused=True, **settings)
    loop = stock(plain.parameters(), **settings)
    prox = swap_in(regularized.parameters(), regularizer=reg, **settings)
    variants = {
        "fused": fused.step,
        "triton": forced("triton", prox.step),
        "torch": forced("torch", prox.step),
        "loop": lambda: users_loop(loop),
    }
    times = Turn(variants).take(seconds)
    prox.attachment.remove()
    capturable = {"capturable": True} if optimizer == "AdamW" else {}
    fused = stock(plain.parameters(), fused=True, **settings, **capturable)
    again = swap_in(regularized.parameters(), regularizer=reg, **settings, **capturable)
    graphs = {"fused": captured(fused.step), "in a graph": captured(forced("triton", again.step))}
    found = Turn(graphs).take(seconds)
    moved = 4 * words * sum(w.numel() for w in regularized.parameters())
    speed = moved / statistics.median(found["in a graph"]) / 1e6
    return {**ratios(times, "fused"), **ratios(found, "fused")}, speed


def copy_speed() -> float:
    """GB/s of a copy of 1 GiB, read and written."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    times = Turn({"copy": lambda: target.copy_(source)}).take(1.0)
    return 2 * 4 * source.numel() / statistics.median(times["copy"]) / 1e6


def main_on_gpu(networks: dict[str, Callable[[], Shapes]], seconds: float, file: Path | None) -> None:
    if not torch.cuda.is_available():
        print("not measured: no CUDA device")
        return
    print(tr.backends(), flush=True)
    copy, record = copy_speed(), []
    print(f"\ncopy: {copy:.0f} GB/s on {torch.cuda.get_device_name()}\n")
    columns = ["triton", "torch", "loop", "in a graph"]
    print(f"| step | optimizer | {' | '.join(columns)} | of a copy's speed |\n|---|---|---|---|---|---|---|")
    for network, shapes in networks.items():
        for optimizer in OPTIMIZERS:
            found, speed = on_gpu(shapes(), optimizer, seconds)
            texts = [cell(found, c) for c in columns]
            print(f"| {network} | {optimizer} | {' | '.join(texts)} | {speed / copy:.2f} |", flush=True)
            record.append({"row": [network, optimizer], "quartiles": found, "speed": speed, "copy": copy})
            if file:
                file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\ntorch {torch.__version__}")


def half_dead(threads: int, seconds: float) -> dict[str, Quartiles]:
    """A layer of which half the weights are dead, their moments faded, beside a dense one."""
    runs = {}
    for name in ("dense", "half dead"):
        model = Weights([(2000, 1000)])
        [w] = model.parameters()
        prox = tr.optim.ProxAdamW([w], lr=1e-3, regularizer=tr.Regularizer(model, tr.L1(LAMBDA)))
        prox.step()
        if name == "half dead":
            dead = torch.arange(w.numel()).view_as(w) % 2 == 0
            with torch.no_grad():
                for x in (w, w.grad, prox.state[w]["exp_avg"], prox.state[w]["exp_avg_sq"]):
                    x[dead] = 0.0 if x is w or x is w.grad else 1e-39
        for _ in range(20):
            prox.step()
        runs[name] = prox.step
    return ratios(take_turns(runs, seconds, threads), "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help="under two minutes: LeNet-300-100 and ResNet-50, few turns"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, help="of each row (20; short: 2)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write every ratio here")
    options = parser.parse_args()
    networks = dict(list(NETWORKS.items())[: 2 if options.short else 3])
    seconds = options.seconds or (2.0 if options.short else 20.0)
    if options.device == "cuda":
        main_on_gpu(networks, seconds, options.json)
        return
    record: list[dict[str, Any]] = []

    def row(cells: list[str], found: dict[str, Quartiles], columns: list[str]) -> None:
        print(f"| {' | '.join([*cells, *(cell(found, name) for name in columns)])} |", flush=True)
        record.append({"row": cells, "quartiles": found})
        if options.json:
            options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")

    print(tr.backends(), flush=True)
    print("\n| step | optimizer | threads | native | torch | user's loop |\n|---|---|---|---|---|---|", flush=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for network, shapes in networks.items():
            for optimizer in OPTIMIZERS:
                found = steps(shapes(), optimizer, threads, seconds)
                row([network, optimizer, str(threads)], found, ["native", "torch", "loop"])
    print("\n| a half-dead layer over a dense one | threads | ratio |\n|---|---|---|", flush=True)
    for threads in options.threads:
        torch.set_num_threads(threads)
        row(["2000×1000", str(threads)], half_dead(threads, seconds), ["half dead"])
    print(f"\ntorch {torch.__version__}")


if __name__ == "__main__":
    main()
