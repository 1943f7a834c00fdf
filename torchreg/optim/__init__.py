"""Proximal optimizers: swap-ins for the stock ones, `attach` for one that exists, and FISTA for convex problems."""

from torchreg.optim.attachment import Attachment as Attachment
from torchreg.optim.attachment import attach as attach
from torchreg.optim.fista import FISTA as FISTA
from torchreg.optim.rounding import NearestRounding as NearestRounding
from torchreg.optim.rounding import Rounding as Rounding
from torchreg.optim.rounding import StochasticRounding as StochasticRounding
from torchreg.optim.step_sizes import StepSize as StepSize
from torchreg.optim.step_sizes import learning_rate as learning_rate
from torchreg.optim.swap_ins import ProxAdam as ProxAdam
from torchreg.optim.swap_ins import ProxAdamW as ProxAdamW
from torchreg.optim.swap_ins import ProxSGD as ProxSGD
