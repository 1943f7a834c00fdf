"""Where events go: a file of one's own, written record by record, or a SummaryWriter of the user's."""

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

    TensorBoard's own writer hands each record to a thread that works out its checksum in Python, 0.3 µs a byte, and
    keeps it for up to two minutes. Here a record is with the system when `write` returns, so that a process that is
    killed loses nothing, and an error is raised where it can be caught.

    Args:
        folder: the log directory of the run; it is made where it is missing.
        step: the step that the first event will have. Where earlier files stand, what they hold from that step on
            is declared void: a run that went back to a checkpoint continues its curves.
    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._checksum = _masked_checksum()
        folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(folder.glob(PATTERN))
        # TensorBoard reads the files in the order of their names, which begin with the second they were made in.
        stamps = [path.name.split(".")[3] for path in earlier]
        seconds = [int(stamp) + 1 for stamp in stamps if re.fullmatch("[0-9]{1,10}", stamp)]
        second = max([int(time.time()), *seconds])
        self._path = folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.torchreg"
        self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115  closed by close(), or when all is over
        self.close = weakref.finalize(self, self._file.close)
        self.write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.earlier = bool(earlier)
        if earlier:
            self.write(records.restart(step))

    def write(self, event: Any) -> None:
        """Appends an `Event`; its wall time and step are the caller's."""
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise FileNotFoundError(f"{self._path} was removed")
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = b"".join((length, self._checksum(length), data, self._checksum(data)))
        if self._file.write(record) != len(record):
            raise OSError(f"{self._path} takes no more: the disk is full")

    def flush(self) -> None:
        """Nothing waits to be written."""


class BorrowedWriter:
    """The same face for a SummaryWriter that is the user's, and stays open."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def write(self, event: Any) -> None:
        """Hands over an `Event`."""
        file = self._writer.file_writer
        if file is None:
            raise OSError("the SummaryWriter is closed")
        file.event_writer.add_event(event)

    def flush(self) -> None:
        """Waits until all is on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Only flushes."""
        self.flush()


Sink = EventFile | BorrowedWriter


def opener(writer: str | os.PathLike[str] | SummaryWriter) -> tuple[str, Callable[[int], Sink]]:
    """What the writer is called, and how it is opened for a first step.

    Raises:
        TypeError: it is neither a path nor a SummaryWriter.
        ValueError: the path is empty.
        NotADirectoryError, PermissionError: no directory can be made there.
    """
    if isinstance(writer, (str, os.PathLike)) and "://" not in os.fspath(writer):
        folder = Path(writer)
        if not os.fspath(writer):
            raise ValueError("the log directory has no name; pass one for this run, such as runs/l1")
        place = folder.absolute()  # it stays where it is when the training changes its directory
        there = next(path for path in (place, *place.parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file; pass a directory for the logs of this run, such as runs/l1")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(f"{there} cannot be written to; pass another directory for the logs of this run")
        return str(folder), lambda step: EventFile(place, step)
    from torch.utils.tensorboard import SummaryWriter

    if isinstance(writer, (str, os.PathLike)):  # a bucket, which TensorBoard's own writer knows how to reach
        address = os.fspath(writer)
        return address, lambda step: BorrowedWriter(SummaryWriter(address, purge_step=step))
    if isinstance(writer, SummaryWriter):
        return str(writer.log_dir), lambda step: BorrowedWriter(writer)
    raise TypeError(
        f"writer is a {type(writer).__module__}.{type(writer).__qualname__}; pass a log directory such as runs/l1, or "
        "a torch.utils.tensorboard.SummaryWriter. Any other logger takes the numbers: log(torchreg.measure(reg))"
    )


def _masked_checksum() -> Callable[[bytes], bytes]:
    """CRC-32C, masked as in TFRecord files; in Python, and slow, where google-crc32c is not installed."""
    try:
        import google_crc32c
    except ImportError:
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        return lambda data: struct.pack("<I", masked_crc32c(data))

    def checksum(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    return checksum
