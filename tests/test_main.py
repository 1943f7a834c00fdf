"""The command line, as a user types it: right counts of any checkpoint, one clear line for any other file."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import importlib
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.parse
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.sparse
import tensorboard
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import torchreg as tr
from tests.models import array
from torchreg import __main__ as command_line
from torchreg.__main__ import argument_parser, main
from torchreg.views.report import checkpoint_file
from torchreg.views.tensorboard import server

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the command line in an empty directory: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def type_in(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return type_in


@pytest.fixture
def read(run):
    """The JSON of a report on what is given to torch.save."""

    def save_and_read(content: object, *arguments: str, legacy: bool = False) -> dict:
        torch.save(content, "x.pt", _use_new_zipfile_serialization=not legacy)
        code, out, err = run("report", "x.pt", "--json", *arguments)
        assert (code, err) == (0, "")
        return json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON

    return save_and_read


@pytest.fixture
def refused(run):
    """The one line that a report on a file fails with."""

    def fail(*arguments: str) -> str:
        code, out, err = run("report", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("torchreg: ")
        assert err.endswith("\n")
        assert err[:-1].isprintable()
        return err[:-1]

    return fail


def sparse_net() -> nn.Sequential:
    """A network with zeros, a dead input and a dead neuron."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 20), nn.Linear(20, 4))
    with torch.no_grad():
        for i in (0, 3, 4):
            weight = model[i].weight
            weight[torch.rand(weight.shape) < 0.9] = 0
            weight[1] = 0
            weight[:, 2] = 0
    return model


