"""Proximal optimizers: swap-ins for the stock ones, and `attach` for an optimizer that exists."""

from torchreg.optim.attachment import Attachment as Attachment
from torchreg.optim.attachment import attach as attach
from torchreg.optim.fista import FISTA as FISTA
from torchreg.optim.step_sizes import StepSize as StepSize
from torchreg.optim.step_sizes import learning_rate as learning_rate
from torchreg.optim.swap_ins import ProxAdam as ProxAdam
from torchreg.optim.swap_ins import ProxAdamW as ProxAdamW
from torchreg.optim.swap_ins import ProxSGD as ProxSGD
