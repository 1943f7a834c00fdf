"""Proximal optimizers: swap-ins for the stock ones, `attach` for one that exists, and FISTA for convex problems."""

from torchreg.optim.attachment import Attachment, attach
from torchreg.optim.executors.rounding import NearestRounding, Rounding, StochasticRounding
from torchreg.optim.fista import FISTA
from torchreg.optim.proximal import ProxAdam, ProxAdamW, ProxSGD
from torchreg.optim.step_sizes import StepSize, learning_rate

__all__ = [
    "FISTA",
    "Attachment",
    "NearestRounding",
    "ProxAdam",
    "ProxAdamW",
    "ProxSGD",
    "Rounding",
    "StepSize",
    "StochasticRounding",
    "attach",
    "learning_rate",
]
