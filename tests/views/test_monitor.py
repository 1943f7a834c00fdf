"""TensorBoardMonitor: what TensorBoard itself reads of a run, through crashes, full disks and hostile models."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchreg as tr
from tests.models import Lazy, batch, mlp

pytest.importorskip("tensorboard")

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import DEFAULT_SIZE_GUIDANCE, EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.data.grpc_provider import GrpcDataProvider, make_stub
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata
from torch.utils.tensorboard import SummaryWriter

from torchreg.views.measurement import Gauge
from torchreg.views.tensorboard import event_file
from torchreg.views.tensorboard import pictures as drawing

# ---------------------------------------------------------------------- what TensorBoard reads


def reader(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance=dict.fromkeys(DEFAULT_SIZE_GUIDANCE, 0)).Reload()


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar by its step, by its tag; a step that stands twice is an error."""
    found = {}
    read = reader(folder)
    for tag in read.Tags()["scalars"]:
        found[tag] = once(tag, [(point.step, point.value) for point in read.Scalars(tag)])
    return found


def served(folder: Path) -> dict[str, dict[int, float]]:
    """The same as TensorBoard's own data server, another program, gives it out."""
    data_server = pytest.importorskip("tensorboard_data_server")
    grpc = pytest.importorskip("grpc")
    port = folder.parent / f"{folder.name}.port"
    options = [
        f"--logdir={folder}",
        f"--port-file={port}",
        "--reload=once",
        "--port=0",
        "--samples-per-plugin=scalars=all",
    ]
    with subprocess.Popen([data_server.server_binary(), *options], stdin=subprocess.PIPE) as server:
        try:
            address = until(lambda: port.exists() and port.read_text().strip())
            with grpc.insecure_channel(f"localhost:{address}") as channel:
                source = GrpcDataProvider("", make_stub(channel))
                request = {"experiment_id": "", "plugin_name": "scalars", "downsample": 100_000}
                [tags] = until(lambda: source.read_scalars(RequestContext(), **request)).values()  # one run
        finally:
            port.unlink(missing_ok=True)
            server.kill()
    return {tag: once(tag, [(point.step, point.value) for point in points]) for tag, points in tags.items()}


def until(found: Callable[[], Any]) -> Any:
    """What `found` gives, once there is something."""
    deadline = time.monotonic() + 20
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


def once(tag: str, points: list[tuple[int, float]]) -> dict[int, float]:
    assert len(dict(points)) == len(points), f"{tag} has a step twice"
    return dict(points)


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """The last image of every tag, by its pixels."""
    read = reader(folder)
    found = {}
    for tag in read.Tags()["images"]:
        last = read.Images(tag)[-1]
        image = Image.open(io.BytesIO(last.encoded_image_string))
        assert (image.format, image.size) == ("PNG", (last.width, last.height))
        found[tag] = np.asarray(image)
    return found


def texts(folder: Path) -> dict[str, str]:
    read = reader(folder)
    return {
        tag.removesuffix("/text_summary"): read.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in read.Tags()["tensors"]
        if tag.endswith("/text_summary")
    }


def layout_of(folder: Path) -> layout_pb2.Layout:
    [content] = reader(folder).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    return layout_pb2.Layout.FromString(content)


def charts(folder: Path) -> list[layout_pb2.Chart]:
    return [chart for category in layout_of(folder).category for chart in category.chart]


# ---------------------------------------------------------------------- models


def net(*sizes: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(sizes)))


def l1(model: nn.Module) -> tr.Regularizer:
    return tr.Regularizer(model, tr.L1(1e-3))


def set_weights(w: Tensor, values: Any) -> None:
    with torch.no_grad():
        w.copy_(torch.as_tensor(np.asarray(values)))


@pytest.fixture
def warned() -> Iterator[Any]:
    """Gives the warnings so far."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in caught]


class Clock:
    """A clock that moves when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "thread_time", lambda: self.now)


# ---------------------------------------------------------------------- what is written


def test_every_number_of_measure_stands_under_its_tag_at_its_step(tmp_path):
    model = mlp()
    reg = tr.Regularizer(model, {"fc1.weight": tr.L1(1e-2), "fc2.weight": tr.ElasticNet(l1=1e-2, l2=1e-3)})
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=1e-2, regularizer=reg)
    x, y = batch()
    expected: dict[int, dict[str, float]] = {}
    with tr.TensorBoardMonitor(tmp_path, reg, budget=None) as monitor:
        for step in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            expected[step] = tr.measure(reg)
            monitor.log(step)
    found = scalars(tmp_path)
    for tag in expected[0]:
        assert found[tag] == pytest.approx({step: numbers[tag] for step, numbers in expected.items()}), tag
    assert set(found) == {*expected[0], "schedule/lr"}


GIVEN = {
    "integer": (3, 3.0),
    "numpy": (np.float64(0.25), 0.25),
    "array": (np.array([0.5]), 0.5),
    "tensor": (torch.tensor(0.75), 0.75),
    "graph": (torch.tensor([1.5], requires_grad=True) * 2, 3.0),
    "bf16": (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    "double": (torch.tensor(0.1, dtype=torch.float64), np.float32(0.1)),
    "count": (torch.tensor(7), 7.0),
    "boolean": (torch.tensor(True), 1.0),
    "infinite": (math.inf, math.inf),
    "val/loss": (2.0, 2.0),
}


@pytest.mark.parametrize("budget", [None, 0.0], ids=["measured", "not measured"])
def test_what_is_given_is_written_as_it_is(tmp_path, budget):
    values = {key: value for key, (value, _) in GIVEN.items()}
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=budget) as monitor:
        for step in range(3):
            monitor.log(step, loss=0.5, accuracy=torch.tensor(0.25), **values)
    found = scalars(tmp_path)
    for key, (_, value) in GIVEN.items():
        assert found[key if "/" in key else f"overview/{key}"] == {0: value, 1: value, 2: value}
    assert found["overview/loss"] == {0: 0.5, 1: 0.5, 2: 0.5}
    assert found["overview/accuracy"] == {0: 0.25, 1: 0.25, 2: 0.25}


def test_what_is_not_finite_is_written_too(tmp_path):
    with tr.TensorBoardMonitor(tmp_path, l1(mlp())) as monitor:
        monitor.log(0, loss=torch.tensor(math.nan))
    assert math.isnan(scalars(tmp_path)["overview/loss"][0])


