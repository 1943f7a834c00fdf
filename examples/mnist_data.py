"""MNIST as tensors for the examples: from disk, else from the network, else scikit-learn's bundled digits instead."""

from __future__ import annotations

import http.client
import os
import socket
import threading
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor
from torchvision.datasets import MNIST

PATIENCE = 5.0  # seconds; after these a silent network counts as none


def load(root: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """(training images, labels, test images, labels, one line that says what they are).

    Images are rows of pixels in [0, 1], so that an epoch is compute and not decoding. They come from `root`, by
    default the folder named by TORCHREG_DATA or ~/.cache/torchreg; missing there, they are downloaded into it.
    Without a network they are scikit-learn's 8×8 digits, and the line says so.
    """
    root = Path(root or os.environ.get("TORCHREG_DATA") or Path.home() / ".cache" / "torchreg").expanduser()
    try:
        return (*_mnist(root, download=False), f"MNIST from {root}")
    except RuntimeError as error:
        missing = error
    reason = _unreachable(MNIST.mirrors)
    if not reason:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(PATIENCE)  # torchvision sets none
        try:
            return (*_mnist(root, download=True), f"MNIST, downloaded to {root}")
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            reason = str(error).strip() or type(error).__name__
        finally:
            socket.setdefaulttimeout(timeout)
    line = f"no MNIST in {root} ({missing}) and none from the network ({reason}): using scikit-learn's digits instead"
    return (*_digits(), " ".join(line.split()))


def _mnist(root: Path, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train = MNIST(root, train=True, download=download)
    test = MNIST(root, train=False, download=download)
    return _rows(train.data), train.targets, _rows(test.data), test.targets


def _rows(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 255


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = shuffled[:1437], shuffled[1437:]
    return x[train], y[train], x[test], y[test]


def _unreachable(mirrors: list[str]) -> str:
    """Why no mirror can be reached, or "" if one answers; in seconds, because a look-up of a name has no timeout."""
    reasons = ["no answer in time"]

    def knock(url: str) -> None:
        address = urlparse(url)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname, port), timeout=PATIENCE).close()
            answered.set()
        except OSError as error:
            reasons.append(f"{address.hostname}: {error}")

    answered = threading.Event()
    threads = [threading.Thread(target=knock, args=(url,), daemon=True) for url in mirrors]
    for thread in threads:
        thread.start()
    deadline = PATIENCE / len(threads)
    for thread in threads:
        thread.join(deadline)
        if answered.is_set():
            return ""
    return reasons[-1]
