"""Checkpoints: the named tensors of a file that nobody vouches for. Nothing in it is run."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchreg._tables import printable
from torchreg.binding.selection import unwrapped

_SAVE = "save the state dict alone: torch.save(model.state_dict(), path)"


class CheckpointError(ValueError):
    """A file is no checkpoint that can be read; the message says why, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as it lies in a file.

    Attributes:
        path, format, size: the file, "torch.save" or "safetensors", and its bytes.
        key: where in the file the state dict was found, dotted; "" if it is the whole file.
        tensors: each tensor once, by its name without wrappers, in the file's order.
        ties: the other names of a tensor that has several, by its first.
        skipped: the names of entries that are no tensors.
    """

    path: str
    format: str
    size: int
    key: str
    tensors: dict[str, Tensor]
    ties: dict[str, tuple[str, ...]]
    skipped: tuple[str, ...]


def read(path: str | Path, key: str | None = None) -> Checkpoint:
    """Reads the state dict of a file written by torch.save, in its zip or legacy format, or by safetensors.

    Only tensors and plain containers are unpickled, and the data are mapped, not read, where the format allows it.

    Args:
        path: the file.
        key: where in it the state dict lies, dotted: "model", "ema.shadow". Without it the file is a state dict, or
            holds one.
    Returns:
        A `Checkpoint`, its tensors on the CPU.
    Raises:
        CheckpointError: it cannot be opened, is damaged, holds pickled objects, no state dict, or several.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "run.pt")
    >>> torch.save({"epoch": 3, "model": nn.Linear(3, 2).state_dict()}, path)
    >>> found = read(path)
    >>> found.key, list(found.tensors)
    ('model', ['weight', 'bias'])
    """
    head, size = _head(path)
    if str(path).endswith(".safetensors") or head[8:9] == b"{":  # a header's length, and the header in JSON
        kind, content = "safetensors", _safetensors(path)
    else:
        kind, content = "torch.save", _torch(path, head)
    where, entries = _state_dict(path, content, key)
    tensors, skipped = {}, []
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            skipped.append(str(name) if isinstance(name, str) else type(name).__name__)
        elif isinstance(name, str):
            tensors[name] = Tensor.detach(value)  # from the class: a pickle may set attributes on a tensor
        else:
            raise CheckpointError(f"{path} has a tensor under a {type(name).__name__} for a name; {_SAVE}")
    _validate(path, tensors, size)
    once, ties = _once(dict(zip(_clean(list(tensors)), tensors.values(), strict=True)))
    return Checkpoint(str(path), kind, size, where, once, ties, tuple(skipped))


def _head(path: str | Path) -> tuple[bytes, int]:
    """The file's first bytes, and its size."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path} is a directory; name the file in it")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no regular file; copy what it gives to one")
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror}; check the path") from None
    if not head:
        raise CheckpointError(f"{path} is empty; save it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer and not the file itself; run git lfs pull")
    return head, status.st_size


def _torch(path: str | Path, head: bytes) -> object:
    zipped = head.startswith(b"PK\x03\x04")
    try:
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # what a broken file makes of torch.load is of a dozen types
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds a pickled {printable(refused[1])}, and loading it would run code from the file; {_SAVE}"
            ) from None
        raise CheckpointError(
            f"{path} is no file of torch.save or safetensors, or it is damaged ({type(error).__name__}); save it again"
        ) from None