def archive(path: str, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """A file of torch.save with this pickle in it."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")


# ---------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_counts_as_its_model_counts(run, kind):
    model = sparse_net()
    if kind == "safetensors":
        save_file(model.state_dict(), "net")  # known by its content
    else:
        torch.save(model.state_dict(), "net", _use_new_zipfile_serialization=kind == "zip")
    code, out, err = run("report", "net", "--json")
    assert (code, err) == (0, "")
    found, expected = json.loads(out), tr.sparsity(model).to_dict()
    assert [found[key] for key in ("weights", "zeros", "fraction")] == [
        expected[key] for key in ("weights", "zeros", "fraction")
    ]
    assert list(found["layers"]) == list(expected["layers"])
    for name, layer in expected["layers"].items():
        assert found["layers"][name].items() >= layer.items()
    assert found["file_bytes"] == Path("net").stat().st_size


def test_sizes_are_those_of_scipys_csr_matrices(read):
    state = sparse_net().state_dict()
    found = read(state)
    dense = sparse = 0
    for name, tensor in state.items():
        values = tensor.numpy()
        dense += values.nbytes
        if values.ndim < 2:
            sparse += values.nbytes
            continue
        csr = scipy.sparse.csr_matrix(values.reshape(len(values), -1))
        size = min(values.nbytes, csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes)
        assert found["layers"][name]["sparse_bytes"] == size
        assert found["layers"][name]["dense_bytes"] == values.nbytes
        sparse += size
    assert (found["dense_bytes"], found["sparse_bytes"]) == (dense, sparse)
    assert found["ratio"] == dense / sparse


def test_a_weight_that_is_full_is_not_blown_up(read):
    found = read({"w": torch.ones(4, 4)})
    assert (found["dense_bytes"], found["sparse_bytes"], found["ratio"]) == (64, 64, 1.0)


def test_the_rest_is_counted_apart_by_its_kind(read):
    model = sparse_net()
    model.cls_token = nn.Parameter(torch.ones(1, 1, 4))
    model.register_buffer("ids", torch.arange(6).reshape(2, 3))
    found = read(model.state_dict())
    assert set(found["layers"]) == {"0.weight", "3.weight", "4.weight"}
    counts = {kind: (rest["tensors"], rest["entries"], rest["bytes"]) for kind, rest in found["rest"].items()}
    assert counts == {
        "embedding": (1, 4, 16),
        "bias": (4, 8 + 8 + 20 + 4, 160),
        "fewer than two dimensions": (1, 8, 32),
        "norm statistics": (3, 17, 72),
        "integer type": (1, 6, 48),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.qint8]
)
def test_every_dtype_counts(read, dtype):
    values = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.5]])
    quantized = dtype == torch.qint8
    tensor = torch.quantize_per_tensor(values, 0.5, 3, dtype) if quantized else values.to(dtype)
    layer = read({"w": tensor})["layers"]["w"]
    assert (layer["zeros"], layer["dead_inputs"], layer["dead_neurons"]) == (3, 1, 0)
    assert layer["dtype"] == str(dtype).removeprefix("torch.")
    assert layer["dense_bytes"] == 6 * tensor.element_size()


def test_tied_tensors_count_once(read, run):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    found = read(model.state_dict())
    assert (found["weights"], found["dense_bytes"]) == (16, 64)
    assert found["layers"]["0.weight"]["ties"] == ["1.weight"]
    assert "tied: 0.weight = 1.weight, counted once" in run("report", "x.pt")[1]


def test_views_of_one_storage_are_tensors_of_their_own(read):
    base = torch.arange(12.0).reshape(4, 3)
    assert read({"q": base[:2], "k": base[2:], "t": base.T})["weights"] == 6 + 6 + 12


def test_a_pruned_pair_is_the_weight_that_it_makes(read):
    layer = nn.Linear(8, 4)
    prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
    found = read(layer.state_dict())
    assert list(found["layers"]) == ["weight"]
    assert found["layers"]["weight"].items() >= tr.sparsity(layer).layers[0].to_dict().items()
    assert found["layers"]["weight"]["dead_neurons"] == 2
    assert found["rest"]["pruning mask"]["bytes"] == 128
    assert found["dense_bytes"] == 2 * 128 + 16
    prune.remove(layer, "weight")
    assert found["sparse_bytes"] == read(layer.state_dict())["sparse_bytes"]


@pytest.mark.parametrize(
    "others",
    [
        {"fc_mask": torch.zeros(3, 2)},
        {"fc_mask": torch.zeros(2, 3, dtype=torch.bool)},
        {"fc_mask": torch.zeros(2, 3), "fc": torch.ones(2, 3)},
        {},
    ],
)
def test_what_only_looks_like_a_pruned_pair_stays_as_it_is(read, others):
    assert read({"fc_orig": torch.ones(2, 3), **others})["layers"]["fc_orig"]["zeros"] == 0


def test_near_zero_counts_up_to_the_threshold(read, run):
    values = torch.tensor([[0.0, 1e-4, -1e-3], [2e-3, float("nan"), 1.0]], dtype=torch.float64)
    found = read({"w": values}, "--near-zero", "1e-3")
    assert (found["near_zero_threshold"], found["near_zero"]) == (1e-3, 3)
    assert (found["layers"]["w"]["near_zero"], found["layers"]["w"]["zeros"]) == (3, 1)
    assert "near_zero" not in read({"w": values})["layers"]["w"]
    lines = run("report", "x.pt", "--near-zero", "1e-3")[1].splitlines()
    assert lines[2].endswith("|w| ≤ 0.001")
    assert lines[4].endswith("50.00%")
    assert lines[5].endswith("50.00%")


def test_a_threshold_is_not_rounded_to_the_weights_dtype(read):
    near = torch.tensor([[0.1, 0.1]]).bfloat16()  # 0.10009765625
    assert read({"w": near}, "--near-zero", "0.1")["layers"]["w"]["near_zero"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_nan_and_infinities_are_counted_and_said(read, run, dtype):
    bad = torch.tensor([[float("nan"), float("inf"), 0.0], [-float("inf"), 1.0, 2.0]]).to(dtype)
    found = read({"w": bad, "bias": bad[0]})
    assert (found["nan"], found["inf"]) == (2, 3)
    assert (found["layers"]["w"]["nan"], found["layers"]["w"]["inf"]) == (1, 2)
    assert (found["rest"]["bias"]["nan"], found["rest"]["bias"]["inf"]) == (1, 1)
    out = run("report", "x.pt")[1]
    assert "not finite: w has 1 NaN and 2 infinite entries" in out
    assert "not finite: bias has 1 NaN and 1 infinite entries" in out


def test_it_prints_as_a_table(run):
    model = sparse_net()
    torch.save({"epoch": 3, "model": model.state_dict()}, "run.pt")
    code, out, _ = run("report", "run.pt")
    lines = out.splitlines()
    w = array(model[3].weight)
    assert code == 0
    assert re.fullmatch(r'run\.pt: torch\.save, [\d.]+ KiB, state dict under "model"', lines[0])
    left, zeros = np.count_nonzero(w), f"{np.mean(w == 0):.2%}"
    dead_inputs, dead_neurons = (w == 0).all(0).sum(), (w == 0).all(1).sum()
    assert lines[5].split() == f"3.weight 20×32 {left} {zeros} {dead_inputs} of 32 {dead_neurons} of 20 float32".split()
    assert lines[7].split()[:2] == ["total", f"{3 * 8 * 9 + 640 + 80:,}"]
    assert lines[9].startswith("the rest: 8 tensors, 65 entries, 264 B (4 bias, ")
    assert re.fullmatch(r"size: 3\.91 KiB dense, [\d.]+ \w+ sparse, [\d.]+ to 1", lines[10])
    assert "CSR" in lines[11]


# ---------------------------------------------------------------------- where in the file it is


STATE = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
OTHER = {"gen.weight": torch.ones(5, 5)}


@pytest.mark.parametrize(
    ("content", "arguments", "key", "layer"),
    [
        (STATE, (), None, "fc.weight"),
        (OrderedDict(STATE), (), None, "fc.weight"),
        ({**STATE, "fc._extra_state": {"scale": torch.ones(1)}, "best": 0.5}, (), None, "fc.weight"),
        ({"epoch": 1, "model": STATE, "optimizer": {"state": {0: {"step": torch.ones(())}}}}, (), "model", "fc.weight"),
        ({"rng": torch.ones(3), "net": STATE}, (), "net", "fc.weight"),
        (
            {"pytorch-lightning_version": "2", "state_dict": STATE, "callbacks": {"ema": torch.ones(2)}},
            (),
            "state_dict",
            "fc.weight",
        ),
        ({"model": STATE, "ema": OTHER}, ("--key", "ema"), "ema", "gen.weight"),
        ({"a": {"b": STATE, "c": OTHER}}, ("--key", "a.c"), "a.c", "gen.weight"),
        ({"a": {"b": STATE}}, ("--key", "a"), "a.b", "fc.weight"),
        ({"a.b": {"c": {"d.e": OTHER}}}, ("--key", "a.b.c.d.e"), "a.b.c.d.e", "gen.weight"),
        ({**STATE, "sub": OTHER}, ("--key", "sub"), "sub", "gen.weight"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_state_dict_is_found(read, content, arguments, key, layer, legacy):
    found = read(content, *arguments, legacy=legacy)
    assert found["key"] == key
    assert list(found["layers"]) == [layer]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"model": STATE, "ema": OTHER}, (), "holds 2 state dicts, model, ema; choose one: --key model"),
        ({"a": {"b": STATE, "c": OTHER}}, ("--key", "a"), "holds 2 state dicts, a.b, a.c; choose one: --key a.b"),
        ({"model": STATE}, ("--key", "ema"), "has no ema for --key ema; at this place it holds model"),
        (
            {"model": STATE},
            ("--key", "model.fc.weight.x"),
            "has no x for --key model.fc.weight.x; at this place it holds nothing",
        ),
        ({"model": STATE}, ("--key", ""), "has no  for --key"),
        ({"epoch": 3}, (), "holds no tensors by name; its keys are epoch; save the state dict alone"),
        ({"a": {"b": {"c": STATE}}}, (), "its keys are a; .* or choose --key"),
        ({"epoch": 3}, ("--key", "epoch"), "at epoch holds a int instead of a state dict"),
        (torch.ones(2, 2), (), "holds a Tensor instead of a state dict"),
        ([STATE], (), "holds a list instead of a state dict"),
        ({}, (), "its keys are nothing"),
        ({1: torch.ones(2, 2)}, (), "has a tensor under a int for a name"),
        ({f"key{i}": 0 for i in range(1000)}, (), "key7 and 992 more"),
    ],
)
def test_a_file_without_one_state_dict_is_refused_with_what_it_holds(refused, tmp_path, content, arguments, message):
    torch.save(content, tmp_path / "x.pt")
    assert re.search(message, refused("x.pt", *arguments))


@pytest.mark.parametrize(
    ("names", "clean"),
    [
        (["module.fc.weight", "module.head.weight"], ["fc.weight", "head.weight"]),
        (["module.module.fc.weight", "n_averaged"], ["fc.weight"]),
        (["_orig_mod.module.fc.weight", "_orig_mod.module.head.weight"], ["fc.weight", "head.weight"]),
        (["a._fsdp_wrapped_module.b._checkpoint_wrapped_module.weight"], ["a.b.weight"]),
        (["module.fc.weight", "head.weight"], ["module.fc.weight", "head.weight"]),
        (["_orig_mod.fc.weight", "fc.weight"], ["_orig_mod.fc.weight", "fc.weight"]),
        (["model.fc.weight"], ["model.fc.weight"]),
    ],
)
def test_wrappers_leave_no_trace_in_the_names(read, names, clean):
    state = {name: torch.ones(()) if name == "n_averaged" else torch.ones(2, 2) for name in names}
    assert list(read(state)["layers"]) == clean


def test_names_of_wrapped_models_are_those_of_sparsity(read):
    model = torch.optim.swa_utils.AveragedModel(nn.DataParallel(sparse_net()))
    assert list(read(model.state_dict())["layers"]) == [layer.name for layer in tr.sparsity(model).layers]


def test_entries_that_are_no_tensors_are_named(read, run):
    assert read({**STATE, "q._packed_params": (1, 2)})["skipped"] == ["q._packed_params"]
    assert "left out, not tensors: q._packed_params\n" in run("report", "x.pt")[1]


def test_safetensors_have_no_keys_to_choose(refused, tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    assert "has no model for --key model; at this place it holds fc.bias, fc.weight" in refused(
        "x.safetensors", "--key", "model"
    )


def test_layer_10_of_safetensors_comes_after_layer_2(run, tmp_path):
    save_file({f"l{i}.weight": torch.ones(2, 2) for i in (10, 2, 1)}, tmp_path / "x.safetensors")
    assert list(json.loads(run("report", "x.safetensors", "--json")[1])["layers"]) == [
        "l1.weight",
        "l2.weight",
        "l10.weight",
    ]


# ---------------------------------------------------------------------- files that nobody should trust


class Runs:
    """Pickled, it makes a directory where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


class Shaped:
    """Pickled, a tensor of this shape and stride over whatever storage it has."""

    def __init__(self, tensor: Tensor, shape: tuple, stride: tuple) -> None:
        storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
        self.arguments = (storage, 0, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"model": STATE, "x": evil}, lambda evil: {evil: 1}])