def test_the_parts_of_a_regularized_loss_have_tags_of_their_own(tmp_path):
    reg = l1(model := mlp())
    criterion = tr.RegularizedLoss(nn.MSELoss(), reg)
    x, y = batch()
    total = criterion(model(x), y)
    with tr.TensorBoardMonitor(tmp_path, reg) as monitor:
        monitor.log(0, loss=criterion.last)
    found = scalars(tmp_path)
    assert found["overview/objective"][0] == pytest.approx(total.item())
    assert found["overview/loss_data"][0] == pytest.approx(nn.functional.mse_loss(model(x), y).item())
    assert found["overview/objective"][0] - found["overview/loss_data"][0] == pytest.approx(reg().item(), rel=1e-3)


def test_a_certificate_has_tags_of_its_own(tmp_path):
    reg = l1(model := mlp())
    x, y = batch()
    certificate = tr.stationarity(reg, lambda: nn.functional.mse_loss(model(x), y))
    with tr.TensorBoardMonitor(tmp_path, reg) as monitor:
        monitor.log(0, certificate=certificate)
    found = scalars(tmp_path)
    for name in ("total", "relative", "unpenalized"):
        assert found[f"stationarity/{name}"][0] == pytest.approx(getattr(certificate, name))
    assert found["stationarity/term.l1"][0] == pytest.approx(certificate.by_term["l1"])


def test_a_certificate_of_other_terms_is_one_warning_and_nothing_else_is_lost(tmp_path, warned):
    model = mlp()
    x, y = batch()
    certificate = tr.stationarity(tr.Regularizer(model, tr.L2(0.1)), lambda: nn.functional.mse_loss(model(x), y))
    with tr.TensorBoardMonitor(tmp_path, l1(model), budget=None) as monitor:
        for step in range(3):
            monitor.log(step, loss=1.0, certificate=certificate, extra=2.0)
    [message] = warned()
    assert "certificate is left out" in message
    found = scalars(tmp_path)
    assert len(found["overview/loss"]) == len(found["overview/extra"]) == len(found["overview/sparsity"]) == 3


def test_learning_rates_come_from_the_optimizer_or_from_the_caller(tmp_path):
    model = mlp()
    reg = l1(model)
    groups = [
        {"params": model.fc1.parameters(), "lr": 0.5},
        {"params": [*model.norm.parameters(), *model.fc2.parameters()]},
    ]
    optimizer = tr.optim.ProxSGD(groups, lr=0.25, regularizer=reg)
    with tr.TensorBoardMonitor(tmp_path, reg) as monitor:
        monitor.log(0)
        optimizer.param_groups[0]["lr"] = 0.25  # equal now, and still two curves
        monitor.log(1)
        monitor.log(2, lr=0.125)
        monitor.log(3, lr=[1.0, 2.0])
    found = scalars(tmp_path)
    assert found["schedule/lr.0"] == {0: 0.5, 1: 0.25, 3: 1.0}
    assert found["schedule/lr.1"] == {0: 0.25, 1: 0.25, 3: 2.0}
    assert found["schedule/lr"] == {2: 0.125}


class Odd:
    def __float__(self) -> float:
        raise OSError("no")


@pytest.mark.parametrize(
    "value",
    ["a text", torch.ones(3), torch.ones(0), 1j, torch.tensor(1j), torch.ones((), device="meta"), {}, Odd(), 10**400],
)
def test_a_value_of_no_use_is_one_warning_and_nothing_else_is_lost(tmp_path, value, warned):
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=None) as monitor:
        for step in range(3):
            monitor.log(step, loss=1.0, odd=value, extra=2.0, nothing=None)
    [message] = warned()
    assert str(tmp_path) in message
    assert "overview/odd" in message
    found = scalars(tmp_path)
    assert len(found["overview/loss"]) == len(found["overview/extra"]) == len(found["overview/sparsity"]) == 3
    assert not {"overview/odd", "overview/nothing"} & set(found)


def test_every_writes_once_in_so_many_steps_and_loses_no_last_value(tmp_path):
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), every=10, budget=None) as monitor:
        for step in [*range(3, 35), 57, 58, 91]:
            epoch_ends = step in (19, 29, 34, 58)
            monitor.log(step, loss=step, accuracy=step / 100 if epoch_ends else None)
    found = scalars(tmp_path)
    assert list(found["overview/loss"]) == [3, 10, 20, 30, 57, 91]
    assert list(found["overview/sparsity"]) == [3, 10, 20, 30, 57, 91]
    assert list(found["overview/accuracy"]) == [19, 29, 34, 58]
    assert found["overview/loss"] == {step: step for step in found["overview/loss"]}


def test_what_came_last_is_written_at_the_end_as_it_was(tmp_path):
    running = torch.tensor(1.0)
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), every=100) as monitor:
        for step in range(8):
            monitor.log(step, loss=running, accuracy=None if step > 5 else step)
            running += 1
    found = scalars(tmp_path)
    assert found["overview/loss"] == {0: 1, 7: 8}  # and not 9: the sum went on
    assert found["overview/accuracy"] == {0: 0, 5: 5}
    assert list(found["overview/sparsity"]) == [0, 7]


def test_what_is_logged_in_several_calls_at_a_step_stands_there_once(tmp_path):
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=None) as monitor:
        for step in range(3):
            monitor.log(step, loss=step)
            monitor.log(step, accuracy=0.5)
            monitor.log(step, loss=100.0)
    found = scalars(tmp_path)
    assert found["overview/loss"] == {0: 0, 1: 1, 2: 2}
    assert found["overview/accuracy"] == {0: 0.5, 1: 0.5, 2: 0.5}
    assert found["overview/sparsity"] == {0: 0, 1: 0, 2: 0}


def test_a_slow_measurement_keeps_to_its_share_of_the_time(tmp_path, monkeypatch):
    clock, busy, read = Clock(monkeypatch), 0.0, Gauge.read

    def slow(self: Gauge, *args: Any) -> Any:
        nonlocal busy
        busy += 2.0
        clock.now += 2.0
        return read(self, *args)

    monkeypatch.setattr(Gauge, "read", slow)
    monitor = tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=0.01)
    for step in range(4000):
        monitor.log(step, loss=0.0)
        clock.now += 0.5
        assert busy <= 2.0 + 0.005 * clock.now  # the first is free; the other half is for pictures
    assert busy >= 0.9 * 0.005 * clock.now
    monitor.close()
    found = scalars(tmp_path)
    assert len(found["overview/loss"]) == 4000
    assert len(found["overview/sparsity"]) == busy / 2
    assert {0, 3999} <= set(found["overview/sparsity"])


