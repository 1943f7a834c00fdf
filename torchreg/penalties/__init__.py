"""The penalties, one a file: value and prox side by side."""

from torchreg.penalties.base import Penalty as Penalty
from torchreg.penalties.capped_l1 import CappedL1 as CappedL1
from torchreg.penalties.concave import Concave as Concave
from torchreg.penalties.elastic_net import ElasticNet as ElasticNet
from torchreg.penalties.group_lasso import GroupLasso as GroupLasso
from torchreg.penalties.l0 import L0 as L0
from torchreg.penalties.l1 import L1 as L1
from torchreg.penalties.l2 import L2 as L2
from torchreg.penalties.log_sum import LogSum as LogSum
from torchreg.penalties.mcp import MCP as MCP
from torchreg.penalties.reweighted import Reweighted as Reweighted
from torchreg.penalties.scad import SCAD as SCAD
from torchreg.penalties.sparse_group_lasso import SparseGroupLasso as SparseGroupLasso
from torchreg.penalties.transformed_l1 import TransformedL1 as TransformedL1