def test_nothing_in_a_file_is_run(refused, tmp_path, monkeypatch, legacy, wrap):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trap = tmp_path / "was run"
    torch.save(wrap(Runs(trap)), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    message = refused("x.pt")
    assert re.search(
        r"x\.pt holds a pickled \w+\.mkdir, and loading it would run code from the file; save the", message
    )
    assert not trap.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)  # the trap is armed
    assert trap.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_is_refused_by_its_class(refused, tmp_path, legacy):
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    message = refused("x.pt")
    assert "holds a pickled torch.nn.modules.linear.Linear, and loading it would run code from the file" in message
    assert "save the state dict alone: torch.save(model.state_dict(), path)" in message


def truncated(path: str, legacy: bool = False) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) * 2 // 3])


def without_data(path: str) -> None:
    """A legacy file that lists no storages to read: torch.load leaves the memory as it finds it."""

    class Skip(pickle.Unpickler):
        def persistent_load(self, _: object) -> object:
            return torch.storage.TypedStorage(1000 * 1000, dtype=torch.float32)

    torch.save({"w": torch.ones(1000, 1000)}, path, _use_new_zipfile_serialization=False)
    with open(path, "rb+") as file:
        for _ in range(4):  # magic number, protocol, system, content
            Skip(file).load()
        file.truncate()
        file.write(pickle.dumps([], 2))


