"""Views of a model and a training: numbers, plots, TensorBoard, reports. Views only read."""

from torchreg.views.measurement import measure
from torchreg.views.tensorboard import TensorBoardMonitor

__all__ = ["TensorBoardMonitor", "measure"]