def test_slow_pictures_keep_to_their_share_of_the_time(tmp_path, monkeypatch):
    clock, busy = Clock(monkeypatch), 0.0

    def slow(*_: Any) -> Any:
        nonlocal busy
        busy += 4.0
        clock.now += 4.0
        return iter(())

    monkeypatch.setattr(drawing, "pictures", slow)
    monitor = tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=0.01)
    for step in range(1000):
        monitor.log(step)
        clock.now += 2.0
        assert busy <= 4.0 + 0.005 * clock.now
    assert busy / 4 >= 2


@pytest.mark.parametrize(
    ("images_every", "steps"),
    [(4, [0, 4, 8, 12, 13]), (0, []), (100, [0, 13]), (None, [0, 1, 3, 5, 8, 11, 13])],
)
def test_pictures_come_at_the_first_and_the_last_step_and_as_often_as_asked(tmp_path, images_every, steps):
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), images_every=images_every, budget=None) as monitor:
        for step in range(14):
            monitor.log(step)
    read = reader(tmp_path)
    tags = read.Tags()["images"]
    assert bool(tags) == bool(steps)
    for tag in tags:
        assert [image.step for image in read.Images(tag)] == steps
    for tag in read.Tags()["histograms"]:
        assert [histogram.step for histogram in read.Histograms(tag)] == steps


def test_closing_twice_does_no_harm_and_logging_after_it_is_one_warning(tmp_path, warned):
    monitor = tr.TensorBoardMonitor(tmp_path, l1(mlp()))
    monitor.log(0, loss=1.0)
    monitor.close()
    before = scalars(tmp_path)
    monitor.close()
    monitor.log(1, loss=1.0)
    monitor.log(2, loss=1.0)
    monitor.flush()
    [message] = warned()
    assert "closed" in message
    assert scalars(tmp_path) == before


def test_nothing_is_made_where_nothing_is_logged(tmp_path):
    with tr.TensorBoardMonitor(tmp_path / "run", l1(mlp())):
        pass
    assert not (tmp_path / "run").exists()


def test_a_summary_writer_is_written_into_and_stays_open(tmp_path):
    writer = SummaryWriter(tmp_path)
    with tr.TensorBoardMonitor(writer, l1(mlp()), budget=None) as monitor:
        for step in (0, 1, 2):
            monitor.log(step, loss=step)
        with pytest.warns(UserWarning, match="replaced"):
            monitor.log(1, loss=-1)
    writer.add_scalar("own", 1.0, 3)
    writer.close()
    found = scalars(tmp_path)
    assert found["overview/loss"] == {0: 0, 1: -1}
    assert list(found["overview/sparsity"]) == [0, 1]
    assert found["own"] == {3: 1.0}
    assert {"about/1_summary", "about/2_regularizer", "about/3_glossary"} == set(texts(tmp_path))


# ---------------------------------------------------------------------- crashes

TRAINING = """
import itertools, os, random, signal, sys, time
from pathlib import Path

import torch

import torchreg as tr

folder, kills = Path(sys.argv[1]), 5
checkpoint = folder / "checkpoint.pt"


def train(attempt):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    reg = tr.Regularizer(model, tr.L1(1e-3))
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
    with tr.TensorBoardMonitor(folder / "run", reg, budget=None, images_every=20) as monitor:
        # Only the last attempt comes to an end: the others are killed, however slow the machine.
        for step in itertools.count(start) if attempt < kills else range(start, start + 50):
            monitor.log(step, loss=step, attempt=attempt)
            if step % 10 == 9:
                torch.save({"step": step + 1, "model": model.state_dict()}, folder / "new.pt")
                os.replace(folder / "new.pt", checkpoint)


with tr.TensorBoardMonitor(folder / "imports", tr.Regularizer(torch.nn.Linear(2, 2), tr.L1(1.0))) as monitor:
    monitor.log(0)  # what it imports, the children have
torch.set_num_threads(1)  # in a child of a process that has used OpenMP's threads, these hang
random.seed(0)
for attempt in range(kills + 1):
    child = os.fork()
    if not child:
        train(attempt)
        os._exit(0)
    if attempt < kills:
        logged = folder / "run"
        before = sum(path.stat().st_size for path in logged.glob("*"))
        # At any moment after the first records: in the middle of one as well.
        while sum(path.stat().st_size for path in logged.glob("*")) < before + 2000:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, int]:
    """A run whose process was killed five times, and went on from its checkpoints; and its steps."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run(
        [sys.executable, "-c", TRAINING, str(folder)], check=True, cwd=Path(tr.__file__).parents[1], timeout=120
    )
    assert len(list((folder / "run").iterdir())) >= 3  # it did crash
    return folder / "run", torch.load(folder / "checkpoint.pt", weights_only=True)["step"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that it forked")
@pytest.mark.parametrize("read", [scalars, served])
def test_a_run_that_was_killed_and_resumed_has_every_step_once(killed, read):
    folder, steps = killed
    found = read(folder)
    assert {"overview/loss", "overview/sparsity", "weight_norm_l2/weight"} <= set(found)
    for tag, points in found.items():
        assert list(points) == list(range(steps)), tag
    attempts = list(found["overview/attempt"].values())
    assert attempts == sorted(attempts)  # what was logged from a checkpoint on is replaced by what came after
    assert attempts[-1] == 5


def fresh(folder: Path, first: int, last: int, value: float) -> None:
    with tr.TensorBoardMonitor(folder, l1(mlp()), budget=None) as monitor:
        for step in range(first, last):
            monitor.log(step, loss=value)


@pytest.mark.parametrize("cut", [1, 5, 13, 40])
def test_a_record_that_was_cut_off_does_no_harm(tmp_path, cut):
    monitor = tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=0)
    for step in range(10):
        monitor.log(step, loss=1.0)
    [path] = tmp_path.iterdir()
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - cut)
    fresh(tmp_path, 8, 12, 2.0)
    assert scalars(tmp_path)["overview/loss"] == {**dict.fromkeys(range(8), 1.0), **dict.fromkeys(range(8, 12), 2.0)}
    assert served(tmp_path)["overview/loss"] == scalars(tmp_path)["overview/loss"]


