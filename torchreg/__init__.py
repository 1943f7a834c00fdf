"""torchreg: regularization for PyTorch that means what it says.

reg = tr.Regularizer(model, tr.L1(1e-4))
loss = criterion(model(x), y) + reg()                                            # A. add it to a loss
criterion = tr.RegularizedLoss(nn.CrossEntropyLoss(), reg)                       # B. wrap a loss
optimizer = tr.optim.ProxAdam(model.parameters(), lr=1e-3, regularizer=reg)      # C. exact zeros
"""

from torchreg import functional as functional
from torchreg import optim as optim
from torchreg import plots as plots
from torchreg import recipes as recipes
from torchreg import schedules as schedules
from torchreg import testing as testing
from torchreg.certificates import Stationarity as Stationarity
from torchreg.certificates import duality_gap as duality_gap
from torchreg.certificates import lambda_max as lambda_max
from torchreg.certificates import stationarity as stationarity
from torchreg.cross_validation import CrossValidation as CrossValidation
from torchreg.cross_validation import cross_validate as cross_validate
from torchreg.groups import Columns as Columns
from torchreg.groups import Groups as Groups
from torchreg.groups import Rows as Rows
from torchreg.kernels import Backend as Backend
from torchreg.kernels import Backends as Backends
from torchreg.kernels import backends as backends
from torchreg.loss import LastLoss as LastLoss
from torchreg.loss import RegularizedLoss as RegularizedLoss
from torchreg.monitor import TensorBoardMonitor as TensorBoardMonitor
from torchreg.monitor import measure as measure
from torchreg.paths import PathPoint as PathPoint
from torchreg.paths import Patience as Patience
from torchreg.paths import RegularizationPath as RegularizationPath
from torchreg.paths import lambda_grid as lambda_grid
from torchreg.paths import path as path
from torchreg.penalties import L0 as L0
from torchreg.penalties import L1 as L1
from torchreg.penalties import L2 as L2
from torchreg.penalties import MCP as MCP
from torchreg.penalties import SCAD as SCAD
from torchreg.penalties import CappedL1 as CappedL1
from torchreg.penalties import Concave as Concave
from torchreg.penalties import ElasticNet as ElasticNet
from torchreg.penalties import GroupLasso as GroupLasso
from torchreg.penalties import LogSum as LogSum
from torchreg.penalties import Penalty as Penalty
from torchreg.penalties import Reweighted as Reweighted
from torchreg.penalties import SparseGroupLasso as SparseGroupLasso
from torchreg.penalties import TransformedL1 as TransformedL1
from torchreg.regularizer import Regularizer as Regularizer
from torchreg.schedules import Schedule as Schedule
from torchreg.selection import Selected as Selected
from torchreg.selection import select as select
from torchreg.stages import Dense as Dense
from torchreg.stages import Recipe as Recipe
from torchreg.stages import Refit as Refit
from torchreg.stages import Regularize as Regularize
from torchreg.stages import Sparsify as Sparsify
from torchreg.stages import Stage as Stage
from torchreg.stages import Stages as Stages
from torchreg.target_sparsity import TargetSparsity as TargetSparsity
from torchreg.terms import Term as Term
from torchreg.zeros import FrozenZeros as FrozenZeros
from torchreg.zeros import LayerSparsity as LayerSparsity
from torchreg.zeros import Sparsity as Sparsity
from torchreg.zeros import copy_zeros_ as copy_zeros_
from torchreg.zeros import freeze_zeros as freeze_zeros
from torchreg.zeros import sparsity as sparsity

__version__ = "0.1.0"
