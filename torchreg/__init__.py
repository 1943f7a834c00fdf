"""torchreg: regularization for PyTorch that means what it says.

reg = tr.Regularizer(model, tr.L1(1e-4))
loss = criterion(model(x), y) + reg()                                            # A. add it to a loss
criterion = tr.RegularizedLoss(nn.CrossEntropyLoss(), reg)                       # B. wrap a loss
optimizer = tr.optim.ProxAdam(model.parameters(), lr=1e-3, regularizer=reg)      # C. exact zeros
"""

from torchreg import optim, testing
from torchreg.binding import Binding, LastLoss, ParameterRef, RegularizedLoss, Regularizer, Term, select
from torchreg.inspection import LayerSparsity, Sparsity, Stationarity, duality_gap, lambda_max, sparsity, stationarity
from torchreg.kernels import Backend, Backends, backends
from torchreg.penalties import (
    L0,
    L1,
    L2,
    MCP,
    SCAD,
    CappedL1,
    Columns,
    Concave,
    ElasticNet,
    GroupLasso,
    Groups,
    LogSum,
    Penalty,
    Reweighted,
    Rows,
    SparseGroupLasso,
    TransformedL1,
    functional,
)
from torchreg.training import (
    CrossValidation,
    FrozenZeros,
    PathPoint,
    Patience,
    Pretrain,
    Recipe,
    Refit,
    RegularizationPath,
    Regularize,
    Schedule,
    Sparsify,
    Stage,
    Stages,
    TargetSparsity,
    copy_zeros_,
    cross_validate,
    freeze_zeros,
    lambda_grid,
    path,
    recipes,
    schedules,
)
from torchreg.views import TensorBoardMonitor, measure, plots

__version__ = "0.1.0"

__all__ = [
    "L0",
    "L1",
    "L2",
    "MCP",
    "SCAD",
    "Backend",
    "Backends",
    "Binding",
    "CappedL1",
    "Columns",
    "Concave",
    "CrossValidation",
    "ElasticNet",
    "FrozenZeros",
    "GroupLasso",
    "Groups",
    "LastLoss",
    "LayerSparsity",
    "LogSum",
    "ParameterRef",
    "PathPoint",
    "Patience",
    "Penalty",
    "Pretrain",
    "Recipe",
    "Refit",
    "RegularizationPath",
    "Regularize",
    "RegularizedLoss",
    "Regularizer",
    "Reweighted",
    "Rows",
    "Schedule",
    "SparseGroupLasso",
    "Sparsify",
    "Sparsity",
    "Stage",
    "Stages",
    "Stationarity",
    "TargetSparsity",
    "TensorBoardMonitor",
    "Term",
    "TransformedL1",
    "backends",
    "copy_zeros_",
    "cross_validate",
    "duality_gap",
    "freeze_zeros",
    "functional",
    "lambda_grid",
    "lambda_max",
    "measure",
    "optim",
    "path",
    "plots",
    "recipes",
    "schedules",
    "select",
    "sparsity",
    "stationarity",
    "testing",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]  # the packages of the library are no part of what a user reads