def test_going_back_in_one_process_replaces_what_was_logged_from_there_on(tmp_path, warned):
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), every=2, budget=None, images_every=2) as monitor:
        for start, stop, value in ((0, 9, 1.0), (5, 7, 2.0), (3, 12, 3.0)):
            for step in range(start, stop):
                monitor.log(step, loss=value)
    [message] = warned()
    assert "step 5 was logged after step 8" in message
    loss = scalars(tmp_path)["overview/loss"]
    assert loss == {0: 1, 2: 1, 3: 3, 4: 3, 6: 3, 8: 3, 10: 3, 11: 3}
    assert list(scalars(tmp_path)["overview/sparsity"]) == [0, 2, 3, 4, 6, 8, 10, 11]
    read = reader(tmp_path)
    assert [image.step for image in read.Images("weight_masks/fc1.weight")] == [0, 2, 3, 4, 6, 8, 10, 11]


def test_going_back_by_fewer_steps_than_every_replaces_too(tmp_path, warned):
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), every=4, budget=None) as monitor:
        for start, value in ((0, 1.0), (8, 2.0)):
            for step in range(start, 11):
                monitor.log(step, loss=value)
    assert len(warned()) == 1
    for read in (scalars, served):
        found = read(tmp_path)
        assert found["overview/loss"] == {0: 1, 4: 1, 8: 2, 10: 2}
        assert list(found["overview/sparsity"]) == [0, 4, 8, 10]


def test_two_runs_in_one_second_are_read_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(event_file.time, "time", lambda: 1.7e9)
    fresh(tmp_path, 0, 6, 1.0)
    fresh(tmp_path, 3, 6, 2.0)
    fresh(tmp_path, 4, 6, 3.0)
    assert scalars(tmp_path)["overview/loss"] == {0: 1, 1: 1, 2: 1, 3: 2, 4: 3, 5: 3}


def test_a_fresh_run_in_an_old_directory_replaces_what_was_there(tmp_path):
    fresh(tmp_path, 0, 9, 1.0)
    with pytest.warns(UserWarning, match="an earlier run in this directory, and its points from step 0 on"):
        fresh(tmp_path, 0, 3, 2.0)
    for read in (scalars, served):
        found = read(tmp_path)
        assert found["overview/loss"] == {0: 2, 1: 2, 2: 2}
        assert all(list(points) == [0, 1, 2] for points in found.values())


def test_every_record_is_on_the_disk_when_log_returns(tmp_path):
    monitor = tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=None)
    for step in range(3):
        monitor.log(step, loss=step)
        assert list(scalars(tmp_path)["overview/loss"]) == list(range(step + 1))


# ---------------------------------------------------------------------- it never fails training


def test_a_full_disk_is_one_warning(tmp_path, warned):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=None) as monitor:
        monitor.log(0, loss=0)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
            for step in range(1, 200):
                monitor.log(step, loss=step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    [message] = warned()
    assert str(tmp_path) in message
    assert "full" in message or "large" in message
    found = scalars(tmp_path)["overview/loss"]
    assert list(found) == list(range(len(found)))
    assert 2 < len(found) < 200


class Failing:
    """A file on a disk that is full."""

    def __init__(self, file: Any) -> None:
        self._file, self.calls = file, 0

    def write(self, data: bytes) -> int:
        self.calls += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fileno(self) -> int:
        return self._file.fileno()


def test_a_write_that_fails_is_one_warning_and_is_not_tried_again(tmp_path, warned):
    monitor = tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=None)
    monitor.log(0, loss=0.0)
    sink = monitor._writer._sink
    sink._file = failing = Failing(sink._file)
    for step in range(1, 5):
        monitor.log(step, loss=step, odd="a text")
    monitor.close()
    messages = warned()
    assert [message for message in messages if "odd" not in message] == messages[1:]
    assert str(tmp_path) in messages[1]
    assert "No space left on device" in messages[1]
    assert failing.calls == 1
    assert list(scalars(tmp_path)["overview/loss"]) == [0]


def test_a_training_that_changes_its_directory_is_logged_where_it_began(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with tr.TensorBoardMonitor("runs/l1", l1(mlp())) as monitor:
        monkeypatch.chdir("elsewhere")
        monitor.log(0, loss=1.0)
        monkeypatch.chdir(tmp_path)
        monitor.log(1, loss=2.0)
    assert scalars(tmp_path / "runs" / "l1")["overview/loss"] == {0: 1, 1: 2}


def test_a_directory_that_was_removed_is_one_warning(tmp_path, warned):
    monitor = tr.TensorBoardMonitor(tmp_path / "run", l1(mlp()))
    monitor.log(0, loss=0.0)
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    (tmp_path / "run").rmdir()
    for step in range(1, 5):
        monitor.log(step, loss=step)
    monitor.close()
    [message] = warned()
    assert str(tmp_path / "run") in message
    assert "removed" in message


def test_a_directory_that_cannot_be_made_is_refused_before_an_hour_of_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "deep" / "run"):
        with pytest.raises(NotADirectoryError, match="file is a file; pass a directory"):
            tr.TensorBoardMonitor(path, l1(mlp()))
    with pytest.raises(ValueError, match="has no name"):
        tr.TensorBoardMonitor("", l1(mlp()))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="cannot be written to"):
        tr.TensorBoardMonitor(tmp_path / "run", l1(mlp()))


def test_a_directory_that_cannot_be_made_any_more_is_one_warning(tmp_path, warned):
    with tr.TensorBoardMonitor(tmp_path / "file" / "run", l1(mlp())) as monitor:
        (tmp_path / "file").touch()
        for step in range(3):
            monitor.log(step, loss=0.0)
    [message] = warned()
    assert str(tmp_path / "file" / "run") in message
    assert "NotADirectoryError" in message


def test_slips_are_one_warning_each_and_cost_no_more_than_themselves(tmp_path, warned):
    with tr.TensorBoardMonitor(tmp_path, l1(mlp()), budget=None) as monitor:
        for step in (0, None, "a", 1.5, -1, math.nan, 1, 2.0, torch.tensor(3)):
            monitor.log(step, loss=0.5, accuracy=92, sparsity=0.1, **{"support_churn/total": 0.2})
    assert sorted(message.split("): ")[1].split(" ")[0] for message in warned()) == [
        "accuracy",
        "overview/sparsity",
        "step=None",
        "support_churn/total",
    ]
    found = scalars(tmp_path)
    assert list(found["overview/loss"]) == list(found["overview/sparsity"]) == [0, 1, 2, 3]
    assert set(found["overview/sparsity"].values()) == {0}


