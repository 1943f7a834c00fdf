"""The dashboard: TensorBoard as a process of its own, and the links that open it on the overview."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from torchreg._tables import printable

_PINNED = ("overview/sparsity", "overview/accuracy")
_START = 120.0  # seconds until TensorBoard must answer: a cold start from a slow disk takes half a minute
_LOAD = 10.0  # seconds more until it has read the runs that are there
_STOP = 5.0  # seconds between asking it to end and making it


class ServerError(RuntimeError):
    """TensorBoard cannot be started or has died; the message says why, and what to do."""


def links(host: str, port: int) -> tuple[str, str]:
    """Where the overview and the custom charts open: smoothing off, sparsity and accuracy pinned.

    >>> overview, charts = links("127.0.0.1", 6006)
    >>> charts
    'http://127.0.0.1:6006/#custom_scalars&_smoothingWeight=0'
    """
    pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in _PINNED], separators=(",", ":"))
    query = urllib.parse.urlencode({"smoothing": 0, "pinnedCards": pinned})
    base = _base(host, port)
    return f"{base}/?{query}#timeseries", f"{base}/#custom_scalars&_smoothingWeight=0"


def runs(logdir: str | Path) -> list[str]:
    """The runs under a log directory, as TensorBoard names them: "." is the directory itself.

    >>> log = Path(tempfile.mkdtemp())
    >>> (log / "l1").mkdir()
    >>> (log / "l1" / "events.out.tfevents.0.host").touch()
    >>> runs(log)
    ['l1']
    """
    return sorted(
        os.path.relpath(folder, logdir) for folder, _, files in os.walk(logdir) if any("tfevents" in f for f in files)
    )


def serve(logdir: str, host: str = "127.0.0.1", port: int | None = None, *, browse: bool = False) -> int:
    """Starts TensorBoard, prints its links, and stops it on Ctrl-C, SIGTERM or SIGHUP.

    Args:
        logdir: the directory of the event files.
        host, port: where it listens; without a port, 6006 or a free one.
        browse: opens the overview in a browser too.
    Returns:
        128 + the signal that ended it.
    Raises:
        ServerError: the directory is missing, the port is taken, TensorBoard is not installed, or it died.
    """
    folder = Path(logdir).resolve()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ServerError(f"{logdir} {what}; name the log directory, such as runs")
    if importlib.util.find_spec("tensorboard") is None:
        raise ServerError("TensorBoard is not installed; install it: pip install '.[tensorboard]'")
    port = _free_port(host, port)
    found = runs(folder)
    overview, charts = links(host, port)
    with _signals() as received, tempfile.TemporaryFile() as log, _tensorboard(folder, host, port, log) as process:
        if not _answers(process, log, _base(host, port), set(found), received):
            return 128 + received[0]
        print(f"runs: {_listed(found)}" if found else "no event files yet: it will show them as they come")
        print(f"overview: {overview}\ncharts:   {charts}\nCtrl-C stops it", flush=True)
        if browse:
            webbrowser.open(overview)
        while not received:
            if process.poll() is not None:
                raise ServerError(f"TensorBoard ended: {_last_words(log)}")
            time.sleep(0.1)
    return 128 + received[0]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(printable, names[:20])) + more


def _base(host: str, port: int) -> str:
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # every address: this machine reads the loopback
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"


def _free_port(host: str, port: int | None) -> int:
    """`port` if it is free; without one 6006, or whichever is."""
    for wanted in [6006, 0] if port is None else [port]:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, wanted, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as listener:
                if os.name == "posix":  # connections that linger from the last one do not keep it
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                return int(listener.getsockname()[1])
        except OSError as error:
            reason = error.strerror
    where = f"{host} port {port}" if port else host
    raise ServerError(f"cannot listen on {where}: {reason}; leave --port out for a free one, and --host for 127.0.0.1")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to end that have come: noted, not raised, so that none falls between a start and its cleanup."""
    received: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, lambda got, _: received.append(got)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _tensorboard(folder: Path, host: str, port: int, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """TensorBoard as a process in a session of its own, which ends with the block and takes its children along."""
    process = subprocess.Popen(
        [*_command(), f"--logdir={folder}", f"--host={host}", f"--port={port}", "--reload_interval=5"],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C in the terminal reaches us alone, and we end it
    )
    try:
        yield process
    finally:
        _end(process, signal.SIGTERM)
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if hasattr(signal, "SIGKILL"):
            _end(process, signal.SIGKILL)  # what it left in its group


def _command() -> list[str]:
    # -m would look in the current directory first, which may be a download with a tensorboard.py of its own.
    elsewhere = "import sys; sys.path = [path for path in sys.path if path]"
    return [sys.executable, "-c", f"{elsewhere}; from tensorboard.main import run_main; run_main()"]


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.terminate()


def _answers(
    process: subprocess.Popen[bytes], log: IO[bytes], base: str, expected: set[str], received: list[int]
) -> bool:
    """Waits until TensorBoard answers, and a little until it has the expected runs; False if a signal came first."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine
    start = time.monotonic()
    answered = None
    while not received:
        now = time.monotonic()
        if process.poll() is not None:
            raise ServerError(f"TensorBoard did not start: {_last_words(log)}")
        try:
            with direct.open(f"{base}/data/runs", timeout=5) as reply:
                shown = set(json.load(reply))
            answered = answered or now
            # The page does not refresh by itself: opened too early it stays empty.
            if expected <= shown or now - answered > _LOAD:
                return True
        except (OSError, ValueError, http.client.HTTPException):
            if now - start > _START:
                raise ServerError(f"TensorBoard did not answer in {_START:.0f} s: {_last_words(log)}") from None
        time.sleep(0.1)
    return False


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
