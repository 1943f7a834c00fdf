"""The data of the examples: from disk, from a server, and without a network."""

import gzip
import hashlib
import http.server
import importlib.util
import os
import socket
import struct
import threading
import time

import pytest
import torch
from torchvision.datasets import MNIST

from tests import ROOT

EXAMPLES = ROOT / "examples"
REAL = os.environ.get("TORCHREG_DATA")


@pytest.fixture
def mnist_data(monkeypatch):
    spec = importlib.util.spec_from_file_location("mnist_data", EXAMPLES / "mnist_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    return module


def idx(array: torch.Tensor) -> bytes:
    """The IDX format that MNIST is published in: two zero bytes, the type 8, the number of dimensions, the sizes."""
    return struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape) + bytes(array.flatten().tolist())


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return {
        "train-images-idx3-ubyte": torch.randint(0, 256, (6, 28, 28), generator=generator),
        "train-labels-idx1-ubyte": torch.arange(6),
        "t10k-images-idx3-ubyte": torch.randint(0, 256, (3, 28, 28), generator=generator),
        "t10k-labels-idx1-ubyte": torch.arange(3),
    }


def check(loaded, images):
    x_train, y_train, x_test, y_test, _ = loaded
    assert torch.equal(x_train, images["train-images-idx3-ubyte"].flatten(1) / 255)
    assert torch.equal(x_test, images["t10k-images-idx3-ubyte"].flatten(1) / 255)
    assert y_train.tolist() == list(range(6))
    assert y_test.tolist() == list(range(3))


def test_the_folder_named_by_the_environment_is_read_without_a_network(mnist_data, images, tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in images.items():
        (raw / name).write_bytes(idx(array))
    monkeypatch.setenv("TORCHREG_DATA", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("asked the network"))
    loaded = mnist_data.load()
    check(loaded, images)
    assert loaded[4] == f"MNIST from {tmp_path}"


def test_what_is_missing_is_downloaded_once(mnist_data, images, tmp_path, monkeypatch):
    site, cache, asked = tmp_path / "site", tmp_path / "cache", []
    site.mkdir()
    for name, array in images.items():
        (site / f"{name}.gz").write_bytes(gzip.compress(idx(array)))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(site))

        def log_message(self, format, *args):
            asked.append(args[0])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in sorted(site.iterdir())]
    monkeypatch.setattr(MNIST, "resources", sums)
    try:
        loaded = mnist_data.load(cache)
    finally:
        server.shutdown()
        server.server_close()
    check(loaded, images)
    assert "downloaded" in loaded[4]
    assert {line.split()[1] for line in asked} == {f"/{name}.gz" for name in images}
    check(mnist_data.load(cache), images)  # the server is gone: this comes from the cache
    assert socket.getdefaulttimeout() is None


def is_digits(loaded) -> bool:
    return loaded[0].shape == (1437, 64) and loaded[2].shape == (360, 64) and "digits" in loaded[4]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_refused_network_gives_the_digits_and_says_so(mnist_data, tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{free_port()}/"])
    loaded = mnist_data.load(tmp_path)
    assert is_digits(loaded)
    assert "refused" in loaded[4]
    assert "\n" not in loaded[4]


def test_a_silent_server_is_given_up_in_seconds(mnist_data, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        started = time.monotonic()
        assert is_digits(mnist_data.load(tmp_path))
    assert time.monotonic() - started < 10
    assert socket.getdefaulttimeout() is None


def test_a_look_up_that_hangs_is_given_up_in_seconds(mnist_data, tmp_path, monkeypatch):
    released = threading.Event()

    def hang(*args, **kwargs):
        released.wait()
        raise OSError("released")

    monkeypatch.setattr(socket, "create_connection", hang)
    started = time.monotonic()
    try:
        assert is_digits(mnist_data.load(tmp_path))
    finally:
        released.set()
    assert time.monotonic() - started < 10


@pytest.mark.skipif(REAL is None, reason="TORCHREG_DATA is unset: no real MNIST to read")
def test_the_real_mnist_is_what_the_field_measures_on(mnist_data):
    x_train, y_train, x_test, y_test, line = mnist_data.load()
    assert (x_train.shape, x_test.shape) == ((60_000, 784), (10_000, 784))
    assert y_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.bincount(y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert 0.0 == x_train.min() < x_train.max() == 1.0
    assert "MNIST" in line