def compressed(path: str) -> None:
    torch.save(STATE, "plain")
    with zipfile.ZipFile("plain") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))


def header(path: str, text: bytes, length: int | None = None) -> None:
    Path(path).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text)


def lies(**claims: object) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **claims}}).encode()


HOSTILE = {
    "random": (
        lambda path: Path(path).write_bytes(np.random.default_rng(0).bytes(4096)),
        "is not a file of torch.save",
    ),
    "text": (lambda path: Path(path).write_text("hello\n"), "is not a file of torch.save"),
    "plain pickle": (lambda path: Path(path).write_bytes(pickle.dumps({"a": 1})), "is not a file of torch.save"),
    "empty": (lambda path: Path(path).touch(), "is empty"),
    "directory": (lambda path: Path(path).mkdir(), "is a directory; name the file in it"),
    "fifo": (os.mkfifo, "is not a regular file"),
    "missing": (lambda path: None, "cannot open x.pt: No such file or directory; check the path"),
    "git lfs": (lambda path: Path(path).write_text("version https://git-lfs.github.com/spec/v1\n"), "run git lfs pull"),
    "truncated": (truncated, "or it is damaged"),
    "truncated legacy": (lambda path: truncated(path, legacy=True), "or it is damaged"),
    "zip magic alone": (lambda path: Path(path).write_bytes(b"PK\x03\x04" * 9), "or it is damaged"),
    "zip of something else": (lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"), "not a file of|damaged"),
    "compressed": (compressed, "is a compressed zip, which torch.save does not write"),
    "torchscript": (lambda path: zipfile.ZipFile(path, "w").writestr("a/constants.pkl", b""), "TorchScript archive"),
    "deep nesting": (
        lambda path: archive(path, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        "list instead of a state",
    ),
    "half a pickle": (lambda path: archive(path, b"\x80\x02}"), "or it is damaged"),
    "sparse": (
        lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path),
        "w is stored as sparse_coo; save it dense",
    ),
    "meta": (lambda path: torch.save({"w": torch.empty(3, 3, device="meta")}, path), "w has no data"),
    "more than its storage": (
        lambda path: torch.save({"w": Shaped(torch.ones(4), (10**6, 10**6), (10**6, 1))}, path),
        "or it is damaged",
    ),
    "less than it claims": (without_data, r"claims 4,000,000 bytes of data and has \d{3}; save it again"),
    "safetensors too long": (lambda path: header(path, b"{}", 2**62), "is not a safetensors file"),
    "safetensors half a header": (lambda path: header(path, b'{"w": {"dty'), "is not a safetensors file"),
    "safetensors without data": (lambda path: header(path, lies()), "is not a safetensors file"),
    "safetensors shape": (lambda path: header(path, lies(shape=[2**40, 2**40])), "is not a safetensors file"),
    "safetensors offsets": (lambda path: header(path, lies(data_offsets=[16, 0])), "is not a safetensors file"),
    "safetensors dtype": (lambda path: header(path, lies(dtype="X9")), "is not a safetensors file"),
    "safetensors nesting": (lambda path: header(path, b'{"a":' * 10_000), "is not a safetensors file"),
}


@pytest.mark.filterwarnings("ignore")  # of torch.save, about what it is asked to save here
@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE)
def test_any_other_file_is_one_clear_line(refused, tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make("x.pt")
    assert re.search(message, refused("x.pt"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_clear_line(refused, tmp_path):
    (tmp_path / "x.pt").touch(mode=0o000)
    assert "cannot open x.pt: Permission denied" in refused("x.pt")


def test_a_dictionary_that_holds_itself_is_read(read):
    state: dict = {**STATE, "config": {"w": 1}}
    state["self"] = state
    assert list(read(state)["layers"]) == ["fc.weight"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_view_of_more_entries_than_any_memory_holds_is_not_unfolded(read, legacy):
    found = read({"w": torch.ones(1).expand(10**9, 10**9), "empty": torch.ones(2**40, 0)}, legacy=legacy)
    assert found["rest"]["repeated view"] == {"tensors": 1, "entries": 10**18, "bytes": 4, "nan": 0, "inf": 0}
    assert found["rest"]["empty"]["tensors"] == 1
    assert not found["layers"]


def test_what_a_pickle_sets_on_its_objects_is_not_used(run, tmp_path):
    """An attribute set on an OrderedDict shadows its method of that name."""

    class Shadowed:
        def __reduce__(self) -> tuple:
            attributes = dict.fromkeys(["items", "keys", "values", "get", "__iter__"], "not callable")
            return OrderedDict, (), attributes, None, iter(STATE.items())

    torch.save({"model": Shadowed()}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["model"].items == "not callable"
    code, out, err = run("report", "x.pt", "--json")
    assert (code, err) == (0, "")
    assert list(json.loads(out)["layers"]) == ["fc.weight"]


def test_control_characters_do_not_reach_the_terminal(run, refused, tmp_path):
    name = "fc\x1b]0;title\x07\x1b[2J\u202e\n.weight"
    torch.save({"model\x1b[31m": {name: torch.full((2, 2), torch.nan), f"{name}.bias": 3}}, tmp_path / "x.pt")
    code, out, _ = run("report", "x.pt")
    assert code == 0
    assert out.replace("\n", "").isprintable()
    assert r"fc\x1b]0;title\x07\x1b[2J\u202e\n.weight" in out
    assert name in json.loads(run("report", "x.pt", "--json")[1])["layers"]
    assert r"model\x1b[31m" in refused("x.pt", "--key", "\x1b[2J")


def test_a_name_as_long_as_a_book_is_cut(run, tmp_path):
    torch.save({"w" * 100_000: torch.ones(2, 2)}, tmp_path / "x.pt")
    assert max(map(len, run("report", "x.pt")[1].splitlines())) < 250


def test_without_safetensors_the_line_names_the_extra(refused, tmp_path, monkeypatch):
    save_file(STATE, tmp_path / "x.safetensors")
    monkeypatch.setattr(checkpoint_file.importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[report]'" in refused("x.safetensors")
    assert "\nreport = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- the command itself


@pytest.mark.parametrize("argument", ["-1", "nan", "inf", "much"])
def test_a_threshold_that_is_none_is_refused(run, capsys, argument):
    with pytest.raises(SystemExit) as end:
        run("report", "x.pt", f"--near-zero={argument}")
    assert end.value.code == 2
    assert "--near-zero" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["dashboard", "--help"], ["--version"]])
def test_help_has_examples_that_parse(run, capsys, arguments):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 0
    out = capsys.readouterr().out
    if arguments == ["--version"]:
        assert out == f"torchreg {tr.__version__}, torch {torch.__version__}\n"
        return
    assert max(map(len, out.splitlines())) <= 120
    examples = re.findall(r"^  torchreg (\w.*?)(?:  .*| \|.*)?$", out, re.M)
    assert len(examples) >= 2
    for example in examples:
        parsed = argument_parser().parse_args(example.split())
        assert {parsed.run.__name__} <= {"_report", "_dashboard"}


@pytest.mark.parametrize("arguments", [["report", "--help"], ["report", "x.pt"]])
def test_a_terminal_without_unicode_is_written_to_in_escapes(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    torch.save(STATE, "x.pt")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    with contextlib.suppress(SystemExit):  # as --help ends
        main(arguments)
    assert re.search(rb"\|w\| \\u2264 T|2\\xd73", printed.getvalue())


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server._signals_exit():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(SystemExit) as end:
                signal.raise_signal(signal.SIGTERM)
        assert end.value.code == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_ends_with_130_and_no_traceback(run, tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "x.pt")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "report_on", interrupted)
    assert run("report", "x.pt") == (130, "", "")


def test_the_console_script_is_this_command():
    script = re.search(r'^torchreg = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert getattr(importlib.import_module(script[1]), script[2]) is main


def typed(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "torchreg", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


def test_a_reader_that_leaves_early_ends_no_report_in_a_traceback(tmp_path):
    torch.save({f"layer{i}.weight": torch.ones(2, 3) for i in range(3000)}, tmp_path / "x.pt")
    process = typed("report", "x.pt", cwd=tmp_path)
    head = [process.stdout.readline() for _ in range(5)]
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0
    assert head[4].startswith(b"layer0.weight ")


def test_a_missing_file_typed_in_a_shell_ends_with_2(tmp_path):
    process = typed("report", "x.pt", cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert err == b"torchreg: cannot open x.pt: No such file or directory; check the path\n"


# ---------------------------------------------------------------------- the dashboard


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fetch(url: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as reply:
        assert reply.status == 200
        return reply.read()


def as_it_is(port: int, path: str) -> bytes:
    """The answer to a path that no client has tidied."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    return connection.getresponse().read()


def test_the_dashboard_answers_shows_the_runs_and_leaves_no_process(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    logs = tmp_path / "logs"
    for name in ("l1", "plain"):
        with SummaryWriter(logs / name) as writer:
            writer.add_scalar("overview/sparsity", 0.5, 1)
    secret = tmp_path / "secret"
    secret.write_bytes(b"not for the page")
    (logs / "link").symlink_to(secret)
    port = free_port()
    process = typed("dashboard", str(logs), "--port", str(port), env={"http_proxy": "http://127.0.0.1:9"})
    try:
        shown, overview, charts = (process.stdout.readline().decode().split(maxsplit=1) for _ in range(3))
        assert shown[1] == "l1, plain\n"
        assert b"TensorBoard" in fetch(overview[1].strip())
        assert charts[1].startswith(f"http://127.0.0.1:{port}/#custom_scalars")
        assert json.loads(fetch(f"http://127.0.0.1:{port}/data/runs")) == ["l1", "plain"]
        for path in ("/../secret", "/%2e%2e/secret", "/..%2fsecret", f"/{secret}", "/link", "/data/../../secret"):
            assert b"not for the page" not in as_it_is(port, path)
        with pytest.raises(OSError, match=r"refused|timed out|assign|unreachable"):
            socket.create_connection(("127.0.0.2", port), timeout=5)  # reaches what listens on every address
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(OSError, match="refused"):
        fetch(f"http://127.0.0.1:{port}/data/runs")
    if Path("/proc/self/cmdline").exists():
        end = time.monotonic() + 10  # its data server ends with it, but not in the same instant
        while left := [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(logs).encode() in content(path)]:
            assert time.monotonic() < end, left
            time.sleep(0.05)


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended since
        return b""


def test_the_link_opens_the_overview_pinned_and_without_smoothing():
    overview, _ = server.links("127.0.0.1", 6006)
    parts = urllib.parse.urlsplit(overview)
    query = urllib.parse.parse_qs(parts.query, strict_parsing=True)
    assert (parts.netloc, parts.path, parts.fragment) == ("127.0.0.1:6006", "/", "timeseries")
    assert query["smoothing"] == ["0"]
    assert json.loads(query["pinnedCards"][0]) == [
        {"plugin": "scalars", "tag": "overview/sparsity"},
        {"plugin": "scalars", "tag": "overview/accuracy"},
    ]
    assert re.fullmatch(r"[\w:/?=&%.#-]+", overview), "a terminal makes a link of it to its end"


@pytest.mark.parametrize(
    ("host", "where"), [("0.0.0.0", "127.0.0.1:1"), ("::", "[::1]:1"), ("::1", "[::1]:1"), ("box", "box:1")]
)
def test_the_link_names_an_address_that_this_machine_reaches(host, where):
    assert urllib.parse.urlsplit(server.links(host, 1)[0]).netloc == where


class Board:
    """TensorBoard's place in the program: a server that answers with no runs."""

    flags: ClassVar[dict[str, object]] = {}

    def configure(self, **flags: object) -> None:
        self.flags.update(flags)

    def launch(self) -> str:
        handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"do_GET": self.answer, "log_request": print})
        server = http.server.HTTPServer((self.flags["host"], self.flags["port"]), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return "http://127.0.0.1:6006/"

    @staticmethod
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"[]")


@pytest.fixture
def board(monkeypatch):
    """Puts `Board` in TensorBoard's place, with another `launch` if one is given."""

    def put(launch: object = Board.launch) -> type[Board]:
        kind = type("Board", (Board,), {"launch": launch, "flags": {}})
        monkeypatch.setattr(tensorboard, "program", types.SimpleNamespace(TensorBoard=kind), raising=False)
        return kind

    return put


def test_a_directory_that_is_missing_or_a_file_ends_with_2(run):
    Path("file").touch()
    assert run("dashboard", "runs") == (2, "", "torchreg: runs does not exist; name the log directory, such as runs\n")
    assert run("dashboard", "file")[2] == "torchreg: file is a file; name the log directory, such as runs\n"


def test_a_port_that_is_taken_ends_with_2(run):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        code, out, err = run("dashboard", ".", "--port", str(port))
    assert (code, out) == (2, "")
    assert err.startswith(f"torchreg: cannot listen on 127.0.0.1 port {port}: Address already in use; leave --port out")


def test_a_host_that_is_not_this_machine_ends_with_2(run):
    code, _, err = run("dashboard", ".", "--host", "192.0.2.1")
    assert (code, err.partition(":")[0], "192.0.2.1" in err) == (2, "torchreg", True)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_a_port_that_is_none_is_refused(run, port):
    with pytest.raises(SystemExit):
        run("dashboard", ".", f"--port={port}")


def test_without_tensorboard_the_line_names_the_extra(run, monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[tensorboard]'" in run("dashboard", ".")[2]


class Refused(Exception):
    """An error with a message of its own, as TensorBoard has it."""

    def __init__(self, msg: str) -> None:
        self.msg = msg


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Refused("its \x1b[31mlast words"), "its \\x1b[31mlast words"),
        (RuntimeError("no threads"), "RuntimeError: no threads"),
    ],
)
def test_a_tensorboard_that_does_not_start_is_quoted(run, board, error, words):
    def launch(_: Board) -> str:
        print("chatter", file=sys.stderr)
        raise error

    board(launch)
    code, out, err = run("dashboard", ".")
    assert (code, out) == (2, "")
    assert err.startswith(f"torchreg: TensorBoard did not start: {words}; check the installation")


def test_an_empty_directory_is_said_and_the_browser_opens_the_overview(run, board, monkeypatch):
    opened: list[str] = []

    def interrupted(link: str) -> None:
        opened.append(link)
        raise KeyboardInterrupt

    monkeypatch.setattr(server.webbrowser, "open", interrupted)
    kind = board()
    code, out, err = run("dashboard", ".", "--open")
    assert (code, err) == (130, "")
    *_, said, overview, charts, end = out.splitlines()
    assert said == "no event files yet: it will show them as they come"
    assert overview.startswith("overview: http://127.0.0.1:")
    assert charts.startswith("charts:   http://127.0.0.1:")
    assert end == "Ctrl-C stops it"
    assert opened == [overview.split()[1]]
    port = urllib.parse.urlsplit(opened[0]).port
    assert kind.flags == {"logdir": str(Path.cwd()), "host": "127.0.0.1", "port": port, "reload_interval": 5}


def test_runs_that_are_not_read_in_time_do_not_hold_the_links_back(run, board, monkeypatch):
    Path("events.out.tfevents.0.host").touch()
    monkeypatch.setattr(server, "_LOADING_SECONDS", 0.3)
    monkeypatch.setattr(server.webbrowser, "open", lambda link: signal.raise_signal(signal.SIGINT))
    board()
    assert "runs: .\noverview:" in run("dashboard", ".", "--open")[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_starts_ends_with_its_number(run, board, number):
    def leave(*_: object) -> None:
        raise AssertionError("the handler of the caller")

    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else leave)
    try:
        board(lambda _: signal.raise_signal(number))
        if number == signal.SIGINT:
            assert run("dashboard", ".") == (130, "", "")
        else:
            with pytest.raises(SystemExit) as end:
                run("dashboard", ".")
            assert end.value.code == 128 + number
            assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)


def test_ctrl_c_stops_a_dashboard_that_runs(tmp_path):
    process = typed("dashboard", str(tmp_path), start_new_session=True)
    try:
        assert any(line.startswith(b"Ctrl-C") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()


def test_6006_is_taken_when_it_is_free_and_another_when_it_is_not():
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", 6006))
        except OSError:  # someone has it already
            pass
        else:
            listener.listen()
        assert server._free_port("127.0.0.1", None) != 6006
