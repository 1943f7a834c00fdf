"""The dashboard: everything that a regularizer does, in TensorBoard."""

from torchreg.views.tensorboard.dashboard import TensorBoardMonitor

__all__ = ["TensorBoardMonitor"]
