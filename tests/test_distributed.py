"""Weights that DDP, fully_shard and tensor parallelism divide among processes: the same zeros as in one process."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchreg as tr
from tests.models import SHARDS, attached
from torchreg._distributed import laid_out_as, unsharded
from torchreg.kernels import backend

pytestmark = pytest.mark.skipif(not SHARDS, reason="processes on gloo, with a fully_shard that runs on a CPU")

STEPS = 10


class Net(nn.Module):
    """fc1 6→4, fc2 4→3: three rows do not divide by two, and leave one process of four without any."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 4)
        self.fc2 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def pretrained() -> dict[str, Tensor]:
    """Where `toward` pulls."""
    return {name: torch.round(4 * w) / 4 for name, w in net().state_dict().items()}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    return x, y + x[:, :3]


def loss_of(model: nn.Module) -> Tensor:
    x, y = batch()
    return nn.functional.mse_loss(model(x), y)


# ---------------------------------------------------------------------- layouts


def _fsdp(model: Net, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.fc1, mesh=mesh)
    fully_shard(model, mesh=mesh)  # fc2 stays unsharded from the forward to the end of the backward


def _tensor_parallel(model: Net, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})


def fsdp(model: Net, world: int) -> nn.Module:
    from torch.distributed.tensor import init_device_mesh

    _fsdp(model, init_device_mesh("cpu", (world,)))
    return model


def tensor_parallel(model: Net, world: int) -> nn.Module:
    from torch.distributed.tensor import init_device_mesh

    _tensor_parallel(model, init_device_mesh("cpu", (world,)))
    return model


def both(model: Net, world: int) -> nn.Module:
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    _tensor_parallel(model, mesh["tensor"])
    _fsdp(model, mesh["data"])
    return model


