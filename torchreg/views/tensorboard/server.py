"""The command `torchreg dashboard`: TensorBoard on a log directory, and the links that open it on the overview."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import io
import json
import os
import signal
import socket
import sys
import time
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from torchreg._tables import printable

_PINNED = ("overview/sparsity", "overview/accuracy")
_LOADING_SECONDS = 10.0  # the longest wait until TensorBoard has read the runs


class ServerError(RuntimeError):
    """TensorBoard cannot be started; the message gives the reason and the next move."""


def links(host: str, port: int) -> tuple[str, str]:
    """The links to the overview and to the custom charts: smoothing off, sparsity and accuracy pinned.

    >>> overview, charts = links("127.0.0.1", 6006)
    >>> charts
    'http://127.0.0.1:6006/#custom_scalars&_smoothingWeight=0'
    """
    pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in _PINNED], separators=(",", ":"))
    query = urllib.parse.urlencode({"smoothing": 0, "pinnedCards": pinned})
    base = _base(host, port)
    return f"{base}/?{query}#timeseries", f"{base}/#custom_scalars&_smoothingWeight=0"


def runs(logdir: str | Path) -> list[str]:
    """The runs under a log directory, by the names that TensorBoard gives them: "." is the directory itself.

    >>> import tempfile
    >>> log = Path(tempfile.mkdtemp())
    >>> (log / "l1").mkdir()
    >>> (log / "l1" / "events.out.tfevents.0.host").touch()
    >>> runs(log)
    ['l1']
    """
    return sorted(
        os.path.relpath(folder, logdir) for folder, _, files in os.walk(logdir) if any("tfevents" in f for f in files)
    )


def serve(logdir: str, host: str = "127.0.0.1", port: int | None = None, *, browse: bool = False) -> NoReturn:
    """Runs TensorBoard in this process and prints its links, until Ctrl-C, SIGTERM or SIGHUP ends the process.

    Args:
        logdir: the directory of the event files.
        host, port: the address that TensorBoard listens on; the default port is 6006, or a free one.
        browse: whether to open the overview in a browser.
    Raises:
        ServerError: the directory is missing, TensorBoard is not installed, or it cannot listen on the address.
        KeyboardInterrupt, SystemExit: a signal ended it; the exit code is 128 + the signal.
    """
    folder = Path(logdir).resolve()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise ServerError(f"{logdir} {problem}; name the log directory, such as runs")
    if importlib.util.find_spec("tensorboard") is None:
        raise ServerError("TensorBoard is not installed; install it: pip install '.[tensorboard]'")
    with _signals_exit(), _imports_from_elsewhere():
        port = _free_port(host, port)
        overview, charts = links(host, port)
        names = runs(folder)
        _launch(folder, host, port)
        _wait_for_runs(overview.partition("/?")[0], set(names))
        print(f"runs: {_name_list(names)}" if names else "no event files yet: it will show them as they come")
        print(f"overview: {overview}\ncharts:   {charts}\nCtrl-C stops it", flush=True)
        if browse:
            webbrowser.open(overview)
        while True:
            time.sleep(1)


def _free_port(host: str, port: int | None) -> int:
    """`port` if it is free; without one 6006, or any free port."""
    for candidate in [6006, 0] if port is None else [port]:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as listener:
                if os.name == "posix":  # connections of an earlier server that linger do not block the port
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                return int(listener.getsockname()[1])
        except OSError as error:
            reason = error.strerror
    address_text = f"{host} port {port}" if port else host
    raise ServerError(
        f"cannot listen on {address_text}: {reason}; leave --port out for a free one, and --host for 127.0.0.1"
    )


def _launch(folder: Path, host: str, port: int) -> None:
    """Starts TensorBoard in a thread."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it advertises features there
            from tensorboard import program

            board = program.TensorBoard()
            board.configure(logdir=str(folder), host=host, port=port, reload_interval=5)
            board.launch()
    except Exception as error:
        reason = getattr(error, "msg", "") or f"{type(error).__name__}: {error}"
        raise ServerError(
            f"TensorBoard did not start: {reason}; check the installation: tensorboard --version"
        ) from None


def _wait_for_runs(base: str, names: set[str]) -> None:
    """Waits until TensorBoard has read the runs: its page does not refresh by itself, and would stay empty."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not reach this machine
    end = time.monotonic() + _LOADING_SECONDS
    while time.monotonic() < end:
        with (
            contextlib.suppress(OSError, ValueError, http.client.HTTPException),
            direct.open(f"{base}/data/runs", timeout=5) as reply,
        ):
            if names <= set(json.load(reply)):
                return
        time.sleep(0.1)


@contextlib.contextmanager
def _signals_exit() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP exit with 128 + the signal, unless they are ignored, as nohup does."""

    def leave(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: no SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        for number in handlers:
            signal.signal(number, leave)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _imports_from_elsewhere() -> Iterator[None]:
    """Imports nothing from the current directory, which may be a download with a tensorboard.py of its own."""
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if entry and os.path.abspath(entry) != os.getcwd()]
    try:
        yield
    finally:
        sys.path[:] = path


def _base(host: str, port: int) -> str:
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # for all addresses the link is to this machine
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _name_list(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(printable, names[:20])) + more
