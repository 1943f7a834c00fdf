"""The penalties, one a file: value and prox side by side."""

from torchreg.penalties.base import Penalty as Penalty
from torchreg.penalties.elastic_net import ElasticNet as ElasticNet
from torchreg.penalties.group_lasso import GroupLasso as GroupLasso
from torchreg.penalties.l1 import L1 as L1
from torchreg.penalties.l2 import L2 as L2
from torchreg.penalties.sparse_group_lasso import SparseGroupLasso as SparseGroupLasso
