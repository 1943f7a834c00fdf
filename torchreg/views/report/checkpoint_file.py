"""The named tensors of a checkpoint file from an untrusted source. Reading a file runs no code from it."""

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
    """A file is not a checkpoint that can be read; the message gives the reason and the next move."""


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as it is stored in a file.

    Attributes:
        path, format, size: the file, "torch.save" or "safetensors", and its number of bytes.
        key: the dotted key of the state dict in the file; "" if it is the whole file.
        tensors: each tensor once, by its name without wrappers, in the order of the file.
        ties: for a tensor with several names, the other names by the first one.
        skipped: the names of the entries that are not tensors.
    """

    path: str
    format: str
    size: int
    key: str
    tensors: dict[str, Tensor]
    ties: dict[str, tuple[str, ...]]
    skipped: tuple[str, ...]


def read_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Reads the state dict of a file written by torch.save, in its zip or legacy format, or by safetensors.

    Only tensors and plain containers are unpickled. The data are memory-mapped where the format allows it.

    Args:
        path: the file.
        key: the dotted key of the state dict in the file: "model", "ema.shadow". Without it the file must be a state
            dict, or hold exactly one.
    Returns:
        A `Checkpoint` with its tensors on the CPU.
    Raises:
        CheckpointError: the file cannot be opened, is damaged, or holds pickled objects, no state dict or several.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "run.pt")
    >>> torch.save({"epoch": 3, "model": nn.Linear(3, 2).state_dict()}, path)
    >>> checkpoint = read_checkpoint(path)
    >>> checkpoint.key, list(checkpoint.tensors)
    ('model', ['weight', 'bias'])
    """
    head, size = _head(path)
    if str(path).endswith(".safetensors") or head[8:9] == b"{":  # the length of the header, and the header in JSON
        kind, content = "safetensors", _load_safetensors(path)
    else:
        kind, content = "torch.save", _load_torch(path, head)
    state_key, entries = _state_dict(path, content, key)
    tensors, skipped = {}, []
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            skipped.append(str(name) if isinstance(name, str) else type(name).__name__)
        elif isinstance(name, str):
            tensors[name] = Tensor.detach(value)  # the method of the class, since a pickle may set attributes
        else:
            raise CheckpointError(f"{path} has a tensor under a {type(name).__name__} for a name; {_SAVE}")
    _validate(path, tensors, size)
    names = _without_wrappers(list(tensors))
    distinct, ties = _without_ties(dict(zip(names, tensors.values(), strict=True)))
    return Checkpoint(str(path), kind, size, state_key, distinct, ties, tuple(skipped))


def _head(path: str | Path) -> tuple[bytes, int]:
    """The first bytes of the file, and its size."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path} is a directory; name the file in it")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file; copy its content to one")
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror}; check the path") from None
    if not head:
        raise CheckpointError(f"{path} is empty; save it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer and not the file itself; run git lfs pull")
    return head, status.st_size


def _load_torch(path: str | Path, head: bytes) -> object:
    zipped = head.startswith(b"PK\x03\x04")
    try:
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises a dozen types of errors for a broken file
        if pickled := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds a pickled {printable(pickled[1])}, and loading it would run code from the file; {_SAVE}"
            ) from None
        raise CheckpointError(
            f"{path} is not a file of torch.save or safetensors, or it is damaged ({type(error).__name__}); save it "
            "again"
        ) from None


def _check_archive(path: str | Path) -> None:
    """Refuses zip files that torch.save does not write."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(f"{path} is a TorchScript archive, which is code; {_SAVE}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        # torch.save never compresses; a few compressed bytes could expand to more than the memory holds.
        raise CheckpointError(f"{path} is a compressed zip, which torch.save does not write; unpack it first")


def _load_safetensors(path: str | Path) -> object:
    if importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(f"{path} needs the package safetensors; install it: pip install '.[report]'")
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # The format keeps no order. Numbers are padded, so that layer 2 comes before layer 10.
            names = sorted(file.keys(), key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:
        raise CheckpointError(f"{path} is not a safetensors file, or it is damaged ({error}); save it again") from None


def _state_dict(path: str | Path, content: object, key: str | None) -> tuple[str, dict[object, object]]:
    """The dotted key of the state dict in `content`, and its entries."""
    source = content if key is None else _follow_key(path, content, key)
    entries = _entries(source)
    nested = [
        name
        for name, value in entries.items()
        if isinstance(name, str)
        and not name.endswith("_extra_state")  # a module's extra state is part of its state dict
        and value is not source
        and _has_tensors(_entries(value))
    ]
    if {"state_dict", "pytorch-lightning_version"} <= entries.keys():  # Lightning's callbacks may hold tensors too
        nested = [name for name in nested if name == "state_dict"]
    if _has_tensors(entries) and (key is not None or not nested):
        return key or "", entries
    prefix = f"{key}." if key else ""
    if len(nested) == 1:
        return prefix + nested[0], _entries(entries[nested[0]])
    place = f"{path} at {key}" if key else str(path)
    if nested:
        keys = _name_list(prefix + name for name in nested)
        raise CheckpointError(f"{place} holds {len(nested)} state dicts, {keys}; choose one: --key {prefix}{nested[0]}")
    if not isinstance(source, dict):
        raise CheckpointError(f"{place} holds a {type(source).__name__} instead of a state dict; {_SAVE}")
    keys = _name_list(entries)
    raise CheckpointError(f"{place} holds no tensors by name; its keys are {keys}; {_SAVE}, or choose --key")


def _follow_key(path: str | Path, content: object, key: str) -> object:
    """The value under the dotted `key`. The names of entries may have dots too."""
    value, parts = content, key.split(".")
    while parts:
        entries = _entries(value)
        length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in entries), 0)
        if not length:
            raise CheckpointError(
                f"{path} has no {parts[0]} for --key {key}; at this place it holds {_name_list(entries)}"
            )
        value, parts = entries[".".join(parts[:length])], parts[length:]
    return value


def _entries(value: object) -> dict[object, object]:
    # dict.items of the class, since a pickle may set attributes on an OrderedDict, "items" among them.
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def _has_tensors(entries: dict[object, object]) -> bool:
    return any(isinstance(value, Tensor) for value in entries.values())


def _name_list(names: Iterable[object]) -> str:
    """The first eight names, and the number of the others."""
    texts = [printable(name, 40) if isinstance(name, str) else f"a {type(name).__name__}" for name in names]
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    return ", ".join(texts[:8]) + more or "nothing"


def _validate(path: str | Path, tensors: dict[str, Tensor], size: int) -> None:
    """Refuses tensors whose zeros cannot be counted, and tensors that claim more data than the file holds."""
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


def _without_wrappers(names: list[str]) -> list[str]:
    """Names without the prefixes of wrappers: DataParallel and others put the same `module.` before each name."""
    plain = [unwrapped(name) for name in names]
    prefixed = [name for name in plain if name != "n_averaged"]  # an entry of AveragedModel itself
    depth = min((len(name) - len(re.sub(r"^(module\.)+", "", name)) for name in prefixed), default=0)
    plain = [name if name == "n_averaged" else name[depth:] for name in plain]
    return plain if len(set(plain)) == len(plain) else names


def _without_ties(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Each tensor by its first name, and its other names by the first one."""
    first: dict[object, str] = {}
    ties: dict[str, tuple[str, ...]] = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        origin = first.setdefault(memory, name)
        if origin != name:
            ties[origin] = (*ties.get(origin, ()), name)
    return {name: tensors[name] for name in first.values()}, ties