def _check_archive(path: str | Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(f"{path} is a TorchScript archive, which is code; {_SAVE}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        # torch.save never compresses; a few bytes could unpack to more than the memory holds.
        raise CheckpointError(f"{path} is a compressed zip, which torch.save does not write; unpack it first")


def _safetensors(path: str | Path) -> object:
    if importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(f"{path} is read by the package safetensors; install it: pip install '.[report]'")
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # The format keeps no order: layer 2 before layer 10.
            names = sorted(file.keys(), key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:
        raise CheckpointError(f"{path} is no safetensors file, or it is damaged ({error}); save it again") from None


def _state_dict(path: str | Path, content: object, key: str | None) -> tuple[str, dict[object, object]]:
    """Where in `content` the state dict lies, and its entries."""
    source = content if key is None else _follow(path, content, key)
    entries = _entries(source)
    nested = [
        name
        for name, value in entries.items()
        if isinstance(name, str)
        and not name.endswith("_extra_state")  # a module's own, inside a state dict
        and value is not source
        and _has_tensors(_entries(value))
    ]
    if {"state_dict", "pytorch-lightning_version"} <= entries.keys():  # its callbacks may hold tensors too
        nested = [name for name in nested if name == "state_dict"]
    if _has_tensors(entries) and (key is not None or not nested):
        return key or "", entries
    prefix = f"{key}." if key else ""
    if len(nested) == 1:
        return prefix + nested[0], _entries(entries[nested[0]])
    here = f"{path} at {key}" if key else str(path)
    if nested:
        found = _listed(prefix + name for name in nested)
        raise CheckpointError(f"{here} holds {len(nested)} state dicts, {found}; choose one: --key {prefix}{nested[0]}")
    if not isinstance(source, dict):
        raise CheckpointError(f"{here} holds a {type(source).__name__} and no state dict; {_SAVE}")
    raise CheckpointError(f"{here} holds no tensors by name; its keys are {_listed(entries)}; {_SAVE}, or choose --key")


def _follow(path: str | Path, content: object, key: str) -> object:
    """What lies under the dotted `key`, whose steps may have dots of their own."""
    value, steps = content, key.split(".")
    while steps:
        entries = _entries(value)
        taken = next((n for n in range(len(steps), 0, -1) if ".".join(steps[:n]) in entries), 0)
        if not taken:
            raise CheckpointError(f"{path} has no {steps[0]} for --key {key}; there it holds {_listed(entries)}")
        value, steps = entries[".".join(steps[:taken])], steps[taken:]
    return value


def _entries(value: object) -> dict[object, object]:
    # dict.items, since a pickle may set attributes on an OrderedDict, "items" among them.
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def _has_tensors(entries: dict[object, object]) -> bool:
    return any(isinstance(value, Tensor) for value in entries.values())


def _listed(names: Iterable[object]) -> str:
    texts = [printable(name, 40) if isinstance(name, str) else f"a {type(name).__name__}" for name in names]
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    return ", ".join(texts[:8]) + more or "nothing"


def _validate(path: str | Path, tensors: dict[str, Tensor], size: int) -> None:
    """Refuses what cannot be counted, and what claims to be more than the file holds."""
    storages: dict[int, int] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            kind = str(tensor.layout).removeprefix("torch.")
            raise CheckpointError(f"{path}: {name} is stored as {kind}; save it dense: tensor.to_dense()")
        if tensor.is_meta:
            raise CheckpointError(f"{path}: {name} has no data (device meta); save the model once it is materialized")
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    if sum(storages.values()) > size:
        raise CheckpointError(f"{path} claims {sum(storages.values()):,} bytes of data and has {size:,}; save it again")


def _clean(names: list[str]) -> list[str]:
    """Names without wrappers: DataParallel and the like put the same `module.` before every one."""
    plain = [unwrapped(name) for name in names]
    wrapped = [name for name in plain if name != "n_averaged"]  # an AveragedModel's own
    depth = min((len(name) - len(re.sub(r"^(module\.)+", "", name)) for name in wrapped), default=0)
    plain = [name if name == "n_averaged" else name[depth:] for name in plain]
    return plain if len(set(plain)) == len(plain) else names


def _once(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Each tensor by its first name, and its other names by that one."""
    first: dict[object, str] = {}
    ties: dict[str, tuple[str, ...]] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        origin = first.setdefault(place, name)
        if origin != name:
            ties[origin] = (*ties.get(origin, ()), name)
    return {name: tensors[name] for name in first.values()}, ties
