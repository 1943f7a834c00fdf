"""The penalties, one per file with value and prox side by side, and the prox maps and groups that they share."""

from torchreg.penalties.base import Penalty
from torchreg.penalties.capped_l1 import CappedL1
from torchreg.penalties.concave import Concave
from torchreg.penalties.elastic_net import ElasticNet
from torchreg.penalties.group_lasso import GroupLasso
from torchreg.penalties.groups import Columns, Groups, Rows
from torchreg.penalties.l0 import L0
from torchreg.penalties.l1 import L1
from torchreg.penalties.l2 import L2
from torchreg.penalties.log_sum import LogSum
from torchreg.penalties.mcp import MCP
from torchreg.penalties.reweighted import Reweighted
from torchreg.penalties.scad import SCAD
from torchreg.penalties.sparse_group_lasso import SparseGroupLasso
from torchreg.penalties.transformed_l1 import TransformedL1

__all__ = [
    "L0",
    "L1",
    "L2",
    "MCP",
    "SCAD",
    "CappedL1",
    "Columns",
    "Concave",
    "ElasticNet",
    "GroupLasso",
    "Groups",
    "LogSum",
    "Penalty",
    "Reweighted",
    "Rows",
    "SparseGroupLasso",
    "TransformedL1",
]
