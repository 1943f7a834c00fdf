"""The sinks of events: a file that is written record by record, or a SummaryWriter of the user."""

from __future__ import annotations

import os
import re
import socket
import struct
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchreg.views.tensorboard import records

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PATTERN = "events.out.tfevents.*"


class EventFile:
    """Appends events to a new file of a log directory.

    TensorBoard's own writer passes each record to a thread that computes its checksum in Python, 0.3 µs per byte, and
    keeps it for up to two minutes. Here the operating system has the record when `write` returns: a killed process
    loses no records, and the caller of `write` can catch its errors.

    Args:
        folder: the log directory of the run, which is created if it is missing.
        step: the step of the first event. If the directory holds earlier files, their records from this step on are
            declared void, so that a run that goes on from a checkpoint continues its curves.
    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._checksum = _masked_checksum()
        folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(folder.glob(PATTERN))
        # TensorBoard reads the files in the order of their names, which start with the second of their creation.
        stamps = [path.name.split(".")[3] for path in earlier]
        seconds = [int(stamp) + 1 for stamp in stamps if re.fullmatch("[0-9]{1,10}", stamp)]
        second = max([int(time.time()), *seconds])
        self._path = folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.torchreg"
        self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115  closed by close(), or at exit
        self.close = weakref.finalize(self, self._file.close)
        self.write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.earlier = bool(earlier)
        if earlier:
            self.write(records.restart(step))

    def write(self, event: Any) -> None:
        """Appends an `Event`, whose wall time and step the caller has set."""
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError(f"{self._path} was removed")
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = b"".join((length, self._checksum(length), data, self._checksum(data)))
        if self._file.write(record) != len(record):
            raise OSError(f"{self._path} cannot grow: the disk is full")

    def flush(self) -> None:
        """Does nothing, since every record is already written."""


class BorrowedWriter:
    """Writes events into a SummaryWriter of the user, which stays open."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def write(self, event: Any) -> None:
        """Passes an `Event` to the SummaryWriter."""
        file = self._writer.file_writer
        if file is None:
            raise OSError("the SummaryWriter is closed")
        file.event_writer.add_event(event)

    def flush(self) -> None:
        """Waits until all records are on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes; the SummaryWriter stays open."""
        self.flush()


Sink = EventFile | BorrowedWriter


def opener(writer: str | os.PathLike[str] | SummaryWriter) -> tuple[str, Callable[[int], Sink]]:
    """The name of a writer for messages, and the function that opens it for a first step.

    Raises:
        TypeError: `writer` is neither a path nor a SummaryWriter.
        ValueError: the path is empty.
        NotADirectoryError, PermissionError: the directory cannot be created.
    """
    if isinstance(writer, (str, os.PathLike)) and "://" not in os.fspath(writer):
        folder = Path(writer)
        if not os.fspath(writer):
            raise ValueError("the log directory has no name; pass one for this run, such as runs/l1")
        absolute = folder.absolute()  # the training may change its working directory before the first step
        ancestor = next(path for path in (absolute, *absolute.parents) if path.exists())
        if not ancestor.is_dir():
            raise NotADirectoryError(
                f"{ancestor} is a file; pass a directory for the logs of this run, such as runs/l1"
            )
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise PermissionError(f"{ancestor} cannot be written to; pass another directory for the logs of this run")
        return str(folder), lambda step: EventFile(absolute, step)
    from torch.utils.tensorboard import SummaryWriter

    if isinstance(writer, (str, os.PathLike)):  # a storage bucket, which TensorBoard's own writer supports
        address = os.fspath(writer)
        return address, lambda step: BorrowedWriter(SummaryWriter(address, purge_step=step))
    if isinstance(writer, SummaryWriter):
        return str(writer.log_dir), lambda step: BorrowedWriter(writer)
    raise TypeError(
        f"writer is a {type(writer).__module__}.{type(writer).__qualname__}; pass a log directory such as runs/l1, or "
        "a torch.utils.tensorboard.SummaryWriter. For another logger pass the numbers to it: log(torchreg.measure(reg))"
    )


def _masked_checksum() -> Callable[[bytes], bytes]:
    """CRC-32C, masked as in TFRecord files; without google-crc32c it is computed in Python, which is slow."""
    try:
        import google_crc32c
    except ImportError:
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        return lambda data: struct.pack("<I", masked_crc32c(data))

    def checksum(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    return checksum
