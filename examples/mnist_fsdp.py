"""An MLP on MNIST, its weights sharded over several processes, trained to exact zeros; and a checkpoint for any number.

    torchrun --nproc-per-node 2 examples/mnist_fsdp.py       # gloo on CPUs, NCCL with a GPU for each process

Each process takes its part of every batch. The penalty is that of the whole network, and so are the zeros, the counts
and the dashboard: `python -m torchreg dashboard runs`. Run it again, with as many processes as you like, and it goes on
after the last epoch that it has saved; `--epochs 16` trains for longer.
"""

import argparse
import os
import time
from pathlib import Path

import mnist_data
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import torchreg as tr

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--warmup-epochs", type=float, default=2, help="λ rises over these (default: %(default)s)")
parser.add_argument("--l1", type=float, default=3e-4, help="λ (default: %(default)s)")
parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=128, help="of all processes together (default: %(default)s)")
parser.add_argument("--data", help="folder of MNIST (default: TORCHREG_DATA, else ~/.cache/torchreg)")
parser.add_argument("--out", type=Path, default=Path("runs/fsdp"), help="log and checkpoint (default: %(default)s)")
args = parser.parse_args()

torch.set_flush_denormal(True)  # on dead weights' moments a CPU is several times slower
on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
if on_gpus:
    torch.cuda.set_device(device)
# Checkpoints also exchange what lies on the CPU.
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
if rank > 0:
    dist.barrier()  # the first process downloads, the others read
*data, source = mnist_data.load(args.data)
if rank == 0:
    dist.barrier()
    print(f"{source}; {processes} processes on {device.type}")
x_train, y_train, x_test, y_test = (x.to(device) for x in data)
batches = len(x_train) // args.batch_size
share = args.batch_size // processes

torch.manual_seed(0)  # the same weights everywhere, of which each process then keeps its shard
model = nn.Sequential(nn.Linear(x_train.shape[1], 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
model.to(device)
mesh = init_device_mesh(device.type, (processes,))
for layer in [module for module in model if isinstance(module, nn.Linear)]:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

reg = tr.Regularizer(model, tr.L1(args.l1))
optimizer = tr.optim.ProxAdam(model.parameters(), lr=args.lr, regularizer=reg)

epochs, checkpoint = 0, args.out / "checkpoint"
weights, state = get_state_dict(model, optimizer)
if (checkpoint / ".metadata").exists():
    saved = {"model": weights, "optimizer": state, "regularizer": reg.state_dict(), "epochs": 0}
    dcp.load(saved, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    reg.load_state_dict(saved["regularizer"])
    epochs = saved["epochs"]

monitor = tr.TensorBoardMonitor(args.out, reg, every=100)  # in every process: the first one writes
for epoch in range(epochs, args.epochs):
    start = time.perf_counter()
    order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(epoch)).to(device)
    for i in range(batches):
        step = epoch * batches + i
        reg["l1"].factor = min(1.0, step / (args.warmup_epochs * batches))
        batch = order[i * args.batch_size + rank * share :][:share]
        loss = nn.functional.cross_entropy(model(x_train[batch]), y_train[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(step, loss=loss)
    with torch.no_grad():
        right = (model(x_test[rank::processes]).argmax(1) == y_test[rank::processes]).sum()
    dist.all_reduce(right)
    zeros = tr.sparsity(reg)  # of the whole weights: every process takes part, as in reg() and explain()
    if rank == 0:
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: accuracy {right / len(x_test):.2%}, zeros {zeros.fraction:.2%}, {seconds:.0f} s")
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "regularizer": reg.state_dict(), "epochs": epoch + 1}
    dcp.save(saved, checkpoint_id=checkpoint)
monitor.close()
if rank == 0:
    print(f"\n{zeros}" if args.epochs > epochs else f"{checkpoint} has {epochs} epochs; ask for more")
dist.destroy_process_group()