def test_a_summary_writer_that_the_user_closed_is_one_warning(tmp_path, warned):
    writer = SummaryWriter(tmp_path)
    with tr.TensorBoardMonitor(writer, l1(mlp())) as monitor:
        monitor.log(0, loss=0.0)
        writer.close()
        for step in range(1, 4):
            monitor.log(step, loss=0.0)
        monitor.flush()
    [message] = warned()
    assert str(tmp_path) in message
    assert "the SummaryWriter is closed" in message


def test_a_summary_writer_whose_thread_died_is_one_warning(tmp_path, warned, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    writer = SummaryWriter(tmp_path)
    with tr.TensorBoardMonitor(writer, l1(mlp())) as monitor:
        monitor.log(0, loss=0.0)
        worker = writer.file_writer.event_writer._async_writer._worker
        worker._record_writer = Failing(None)
        for step in range(1, 400):
            monitor.log(step, loss=0.0)
    assert not worker.is_alive()
    [message] = warned()
    assert "No space left on device" in message


def test_a_module_replaced_in_mid_training_stops_the_measuring_alone(tmp_path, warned):
    model = mlp()
    with tr.TensorBoardMonitor(tmp_path, l1(model), budget=None) as monitor:
        for step in range(5):
            if step == 2:
                model.fc1 = nn.Linear(6, 5)
            monitor.log(step, loss=torch.tensor(1.0))
    [message] = warned()
    assert str(tmp_path) in message
    assert "fc1" in message
    found = scalars(tmp_path)
    assert list(found["overview/loss"]) == [0, 1, 2, 3, 4]
    assert list(found["overview/sparsity"]) == [0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e-45])
@pytest.mark.parametrize("everywhere", [True, False])
def test_weights_that_are_not_finite_or_at_the_ends_do_no_harm(tmp_path, value, everywhere):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    for w in (model[0].weight, model[2].weight):
        set_weights(w if everywhere else w[0], np.full(w.shape if everywhere else w[0].shape, value, np.float32))
    with (
        warnings.catch_warnings(record=True) as told,
        tr.TensorBoardMonitor(tmp_path, l1(model), budget=None) as monitor,
    ):
        warnings.simplefilter("always")
        monitor.log(0)
        monitor.log(1)
    of = [str(warning.message).partition(": ")[2].split(" has ")[0] for warning in told]
    assert of == ([] if math.isfinite(value) else ["0.weight", "2.weight"])  # each once
    found = scalars(tmp_path)
    assert found["overview/sparsity"] == {0: 0, 1: 0}
    assert len(pictures(tmp_path)) == 4