def replicas(model: Net, world: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def hybrid(model: Net, world: int) -> nn.Module:
    from torch.distributed.tensor import init_device_mesh

    _fsdp(model, init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicas", "shards")))
    return model


def alone(model: Net, world: int) -> nn.Module:
    return model


# ---------------------------------------------------------------------- trainings


@dataclasses.dataclass(frozen=True)
class Training:
    """One training: a penalty and the way in which it acts."""

    penalty: tr.Penalty
    optimizer: Callable[[Any, tr.Regularizer], torch.optim.Optimizer] | None = None  # None: in the loss
    toward: bool = False
    late: bool = False  # the regularizer is built before the model is sharded

    def run(self, shard: Callable[[Net, int], nn.Module], world: int) -> dict[str, Tensor]:
        """The weights in the end, as wholes, and `reg()` of the first and the last step."""
        model = net()
        anchors = pretrained() if self.toward else None
        reg = tr.Regularizer(model, self.penalty, toward=anchors) if self.late else None
        wrapped = shard(model, world)
        reg = reg or tr.Regularizer(wrapped, self.penalty, toward=anchors)
        params = list(wrapped.parameters())
        optimizer = torch.optim.SGD(params, lr=0.05) if self.optimizer is None else self.optimizer(params, reg)
        totals = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(wrapped)
            total = reg()
            (loss + total).backward()
            optimizer.step()
            totals.append(total.detach())
        return {**whole(model), "first": totals[0], "last": totals[-1]}


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: unsharded(w.detach()).clone() for name, w in model.named_parameters()}


def sgd(params: Any, reg: tr.Regularizer) -> torch.optim.Optimizer:
    return tr.optim.ProxSGD(params, lr=0.05, momentum=0.9, regularizer=reg)


def adam(params: Any, reg: tr.Regularizer) -> torch.optim.Optimizer:
    return tr.optim.ProxAdam(params, lr=0.05, regularizer=reg)


def adamw(params: Any, reg: tr.Regularizer) -> torch.optim.Optimizer:
    return tr.optim.ProxAdamW(params, lr=0.05, regularizer=reg)


WEIGHTS = [0.5, 1.0, 2.0]
SOFT = {"l1": tr.L1(0.05), "elastic net": tr.ElasticNet(0.05, 0.01)}
GROUPED = {
    "rows": tr.GroupLasso(0.05),
    "columns": tr.GroupLasso(0.05, tr.Columns()),
    "sparse columns": tr.SparseGroupLasso(0.02, 0.03, tr.Columns()),
}
TRAININGS = {
    **{f"{name}, {make.__name__}": Training(p, make) for name, p in SOFT.items() for make in (sgd, adam, adamw)},
    **{f"{name}, adam": Training(p, adam) for name, p in GROUPED.items()},
    **{f"{name}, sgd": Training(p.scaled(4), sgd) for name, p in GROUPED.items()},
    **{f"{name} in the loss": Training(p) for name, p in (SOFT | GROUPED).items()},
    "l1, SGD": Training(tr.L1(0.05), attached(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)),
    "l1, Adagrad": Training(tr.L1(0.05), attached(torch.optim.Adagrad, lr=0.2)),
    "l1, RMSprop": Training(tr.L1(0.05), attached(torch.optim.RMSprop, lr=0.03, centered=True)),
    "l1, NAdam": Training(tr.L1(0.05), attached(torch.optim.NAdam, lr=0.05)),
    "columns, Adadelta": Training(tr.GroupLasso(0.05, tr.Columns()), attached(torch.optim.Adadelta, lr=1.0)),
    "reweighted, adam": Training(tr.Reweighted(tr.MCP(0.05)), adam),
    "toward, adam": Training(tr.L1(0.05), adam, toward=True),
    "toward, columns, adam": Training(tr.GroupLasso(0.05, tr.Columns()), adam, toward=True),
    "toward in the loss": Training(tr.L2(0.05), toward=True),
    "before sharding, sgd": Training(tr.L1(0.05), sgd, late=True),
    "before sharding, toward, adam": Training(tr.L1(0.05), adam, toward=True, late=True),
    "before sharding, in the loss": Training(tr.ElasticNet(0.05, 0.01), late=True),
}


# ---------------------------------------------------------------------- all that reads weights

Shard = Callable[[Net, int], nn.Module]


def trained(shard: Shard, world: int, penalty: tr.Penalty, steps: int = 10) -> tuple[Any, ...]:
    model = shard(net(), world)
    reg = tr.Regularizer(model, penalty)
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model, reg, optimizer


def counts(shard: Shard, world: int) -> Any:
    model, reg, _ = trained(shard, world, tr.L1(0.2))
    with torch.no_grad():
        model(batch()[0])  # leaves the outermost weights whole
    return tr.sparsity(reg).to_dict(), tr.sparsity(model).to_dict(), reg.explain(), [w.item() for w in (reg(),)]


def certificates(shard: Shard, world: int) -> Any:
    found = []
    for penalty in (tr.L1(0.2), tr.GroupLasso(0.1, tr.Columns()), tr.SparseGroupLasso(0.1, 0.1)):
        model, reg, _ = trained(shard, world, penalty)
        before = whole(model)
        with torch.no_grad():
            model(batch()[0])

        def loss(model: nn.Module = model) -> Tensor:
            return loss_of(model)

        certified = tr.stationarity(reg, loss)
        found += [*tr.lambda_max(reg, loss).values(), certified.total, certified.relative, certified.unpenalized]
        assert all(torch.equal(w, before[name]) for name, w in whole(model).items())
    return found


def gradients(shard: Shard, world: int) -> Any:
    """Of `add_gradient_`, beside a loss of which every process has a part."""
    model = shard(net(), world)
    reg = tr.Regularizer(model, {"fc1.weight": tr.ElasticNet(0.1, 0.05), "fc2.weight": tr.GroupLasso(0.1)})
    loss_of(model).backward()
    value = reg.add_gradient_()
    parts = reg.components()
    grads = {name: unsharded(w.grad) for name, w in model.named_parameters()}
    return value, sum(parts.values()), {name.removeprefix("module."): grad for name, grad in grads.items()}


def proxes(shard: Shard, world: int) -> Any:
    model = shard(net(), world)
    found = {}
    for penalty in (tr.L1(0.2), tr.MCP(0.2), tr.GroupLasso(0.05), tr.SparseGroupLasso(0.02, 0.05, tr.Columns())):
        reg = tr.Regularizer(model, penalty)
        for name, w in reg.named_parameters():
            step = w.detach().abs() + 0.5
            for kind, s in {"number": 0.5, "tensor": step, "row": torch.full((w.shape[-1],), 0.5)}.items():
                if kind != "row" or penalty.separable:
                    found[f"{penalty} {name} {kind}"] = unsharded(penalty.prox(w.detach(), s))
        reg.prox_(0.1)
    weighted = tr.GroupLasso(0.05, tr.Columns(), group_weights=[0.0, 1.0, 2.0, 4.0])
    weighted_rows = tr.GroupLasso(0.05, group_weights=[0.0, 1.0, 3.0])
    w = dict(tr.Regularizer(model, tr.L1(0.0)).named_parameters())["fc2.weight"].detach()
    for penalty in (weighted, weighted_rows):
        for s in (0.5, w.abs() + 0.5):
            found[f"{penalty} {s}"] = unsharded(penalty.prox(w, s))
        found[f"{penalty}"] = penalty(w)
    for scale in (1e-200, 1e200):  # whose squares are 0 and inf
        for step in (0.5, w.abs() + 0.5):
            found[f"{scale} {step}"] = unsharded(tr.GroupLasso(0.05, tr.Columns()).prox(scale * w, step))
    broken = unsharded(w).clone()
    broken[2, 1] = torch.nan  # in one process's part
    broken = laid_out_as(broken, w)
    for step in (0.5, w.abs() + 0.5):
        new = unsharded(tr.GroupLasso(0.05, tr.Columns()).prox(broken, step))
        found[f"nan {step}"] = new.isnan().double()
    return list(found.values()), whole(model)


def refits(shard: Shard, world: int) -> Any:
    model, reg, optimizer = trained(shard, world, tr.L1(0.2))
    optimizer.attachment.remove()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    norms = []
    with reg.disabled(), tr.freeze_zeros(reg, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            norms.append(unsharded(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
    return norms, whole(model)


def targets(shard: Shard, world: int) -> Any:
    model = shard(net(), world)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.02, regularizer=reg)
    target = tr.TargetSparsity(reg, 0.5, total_steps=50)
    for _ in range(50):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        target.step()
    return target.sparsity, target.factor, whole(model)


def narrow(shard: Shard, world: int) -> Any:
    """bfloat16 weights."""
    model = shard(net().bfloat16(), world)
    reg = tr.Regularizer(model, tr.L1(0.05))
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.05, regularizer=reg, rounding=tr.optim.NearestRounding())
    x, y = (part.bfloat16() for part in batch())
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return whole(model), reg()


def in_one_pass(shard: Shard, world: int) -> bool:
    """The native library, where there is one, takes the step of sharded weights too."""
    *_, optimizer = trained(shard, world, tr.L1(0.2), steps=3)
    return (optimizer._executors[0]._tables is not None) == (backend.native() is not None)


PROBES = {probe.__name__: probe for probe in (counts, certificates, gradients, proxes, refits, targets, in_one_pass)}
JOBS: dict[str, Callable[[Shard, int], Any]] = {name: training.run for name, training in TRAININGS.items()} | PROBES
JOBS[narrow.__name__] = narrow  # where no sum is divided, which would round otherwise
Plan = dict[Shard, list[str]]
PLANS: dict[int, Plan] = {
    2: {
        replicas: ["l1, sgd", "l1 in the loss", "before sharding, toward, adam"],
        fsdp: [
            *("l1, sgd", "l1, adamw", "elastic net, adam", "l1, Adagrad", "reweighted, adam"),
            *("rows, adam", "columns, sgd", "columns, adam", "sparse columns, adam"),
            *("columns in the loss", "before sharding, in the loss", "before sharding, toward, adam"),
            *PROBES,
            "narrow",
        ],
        tensor_parallel: ["l1, sgd", "rows, adam", "columns, adam", "rows in the loss", "toward, adam", *PROBES],
    },
    4: {fsdp: ["columns, sgd", "l1, adam"], both: ["rows, adam", "toward, adam"], hybrid: ["columns, adam"]},
}
"""By the number of processes, what is done on which layout."""
ALL: dict[int, Plan] = {
    2: {replicas: [*TRAININGS], fsdp: [*JOBS], tensor_parallel: [*TRAININGS, *PROBES]},
    4: {fsdp: [*JOBS], both: [*TRAININGS], hybrid: [*TRAININGS]},
}


# ---------------------------------------------------------------------- what has no counterpart in one process


def exchanges(world: int) -> dict[str, list[int]]:
    """How often a step's prox, a value and a gradient exchange something, for one weight."""
    from torch.distributed.tensor.debug import CommDebugMode

    found = {}
    for name, penalty in {"l1": tr.L1(0.1), **GROUPED}.items():
        model = fsdp(net(), world)
        reg = tr.Regularizer(model, penalty, include="fc1.weight")
        w = model.fc1.weight.detach()
        steps = [0.1, w.abs() + 0.1, w.abs() + 10.0]
        numbers = []
        for step in steps:
            with CommDebugMode() as mode:
                penalty.prox_(w.clone(), step)
            numbers.append(mode.get_total_counts())
        with CommDebugMode() as mode:
            total = reg()
        numbers.append(mode.get_total_counts())
        with CommDebugMode() as mode:
            total.backward()
        found[name] = [*numbers, mode.get_total_counts()]
    return found


class Spread(tr.L2):
    """A penalty of one's own that is not a sum over single weights."""

    separable = False


class Lonely(Net):
    """`fc3` is in no forward pass: the penalty alone uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc3 = nn.Linear(3, 3, dtype=torch.float64)


def lonely(by_gradient: bool, world: int) -> Any:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Lonely().double(), find_unused_parameters=True)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model)
        if by_gradient:
            loss.backward()
            reg.add_gradient_()
        else:
            (loss + reg()).backward()
        optimizer.step()
    return whole(model)


def refusals(world: int) -> dict[str, str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = fsdp(net(), world)
    reg = tr.Regularizer(model, tr.L1(0.1))
    tried: dict[str, Callable[[], Any]] = {
        "flat": lambda: tr.Regularizer(FullyShardedDataParallel(net(), device_id=torch.device("cpu")), tr.L1(0.1)),
        "gap": lambda: tr.duality_gap(reg, lambda: loss_of(model)),
        "fista": lambda: tr.optim.FISTA(model.parameters(), regularizer=reg),
        "own": tr.Regularizer(model, Spread(0.1)),
        "differentiable": lambda: tr.optim.ProxSGD(model.parameters(), lr=0.1, differentiable=True, regularizer=reg),
        "lonely": lambda: lonely(False, world),
    }
    found = {}
    for name, attempt in tried.items():
        try:
            attempt()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


# ---------------------------------------------------------------------- distributed checkpoints

SAVED = {"sgd": sgd, "adam": adam}


def resumed(make: Any, folder: Path, world: int, save: bool) -> dict[str, Tensor]:
    """Trains, saves, and trains on; or loads what other processes, and another number of them, have saved."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = fsdp(net(), world)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = make(model.parameters(), reg)

    def train() -> None:
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    if save:
        reg["l1"].factor = 0.5
        train()
    weights, state = get_state_dict(model, optimizer)
    everything = {"model": weights, "optimizer": state, "regularizer": reg.state_dict()}
    if save:
        dcp.save(everything, checkpoint_id=folder)
    else:
        dcp.load(everything, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        reg.load_state_dict(everything["regularizer"])
    train()
    return whole(model)


# ---------------------------------------------------------------------- processes


def work(rank: int, world: int, folder: Path, plan: Plan) -> None:
    """What each process does. One that waits for another in vain is an error after a minute."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting.{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=1),
    )
    found: dict[Any, Any] = {}
    for shard, names in plan.items():
        for name in names:
            found[shard.__name__, name] = JOBS[name](shard, world)
    for name, make in SAVED.items():
        found["resumed", name] = resumed(make, folder / name, world, save=world == 4)
    if world == 2:
        found["exchanges"], found["lonely"] = exchanges(world), lonely(True, world)
        found["refusals"] = refusals(world)
    torch.save(found, folder / f"found.{world}.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


Results = dict[int, list[dict[Any, Any]]]
"""By the number of processes, what each of them has found."""


def spawn(folder: Path, plans: dict[int, Plan]) -> Results:
    # Each process is forked from one that has imported all: the imports take longer than the work.
    multiprocessing.set_forkserver_preload([__name__, "torch.distributed.fsdp", "torch._dynamo"])
    for world in (4, 2):  # two go on with what four have saved
        torch.multiprocessing.start_processes(work, (world, folder, plans[world]), world, start_method="forkserver")
    return {world: [torch.load(folder / f"found.{world}.{rank}.pt") for rank in range(world)] for world in plans}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return spawn(tmp_path_factory.mktemp("shards"), PLANS)


@functools.cache
def expected(name: str) -> Any:
    """The same in one process."""
    return JOBS[name](alone, 1)


def agree(found: Any, wanted: Any) -> bool:
    """Equal but for the rounding of sums, and the same zeros exactly."""
    if isinstance(wanted, Tensor):
        return torch.equal(found == 0, wanted == 0) and torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(agree(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, (list, tuple)):
        return all(agree(a, b) for a, b in zip(found, wanted, strict=True))
    return found == (pytest.approx(wanted, rel=1e-9) if isinstance(wanted, float) else wanted)


CASES = [
    (world, shard.__name__, name) for world, plan in PLANS.items() for shard, names in plan.items() for name in names
]


@pytest.mark.parametrize(("world", "layout", "name"), [case for case in CASES if case[2] in TRAININGS])
def test_a_sharded_training_ends_with_the_weights_and_the_zeros_of_one_process(results, world, layout, name):
    wanted = expected(name)
    if "loss" not in name:
        assert sum((w == pretrained()[k] if "toward" in name else w == 0).sum() for k, w in weights(wanted)) > 1
    for found in results[world]:
        assert agree(found[layout, name], wanted)


@pytest.mark.parametrize(("world", "layout", "name"), [case for case in CASES if case[2] not in TRAININGS])
def test_what_reads_sharded_weights_finds_what_one_process_finds(results, world, layout, name):
    for found in results[world]:
        assert agree(found[layout, name], expected(name))


@pytest.mark.slow
def test_every_penalty_optimizer_and_layout_agrees_with_one_process(tmp_path):
    for world, found in spawn(tmp_path, ALL).items():
        for shard, names in ALL[world].items():
            for name in names:
                assert all(agree(one[shard.__name__, name], expected(name)) for one in found), (world, shard, name)


def weights(found: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, w) for name, w in found.items() if name.endswith("weight")]


def test_groups_across_processes_exchange_one_number_a_group(results):
    number, varying, other, value, gradient = zip(*results[2][0]["exchanges"].values(), strict=True)
    names = list(results[2][0]["exchanges"])
    assert names == ["l1", "rows", "columns", "sparse columns"]
    assert number == (0, 0, 1, 1)
    assert varying == other == (0, 0, 13, 13), "one an iteration, whatever the weights"
    assert value == (1, 1, 2, 2)
    assert gradient == (0, 0, 0, 0)


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_four_processes_goes_on_in_two(results, name):
    [uninterrupted, *_], [resumed, *_] = results[4], results[2]
    assert agree(resumed["resumed", name], uninterrupted["resumed", name])
    assert any((w == 0).any() for _, w in weights(resumed["resumed", name]))


def test_a_parameter_that_the_penalty_alone_uses_trains_under_ddp_by_add_gradient_(results):
    torch.manual_seed(0)
    w = Lonely().double().fc3.weight.detach()
    for _ in range(3):
        w = w - 0.1 * 0.1 * w.sign()
    for found in results[2]:
        assert torch.allclose(found["lonely"]["module.fc3.weight"], w, rtol=1e-12)
        assert "ready only once" in found["refusals"]["lonely"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("flat", "ValueError: FullyShardedDataParallel flattens weights"),
        ("gap", "ValueError: fc1.weight is sharded"),
        ("fista", "ValueError: fc1.weight is sharded"),
        ("own", "NotImplementedError: Spread is not a sum over single weights"),
        ("differentiable", "ValueError: fc1.weight is sharded"),
    ],
)
def test_what_cannot_be_right_on_shards_is_an_error(results, name, error):
    for found in results[2]:
        assert found["refusals"][name].startswith(error)


# ---------------------------------------------------------------------- in one process


@pytest.mark.parametrize("make", [sgd, adam, adamw])
def test_a_checkpoint_of_a_fresh_optimizer_moves_no_weight(make):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = net()
    reg = tr.Regularizer(model, tr.L1(10.0))
    get_state_dict(model, make(model.parameters(), reg))
    assert all(torch.equal(w, before) for w, before in zip(model.parameters(), net().parameters(), strict=True))


def test_a_checkpoint_of_a_fresh_optimizer_leaves_its_momentum_at_rest():
    from torch.distributed.checkpoint.state_dict import get_state_dict

    runs = []
    for saves in (False, True):
        model = net()
        reg = tr.Regularizer(model, tr.L1(0.05))
        optimizer = sgd(model.parameters(), reg)
        if saves:
            get_state_dict(model, optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        runs.append(whole(model))
    assert agree(runs[1], runs[0])


def test_a_first_step_at_lr_0_counts_where_it_has_a_gradient():
    model = nn.Linear(2, 1, bias=False)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.0, momentum=0.5, regularizer=reg)
    model.weight.grad = torch.tensor([[0.0, 1.0]])
    optimizer.step()
    assert optimizer.state[model.weight]["unit_momentum"] == 1.0
