"""What runs in every training step: native C where it was built, Triton on a GPU, and plain torch, behind one face."""

from torchreg.kernels.choice import Backend as Backend
from torchreg.kernels.choice import Backends as Backends
from torchreg.kernels.choice import backends as backends
from torchreg.kernels.summaries import Summary as Summary
from torchreg.kernels.summaries import summarize as summarize