def test_another_default_device_changes_nothing(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    for device in ("cpu", "meta"):  # as cuda is: a tensor that lands there meets those of the CPU no more
        with torch.device(device), tr.TensorBoardMonitor(tmp_path / device, l1(model), budget=None) as monitor:
            monitor.log(0, loss=1.0)
            monitor.log(1, loss=1.0)
    assert scalars(tmp_path / "meta") == scalars(tmp_path / "cpu")
    found, expected = pictures(tmp_path / "meta"), pictures(tmp_path / "cpu")
    assert found.keys() == expected.keys()
    assert all((found[tag] == expected[tag]).all() for tag in found)


class Parameters(nn.Module):
    """Parameters of every kind, by their names."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, w in parameters.items():
            self.register_parameter(name, nn.Parameter(w))


def test_parameters_of_every_shape_and_type_are_shown(tmp_path):
    model = Parameters(
        scalar=torch.tensor(2.0),
        vector=torch.tensor([1.0, 0.0]),
        empty=torch.ones(0, 3),
        zeros=torch.zeros(4, 4),
        bf16=torch.ones(4, 4, dtype=torch.bfloat16),
        fp16=torch.ones(2, 3, 2, 2, dtype=torch.float16),
        complex=torch.tensor([[1 + 1j, 0j]]),
        tiny=torch.full((2, 2), 1e-300, dtype=torch.float64),
    )
    with tr.TensorBoardMonitor(
        tmp_path, tr.Regularizer(model, tr.L1(1e-3), include=lambda *_: True), budget=None
    ) as monitor:
        for step in range(2):
            monitor.log(step)
    read = reader(tmp_path)
    assert "weight_nonzero/zeros" not in read.Tags()["histograms"]
    assert "weight_nonzero/empty" not in read.Tags()["histograms"]
    counts = {tag: read.Histograms(tag)[-1].histogram_value.num for tag in read.Tags()["histograms"]}
    assert counts["weight_nonzero/complex"] == 1
    assert counts["weight_nonzero/tiny"] == 4
    assert counts["weight_nonzero/vector"] == 1
    assert scalars(tmp_path)["sparsity/zeros"] == {0: 1, 1: 1}


def test_lazy_modules_get_their_shapes_after_the_monitor_is_built(tmp_path):
    model = Lazy()
    monitor = tr.TensorBoardMonitor(tmp_path, l1(model), budget=None)
    for step in range(2):
        model(batch()[0])
        monitor.log(step)
    monitor.close()
    assert scalars(tmp_path)["sparsity/fc2.weight"] == {0: 0, 1: 0}


def test_what_comes_before_a_lazy_module_has_its_shape_is_one_warning(tmp_path, warned):
    model = Lazy()
    with tr.TensorBoardMonitor(tmp_path, l1(model), budget=None) as monitor:
        monitor.log(0, loss=1.0)
        model(batch()[0])
        monitor.log(1, loss=1.0)
    [message] = [message for message in warned() if "TensorBoardMonitor" in message]
    assert re.search("nothing is logged before this is fixed: .*run one forward pass", message)
    found = scalars(tmp_path)
    assert list(found["overview/loss"]) == list(found["sparsity/fc2.weight"]) == [1]


HOSTILE = ["β", "γ", "a (b)", "a [b]", "a/b", "a\nb", "a|b", "`", "^*$", "x" * 300, "%s{}", "-", "a__b_", "λ (1e-3)"]


def test_hostile_names_make_plain_tags_and_none_is_lost(tmp_path):
    model = Parameters(**{name: torch.full((2, 2), float(i)) for i, name in enumerate(HOSTILE)})
    reg = tr.Regularizer(model, {f"{name}": tr.L1(1e-3) for name in HOSTILE[:3]} | {"*": tr.L2(1e-3)}, include=None)
    with tr.TensorBoardMonitor(tmp_path, reg, budget=None) as monitor:
        monitor.log(0, **{f"metric ({name})": 1.0 for name in HOSTILE})
    found = scalars(tmp_path)
    norms = sorted(points[0] for tag, points in found.items() if tag.startswith("weight_norm_l1/"))
    assert norms == [4.0 * i for i in range(len(HOSTILE))]
    assert len([tag for tag in found if tag.startswith("penalty/")]) == 4
    assert all(re.fullmatch(r"[\w./-]+", tag, re.ASCII) for tag in found)
    rows = texts(tmp_path)["about/1_summary"].splitlines()
    assert len(rows) == 2 + len(HOSTILE) + 1
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 7 for row in rows)


def test_a_step_of_no_use_is_one_warning(tmp_path, warned):
    with tr.TensorBoardMonitor(tmp_path, l1(mlp())) as monitor:
        monitor.log(None, loss=0.0)
        monitor.log("a", loss=0.0)
    [message] = warned()
    assert str(tmp_path) in message


def test_a_monitor_that_is_dropped_leaves_no_file_open_and_what_it_wrote(tmp_path):
    threads = threading.active_count()
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for i in range(5):
        monitor = tr.TensorBoardMonitor(tmp_path / str(i), l1(mlp()))
        monitor.log(0, loss=i)
    del monitor
    gc.collect()
    assert threading.active_count() == threads
    assert not descriptors or len(os.listdir("/proc/self/fd")) == descriptors
    assert [scalars(tmp_path / str(i))["overview/loss"][0] for i in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"writer": 3}, TypeError, "pass a log directory"),
        ({"writer": __file__}, NotADirectoryError, "is a file"),
        ({"regularizer": nn.Linear(2, 2)}, TypeError, "build one first"),
        ({"every": 0}, ValueError, "every=0"),
        ({"every": 1.5}, TypeError, "whole number"),
        ({"every": True}, TypeError, "every=True"),
        ({"images_every": -1}, ValueError, "images_every=-1"),
        ({"budget": -1}, ValueError, "budget=-1"),
        ({"near_zero": math.nan}, ValueError, "near_zero=nan"),
        ({"hparams": ["a"]}, TypeError, "pass a dict"),
        ({"hparams": {"a": torch.ones(())}}, ValueError, "plain numbers"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        tr.TensorBoardMonitor(**{"writer": tmp_path, "regularizer": l1(mlp()), **change})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- the custom-scalar page


@pytest.mark.parametrize("count", [1, 3, 7, 30, 300])
def test_the_layout_is_of_the_model_and_each_line_finds_its_tag_alone(tmp_path, count):
    model = net(*[2] * (count + 1))
    rules = {f"{i}.weight": tr.ElasticNet(l1=1e-3, l2=1e-3) for i in range(min(count, 10))}
    reg = tr.Regularizer(model, {**rules, "*.weight": tr.L1(1e-3)} if count > 10 else rules)
    criterion = tr.RegularizedLoss(nn.MSELoss(), reg)
    criterion(model(torch.ones(1, 2)), torch.zeros(1, 2))
    with tr.TensorBoardMonitor(tmp_path, reg, images_every=0) as monitor:
        monitor.log(0, loss=criterion.last, accuracy=0.5)
        monitor.log(1, loss=0.5)
    tags = reader(tmp_path).Tags()["scalars"]
    drawn = charts(tmp_path)
    assert len(drawn) <= 40
    assert len({chart.title for category in layout_of(tmp_path).category for chart in category.chart}) >= len(drawn) - 1
    for chart in drawn:
        assert chart.multiline.tag or chart.margin.series
        assert len(chart.multiline.tag) <= 8
        for pattern in chart.multiline.tag:
            wanted = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))
            found = [tag for tag in tags if re.match(pattern, tag)]
            assert found == [wanted] or (pattern in {"^penalty/", "^schedule/lambda_"} and found)
        for series in chart.margin.series:
            assert {series.value, series.lower, series.upper} <= set(tags)
    shown = {pattern for chart in drawn for pattern in chart.multiline.tag if pattern.startswith("^sparsity/")}
    assert len(shown) == (count if count <= 24 else 8)


def test_runs_of_the_same_model_have_the_same_layout(tmp_path):
    for run in ("a", "b"):
        fresh(tmp_path / run, 0, 1, 1.0)
    assert layout_of(tmp_path / "a") == layout_of(tmp_path / "b")


# ---------------------------------------------------------------------- images and histograms


def image_run(folder: Path, model: nn.Module) -> dict[str, np.ndarray]:
    with tr.TensorBoardMonitor(folder, l1(model)) as monitor:
        monitor.log(0)
    found = pictures(folder)
    assert all(max(image.shape[:2]) <= 600 for image in found.values())
    assert all(min(image.shape[:2]) >= 16 for image in found.values())
    return found


@pytest.mark.parametrize(("inputs", "shape"), [(784, (28, 28)), (30, None), (1000, None)])
def test_the_input_map_is_grey_where_an_input_is_dead_and_nowhere_else(tmp_path, inputs, shape):
    model = net(inputs, 10)
    w = np.random.default_rng(0).normal(size=(10, inputs)).astype(np.float32)
    w[:, ::3] = 0
    w[:, 1] = 1e-30  # it is alive
    set_weights(model[0].weight, w)
    pixels = image_run(tmp_path, model)["weight_input_map/0.weight"]
    grey = (pixels == 211).all(-1)
    dead = (w == 0).all(0)
    if shape:
        np.testing.assert_array_equal(grey, np.kron(dead.reshape(shape), np.ones((8, 8))).astype(bool))
    elif inputs == 30:
        np.testing.assert_array_equal(grey[0], np.repeat(dead, grey.shape[1] // 30))
        assert (grey == grey[0]).all()
    else:
        assert not grey.any()  # of two neighbours one lives


def pooled(alive: np.ndarray, side: int = 256) -> np.ndarray:
    """The share of nonzeros of each block."""
    block = [-(-length // side) for length in alive.shape]
    rows = range(0, alive.shape[0], block[0])
    columns = range(0, alive.shape[1], block[1])
    return np.array([[alive[i : i + block[0], j : j + block[1]].mean() for j in columns] for i in rows])


@pytest.mark.parametrize("shape", [(10, 300), (300, 784), (3, 5), (1, 1), (257, 20)])
def test_a_mask_is_black_where_the_weights_live(tmp_path, shape):
    model = net(shape[1], shape[0])
    w = np.random.default_rng(0).normal(size=shape)
    w[np.random.default_rng(1).random(shape) < 0.7] = 0
    set_weights(model[0].weight, w)
    pixels = image_run(tmp_path, model)["weight_masks/0.weight"].astype(float)
    expected = 255 * (1 - pooled(w != 0))
    down, across = (large // small for large, small in zip(pixels.shape, expected.shape, strict=True))
    np.testing.assert_allclose(pixels, np.kron(expected, np.ones((down, across))), atol=0.51)


@pytest.mark.parametrize("channels", [1, 3, 20])
def test_filters_are_mid_grey_where_a_weight_is_zero_and_nowhere_else(tmp_path, channels):
    model = nn.Sequential(nn.Conv2d(channels, 16, 3), nn.Conv2d(16, 4, 1))
    w = np.random.default_rng(0).normal(size=(16, channels, 3, 3)).astype(np.float32)
    w[np.random.default_rng(1).random(w.shape) < 0.5] = 0
    w[0, 0, 0] = 1e-20
    set_weights(model[0].weight, w)
    pixels = image_run(tmp_path, model)["weight_filters/0.weight"]
    tiles = w.transpose(0, 2, 3, 1) if channels == 3 else w[: 64 // min(8, channels), :8].reshape(-1, 3, 3, 1)
    tiles = np.broadcast_to(tiles, (*tiles.shape[:3], 3))
    columns = 8 if channels == 20 else 4
    times = pixels.shape[1] // (columns * 4)
    small = pixels[::times, ::times]
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        shown = small[4 * row : 4 * row + 3, 4 * column : 4 * column + 3]
        np.testing.assert_array_equal(shown == 128, tile == 0)
        np.testing.assert_array_equal(shown > 128, tile > 0)


def histogram_of(folder: Path, w: np.ndarray) -> Any:
    model = nn.Module()
    model.w = nn.Parameter(torch.as_tensor(w))
    with tr.TensorBoardMonitor(folder, tr.Regularizer(model, tr.L1(0.1), include="w")) as monitor:
        monitor.log(0)
    read = reader(folder)
    return read.Histograms("weight_nonzero/w")[0].histogram_value if read.Tags()["histograms"] else None


@pytest.mark.filterwarnings("ignore:.* NaN or infinite entries")
def test_a_histogram_counts_the_finite_nonzeros(tmp_path):
    w = np.random.default_rng(0).normal(size=(100, 80)).astype(np.float32)
    w[w < -0.5] = 0
    w[:3, 0] = np.nan, np.inf, -np.inf
    alive = w[np.isfinite(w) & (w != 0)].astype(np.float64)
    found = histogram_of(tmp_path, w)
    assert found.num == len(alive)
    assert (found.min, found.max) == (alive.min(), alive.max())
    assert found.sum == pytest.approx(alive.sum())
    assert found.sum_squares == pytest.approx((alive**2).sum())
    # A bucket ends at its limit, and begins at the one before; so nothing lies below the first.
    edges = np.array(found.bucket_limit)
    assert found.bucket[0] == 0
    np.testing.assert_allclose(found.bucket[1:], np.histogram(alive, edges)[0], atol=1)
    assert sum(found.bucket) == len(alive)


def test_a_histogram_of_many_weights_is_of_a_sample_scaled_up(tmp_path):
    w = np.random.default_rng(0).normal(size=(1000, 500)).astype(np.float32)
    w[:, ::2] = 0
    found = histogram_of(tmp_path, w)
    assert found.num == 250_000
    assert sum(found.bucket) == pytest.approx(250_000)
    assert found.sum_squares == pytest.approx((w.astype(float) ** 2).sum(), rel=0.02)


def test_the_last_weights_of_a_large_layer_have_a_histogram(tmp_path):
    w = np.zeros((1000, 500), np.float32)
    w[[3, 77, 500], [1, 2, 3]] = 1.0, 2.0, 2.0
    assert sum(histogram_of(tmp_path, w).bucket) == 3


@pytest.mark.filterwarnings("ignore:.* NaN or infinite entries")
@pytest.mark.parametrize("w", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.ones((0, 4))])
def test_where_no_weight_is_left_there_is_no_histogram(tmp_path, w):
    assert histogram_of(tmp_path, w) is None


def test_a_histogram_of_one_value_has_it_inside(tmp_path):
    found = histogram_of(tmp_path, np.full((4, 4), 2.0))
    assert found.min < 2 < found.max
    assert sum(found.bucket) == 16


def test_many_layers_make_few_pictures_and_a_heat_map(tmp_path):
    model = net(*[3] * 41)
    with tr.TensorBoardMonitor(tmp_path, l1(model), budget=None) as monitor:
        for step in range(3):
            monitor.log(step)
    found = pictures(tmp_path)
    assert len(found) == 1 + 8 + 1
    assert max(found["weight_masks/sparsity_of_all_layers"].shape[:2]) <= 600


def test_a_heat_map_that_cannot_be_drawn_is_one_warning_and_the_measuring_goes_on(tmp_path, warned, monkeypatch):
    drawn = pytest.importorskip("matplotlib.figure")

    def savefig(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("latex could not be found")  # as with text.usetex

    monkeypatch.setattr(drawn.Figure, "savefig", savefig)
    with tr.TensorBoardMonitor(tmp_path, l1(net(*[3] * 10)), budget=None, images_every=1) as monitor:
        for step in range(3):
            monitor.log(step)
    [message] = warned()
    assert "latex could not be found" in message
    assert list(scalars(tmp_path)["overview/sparsity"]) == [0, 1, 2]
    assert len(pictures(tmp_path)) == 1 + 8


def test_a_deep_run_that_goes_back_to_its_start_without_time_to_measure_goes_on(tmp_path, monkeypatch, warned):
    clock = Clock(monkeypatch)
    measured = Gauge.read
    monkeypatch.setattr(Gauge, "read", lambda *args: (measured(*args), setattr(clock, "now", clock.now + 1.0))[0])
    with tr.TensorBoardMonitor(tmp_path, l1(net(*[3] * 10)), budget=0.5) as monitor:
        for step in (*range(3), *range(9)):
            clock.now += 0.5
            monitor.log(step, loss=0.0)
    [message] = warned()
    assert "what was logged from 0 on is replaced" in message
    assert max(scalars(tmp_path)["overview/sparsity"]) == 8


# ---------------------------------------------------------------------- hyperparameters and texts


def test_hyperparameters_read_back_beside_what_they_led_to(tmp_path):
    reg = tr.Regularizer(model := mlp(), {"fc1.weight": tr.L1(1e-2), "fc2.*": tr.ElasticNet(l1=1e-3, l2=1e-4)})
    tr.optim.ProxAdam(model.parameters(), lr=0.5, regularizer=reg)
    optimizer = (
        tr.optim.ProxAdam(model.parameters(), lr=0.5, regularizer=reg) if reg.bindings()[0].carrier is None else None
    )
    with tr.TensorBoardMonitor(tmp_path, reg, hparams={"width": 300, "note": "a", "augment": True}) as monitor:
        monitor.log(0, accuracy=0.5)
        monitor.log(1, accuracy=0.75)
    del optimizer
    read = reader(tmp_path)
    start = metadata.parse_session_start_info_plugin_data(
        read.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert found["lambda_fc1.weight"] == 1e-2
    assert (found["lambda_fc2.*.l1"], found["lambda_fc2.*.l2"]) == (1e-3, 1e-4)
    assert (found["width"], found["note"], found["augment"]) == (300, "a", True)
    experiment = metadata.parse_experiment_plugin_data(
        read.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    )
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert {"overview/sparsity", "overview/accuracy"} <= metrics <= set(read.Tags()["scalars"])
    assert read.Scalars("overview/accuracy")[-1].value == 0.75
    assert metadata.SESSION_END_INFO_TAG in read.Tags()["tensors"]


@pytest.mark.parametrize("status", ["STATUS_SUCCESS", "STATUS_FAILURE"])
def test_a_run_that_an_error_ends_has_failed(tmp_path, status):
    with contextlib.suppress(ZeroDivisionError), tr.TensorBoardMonitor(tmp_path, l1(mlp())) as monitor:
        monitor.log(0)
        if status == "STATUS_FAILURE":
            raise ZeroDivisionError
    content = reader(tmp_path).SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(content).status == getattr(api_pb2, status)


def test_the_optimizer_and_its_first_learning_rate_are_hyperparameters(tmp_path):
    reg = l1(model := mlp())
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.5, regularizer=reg)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    with tr.TensorBoardMonitor(tmp_path, reg) as monitor:
        monitor.log(0)
    content = reader(tmp_path).SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    assert start.hparams["optimizer"].string_value == "ProxAdam"
    assert start.hparams["lr"].number_value == 0.5


def test_the_summary_at_the_end_is_what_sparsity_counts(tmp_path):
    model = mlp()
    set_weights(model.fc1.weight, np.kron(np.eye(5, 6), np.ones((1, 1))))
    with tr.TensorBoardMonitor(tmp_path, l1(model)) as monitor:
        monitor.log(0)
        set_weights(model.fc2.weight, np.zeros((3, 5)))
        monitor.log(1)
    found = tr.sparsity(l1(model))
    rows = [
        [cell.strip(" `*") for cell in row.split("|")[1:-1]] for row in texts(tmp_path)["about/1_summary"].splitlines()
    ]
    assert rows[0] == ["weight", "shape", "left", "zeros", "dead inputs", "dead neurons"]
    for row, layer in zip(rows[2:-1], found.layers, strict=True):
        assert row[0] == layer.name
        assert int(row[2]) == layer.weights - layer.zeros
        assert row[3] == f"{layer.fraction:.2%}"
        assert row[4].split() == [str(layer.dead_inputs), "of", str(layer.inputs)]
        assert row[5].split() == [str(layer.dead_neurons), "of", str(layer.neurons)]
    assert rows[-1][:4] == ["total", str(found.weights), str(found.weights - found.zeros), f"{found.fraction:.2%}"]


def test_the_glossary_has_every_group_of_tags(tmp_path):
    reg = l1(model := mlp())
    x, y = batch()
    with tr.TensorBoardMonitor(tmp_path, reg) as monitor:
        monitor.log(0, loss=0.5, certificate=tr.stationarity(reg, lambda: nn.functional.mse_loss(model(x), y)), lr=0.1)
    tags = reader(tmp_path).Tags()
    glossary = texts(tmp_path)["about/3_glossary"]
    groups = {tag.partition("/")[0] for kind in ("scalars", "images", "histograms") for tag in tags[kind]}
    assert not [group for group in groups if f"{group}/" not in glossary and f"{group}_" not in glossary]


# ---------------------------------------------------------------------- what it needs


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=re.escape("pip install '.[tensorboard]'")):
        tr.TensorBoardMonitor(tmp_path, l1(mlp()))


@pytest.mark.parametrize("package", ["google_crc32c", "matplotlib"])
def test_without_the_optional_packages_all_else_works(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with tr.TensorBoardMonitor(tmp_path, l1(net(*[3] * 8)), budget=None) as monitor:
        for step in range(3):
            monitor.log(step, loss=step)
    found = scalars(tmp_path)
    assert list(found["overview/loss"]) == list(found["overview/sparsity"]) == [0, 1, 2]
    assert ("weight_masks/sparsity_of_all_layers" in pictures(tmp_path)) == (package != "matplotlib")


# ---------------------------------------------------------------------- memory


def growth(folder: Path, logs: int) -> int:
    """Bytes that the second half of so many logs leaves behind."""
    model = mlp()
    with tr.TensorBoardMonitor(folder, l1(model)) as monitor:
        for step in range(logs // 2):
            monitor.log(step, loss=step, accuracy=torch.tensor(0.5))
        tracemalloc.start()
        try:
            for step in range(logs // 2, logs):
                monitor.log(step, loss=step, accuracy=torch.tensor(0.5))
            gc.collect()
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()


def test_memory_is_flat(tmp_path):
    assert growth(tmp_path, 20_000) < 200_000


@pytest.mark.slow
def test_memory_is_flat_over_a_long_run(tmp_path):
    assert growth(tmp_path, 100_000) < 200_000
