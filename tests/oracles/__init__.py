"""Answers found another way: exact fractions, bisection and other people's solvers. Nothing here imports torchreg."""

from tests.oracles.concave import Concave as Concave
from tests.oracles.concave import capped_l1 as capped_l1
from tests.oracles.concave import l0 as l0
from tests.oracles.concave import log_sum as log_sum
from tests.oracles.concave import mcp as mcp
from tests.oracles.concave import scad as scad
from tests.oracles.concave import transformed_l1 as transformed_l1
from tests.oracles.diabetes import diabetes as diabetes
from tests.oracles.groups import Grouped as Grouped
from tests.oracles.separable import Separable as Separable
from tests.oracles.separable import elastic_net as elastic_net
from tests.oracles.separable import l1 as l1
from tests.oracles.separable import l2 as l2
from tests.oracles.separable import to_numpy as to_numpy
