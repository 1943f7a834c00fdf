"""The monitor: what a regularized network is doing, as numbers and in TensorBoard."""

from torchreg.monitor.dashboard import TensorBoardMonitor as TensorBoardMonitor
from torchreg.monitor.measurement import measure as measure
