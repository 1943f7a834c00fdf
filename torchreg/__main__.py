"""The command line: the sparsity report of a checkpoint, and TensorBoard on its overview."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence

import torch

import torchreg
from torchreg._checks import nonnegative
from torchreg._tables import printable
from torchreg.views.report import CheckpointError, read_checkpoint, report_on
from torchreg.views.report.checkpoint_report import SPARSE_FORMAT
from torchreg.views.tensorboard.server import ServerError, serve

_EXAMPLES = """examples:
  torchreg report model.pt                     zeros, dead inputs and neurons, by layer
  torchreg report run.ckpt --key model         the state dict of a larger checkpoint
  torchreg report model.safetensors --json     the same as one JSON object
  torchreg dashboard runs                      TensorBoard, and the link to its overview
"""
_REPORT = f"""Reads a state dict saved by torch.save or safetensors, and counts exact zeros, dead inputs and neurons, by
layer, and the bytes that the zeros would save. No code in the file is run; a pickled module is refused.

A weight is floating, complex or quantized, has two or more dimensions, and does not have the name of a bias or an
embedding; all other tensors are one line below the table. weight_orig and weight_mask count as their product, tied
tensors once. A state dict does not tell a transposed or grouped convolution from a plain one, or nn.Embedding from
nn.Linear: for a model that has these, tr.sparsity(model) counts the inputs and neurons correctly.

Sparse size: {SPARSE_FORMAT}.
"""
_REPORT_EXAMPLES = """examples:
  torchreg report model.pt
  torchreg report run.ckpt --key ema.model     a nested one
  torchreg report model.pt --near-zero 1e-3    how many more are nearly zero
  torchreg report model.pt --json | jq .fraction
"""
_DASHBOARD = """Starts TensorBoard on a log directory and prints the links that open it on the overview: sparsity and
accuracy pinned, and smoothing off, since a smoothed sparsity did not occur at any step. Ctrl-C stops it.
"""
_DASHBOARD_EXAMPLES = """examples:
  torchreg dashboard runs
  torchreg dashboard runs --port 6010 --open
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line with `argv`, by default the arguments of the process, and returns its exit code.

    The code is 0 after success, 2 with one line on stderr after an error, and 130 after Ctrl-C. Other signals exit with
    128 + the signal.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console without × must not cause a traceback
    arguments = argument_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader has left: | head
        with contextlib.suppress(OSError, ValueError):  # so that the flush at exit does not fail too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (CheckpointError, ServerError, OSError, MemoryError) as error:
        message = str(error) or f"out of memory ({type(error).__name__})"
        print(f"torchreg: {printable(message, 1000)}", file=sys.stderr)
        return 2


def argument_parser() -> argparse.ArgumentParser:
    """The parser of both commands; `run` in its result is the function of the command."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("torchreg", description=__doc__, epilog=_EXAMPLES, formatter_class=layout)
    parser.add_argument(
        "--version", action="version", version=f"torchreg {torchreg.__version__}, torch {torch.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report",
        help="the sparsity of a checkpoint",
        description=_REPORT,
        epilog=_REPORT_EXAMPLES,
        formatter_class=layout,
    )
    report.add_argument("checkpoint", metavar="CHECKPOINT", help="a file of torch.save or safetensors")
    report.add_argument("--key", help="the dotted key of the state dict in the file; needed if it holds several")
    report.add_argument("--json", action="store_true", help="print one JSON object")
    report.add_argument("--near-zero", type=_threshold, metavar="T", help="also count the weights with |w| ≤ T")
    report.set_defaults(run=_report)

    board = commands.add_parser(
        "dashboard",
        help="TensorBoard, opened on the overview",
        description=_DASHBOARD,
        epilog=_DASHBOARD_EXAMPLES,
        formatter_class=layout,
    )
    board.add_argument("logdir", metavar="LOGDIR", help="the directory of the event files")
    board.add_argument("--port", type=_port, help="its port; by default 6006, or a free one if that is taken")
    board.add_argument("--host", default="127.0.0.1", help="its address; only this machine reaches the default one")
    board.add_argument("--open", action="store_true", help="open it in a browser too")
    board.set_defaults(run=_dashboard)
    return parser


def _report(arguments: argparse.Namespace) -> None:
    report = report_on(read_checkpoint(arguments.checkpoint, arguments.key), arguments.near_zero)
    print(json.dumps(report.to_dict(), indent=2, allow_nan=False) if arguments.json else report)


def _dashboard(arguments: argparse.Namespace) -> None:
    serve(arguments.logdir, arguments.host, arguments.port, browse=arguments.open)


def _threshold(text: str) -> float:
    try:
        return nonnegative("T", float(text), "try 1e-3")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not a port; give a number from 1 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
