"""The sparsity report of a checkpoint: the tensors of a file, and the zeros in them."""

from torchreg.views.report.checkpoint_file import Checkpoint, CheckpointError, read_checkpoint
from torchreg.views.report.checkpoint_report import CheckpointReport, report_on

__all__ = ["Checkpoint", "CheckpointError", "CheckpointReport", "read_checkpoint", "report_on"]
