"""The maths of every training step in C and Triton, and which of them serves."""

from torchreg.kernels.backend import Backend, Backends, backends
from torchreg.kernels.weight_stats import Summary, summarize

__all__ = ["Backend", "Backends", "Summary", "backends", "summarize"]
