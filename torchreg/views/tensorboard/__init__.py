"""The dashboard of a regularized training in TensorBoard."""

from torchreg.views.tensorboard.dashboard import TensorBoardMonitor

__all__ = ["TensorBoardMonitor"]
