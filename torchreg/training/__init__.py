"""Tools that move λ, or train a model more than once: schedules, target sparsity, refits, paths, stages."""

from torchreg.training.cross_validation import CrossValidation, cross_validate
from torchreg.training.path_points import PathPoint, Patience, RegularizationPath
from torchreg.training.paths import lambda_grid, path
from torchreg.training.refit import FrozenZeros, copy_zeros_, freeze_zeros
from torchreg.training.schedules import Schedule
from torchreg.training.stage import Pretrain, Refit, Regularize, Sparsify, Stage
from torchreg.training.stages import Recipe, Stages
from torchreg.training.target_sparsity import TargetSparsity

__all__ = [
    "CrossValidation",
    "FrozenZeros",
    "PathPoint",
    "Patience",
    "Pretrain",
    "Recipe",
    "Refit",
    "RegularizationPath",
    "Regularize",
    "Schedule",
    "Sparsify",
    "Stage",
    "Stages",
    "TargetSparsity",
    "copy_zeros_",
    "cross_validate",
    "freeze_zeros",
    "lambda_grid",
    "path",
]
